"""What is other on a GPU: mixed decode, NCCL, bf16. Skips itself where there is none."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.data.dali import Loader
from pipeline.data.dataset import open_split
from pipeline.data.plan import EvalPlan

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def test_mixed_decode_is_close_to_the_cpus(imagenet_samples: Path, tmp_path: Path):
    (tmp_path / "val").mkdir()
    (tmp_path / "val" / "any").symlink_to(imagenet_samples)
    index = open_split(tmp_path, "val", tmp_path / "cache")
    plan = EvalPlan(index.widths_N, index.heights_N, 256, 224)
    images = {}
    for device, device_id in (("cpu", None), ("cuda", 0)):
        with Loader(
            index,
            device=device,
            device_id=device_id,
            threads=2,
            max_batch_size=len(index),
            interpolation="bilinear",
            mean=(0, 0, 0),
            std=(1 / 255, 1 / 255, 1 / 255),
        ) as loader:
            (batch,) = loader.run([plan.batch(np.arange(len(index)))])
        assert batch.images_NCHW.device.type == batch.labels_N.device.type == device
        images[device] = batch.images_NCHW.cpu()
    assert (images["cpu"] - images["cuda"]).abs().mean() < 0.2  # 0.16 on an H200


def test_the_demo_trains_on_the_gpu_in_bf16(shell, tmp_path: Path):
    done = shell("densenet", "train", "configs/demo.yaml", "cluster.workers=1", f"run.output={tmp_path}")
    assert done.returncode == 0, done.stdout
    assert "workers      1 on cuda" in done.stdout
    assert "precision    bf16" in done.stdout
    (correct,) = re.findall(r"best +top-1 (\d+)/360", done.stdout)
    assert int(correct) >= 350
