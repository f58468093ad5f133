"""Tests of the GPU: mixed decoding, NCCL, bf16, device synchronization. Skipped without a GPU."""

import re
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.gpu.run_steps import pixel_differences
from pipeline.data.dataset import open_split
from pipeline.train import checkpoint
from pipeline.train.checkpoint import checkpoint_root
from pipeline.train.process_group import process_group
from tests.train.settings import new_trainer, settings

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def test_mixed_decoding_is_close_to_the_cpus(imagenet_samples: Path, tmp_path: Path):
    (tmp_path / "val").mkdir()
    (tmp_path / "val" / "any").symlink_to(imagenet_samples)
    index = open_split(tmp_path, "val", tmp_path / "cache")
    assert pixel_differences(index, len(index), "cuda").mean() < 0.2  # 0.16 on an H200


def test_the_demo_trains_on_the_gpu_in_bf16(shell, tmp_path: Path):
    done = shell("densenet", "train", "configs/demo.yaml", "cluster.workers=1", f"run.output={tmp_path}")
    assert done.returncode == 0, done.stdout
    assert "workers      1 on cuda" in done.stdout
    assert "precision    bf16" in done.stdout
    (correct,) = re.findall(r"best +top-1 (\d+)/360", done.stdout)
    assert int(correct) >= 350


@pytest.fixture(scope="session")
def nccl(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with process_group(tmp_path_factory.mktemp("group") / "store", backend="nccl"):
        yield


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(nccl, indexes, tmp_path: Path, precision):
    data = indexes()
    plan = {
        "model": {"name": "densenet121", "drop_rate": 0.2},
        "train": {"epochs": 1.6, "log_every_steps": 1, "precision": precision},
        "checkpoint": {"every_samples": 24, "keep_last": 9},
        "ema": {"decay": 0.9},
    }
    config, derived = settings(*data, device="cuda", **plan)
    whole, rest = (checkpoint_root(tmp_path / name) for name in ("whole", "rest"))
    new_trainer(config, derived, data, tmp_path / "whole", lambda event: None).fit()
    middle = whole / checkpoint.folder_name(24)
    new_trainer(config, derived, data, tmp_path / "rest", lambda event: None, resume=middle).fit()
    for file in ("model.safetensors", "ema.safetensors", "optimizer.safetensors"):
        one, two = (load_file(root / checkpoint.folder_name(64) / file) for root in (whole, rest))
        assert all(torch.equal(one[key], two[key]) for key in one), file


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_between_log_lines_the_host_only_waits_for_the_exchange_of_the_loss(nccl, indexes, tmp_path: Path, stage):
    """The exchange waits on a separate stream (`pipeline/train/non_finite.py`); nothing else may synchronize."""
    data, batches = indexes(), iter(range(99))
    plan = {
        "train": {"epochs": 4, "log_every_steps": 20},
        "engine": {"zero_stage": stage},
        "optim": {"clip_grad_norm": 1.0},
        "augment": {"brightness": 0.4, "erase_prob": 0.5, "mixup_alpha": 0.2, "cutmix_alpha": 1.0},
        "ema": {"decay": 0.9},
        "checkpoint": {"every_epochs": 9},
        "eval": {"resize": 32, "crop": 32, "every_epochs": 9},
    }

    def heartbeat() -> None:
        step = next(batches)
        if step in (5, 15):
            torch.cuda.set_sync_debug_mode("warn" if step == 5 else "default")

    config, derived = settings(*data, device="cuda", **plan)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        new_trainer(config, derived, data, tmp_path / "run", lambda event: None, heartbeat=heartbeat).fit()
    waits = [Path(warning.filename).name for warning in found if "synchroniz" in str(warning.message)]
    assert set(waits) == {"streams.py"}
    assert len(waits) == 10
