"""From archives per WordNet id to a pretrained, registered and fine-tuned model, on small images."""

from pathlib import Path

import numpy as np
import pytest
from mlflow.tracking import MlflowClient
from PIL import Image

from tests.data import synthetic

pytestmark = pytest.mark.slow

SMALL = [
    "model.name=densenet_tiny",
    "data.image_size=32",
    "eval.resize=32",
    "eval.crop=32",
    "train.global_batch_size=16",
    "train.epochs=2",
    "schedule.warmup_epochs=0",
    "cluster.workers=1",
    "device=cpu",
]


def jpeg(number: int, level: int) -> bytes:
    pixels = np.random.default_rng(number).normal(level, 30, (32, 32, 3))
    return synthetic.encoded(Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)))


def write_archives(root: Path) -> None:
    """Writes 12 classes of different brightness, 2 of which have fewer than 10 images."""
    root.mkdir()
    for k in range(12):
        wnid, count = f"n{k:08d}", 6 if k in (3, 7) else 12
        files = {f"{wnid}_{i}.JPEG": jpeg(100 * k + i, 20 * k + 10) for i in range(count)}
        (root / f"{wnid}.tar").write_bytes(synthetic.tar(files))


def test_from_archives_to_a_fine_tuned_model(shell, forked_densenet, tmp_path):
    write_archives(tmp_path / "winter21_whole")
    options = ["--min-images", "10", "--val-per-class", "2", "--license", "research only", "--workers", "1"]
    done = forked_densenet("data", "prepare", str(tmp_path / "winter21_whole"), str(tmp_path / "21k"), *options)
    assert done.returncode == 0, done.stdout
    assert "ignored: 2 classes with fewer than 10 training images: n00000003, n00000007" in done.stdout
    assert "train 100 images" in done.stdout and "10 classes" in done.stdout

    output = f"run.output={tmp_path}"
    name = "tracking.registered_model_name=tiny_imagenet21k"
    recipe = "configs/recipes/imagenet21k.yaml"
    done = shell("densenet", "train", recipe, *SMALL, f"data.root={tmp_path / '21k'}", output, name)
    assert done.returncode == 0, done.stdout
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    version = MlflowClient(uri, uri).get_model_version_by_alias("tiny_imagenet21k", "candidate")
    assert version.tags["data.license"] == "research only", "the license in dataset.json"

    for split, count in (("train", 8), ("val", 3)):
        for k, wnid in enumerate(("n10000001", "n10000002", "n10000003")):
            (tmp_path / "1k" / split / wnid).mkdir(parents=True)
            for i in range(count):
                (tmp_path / "1k" / split / wnid / f"{i}.JPEG").write_bytes(jpeg(5000 + 50 * k + i, 80 * k + 20))
    recipe, weights = "configs/recipes/finetune_imagenet1k.yaml", "model.weights=models:/tiny_imagenet21k@candidate"
    done = shell("densenet", "train", recipe, *SMALL, weights, f"data.root={tmp_path / '1k'}", output)
    assert done.returncode == 0, done.stdout
    assert "tiny_imagenet21k" in done.stdout
    model = MlflowClient(uri, uri).get_model_version_by_alias("densenet_tiny", "candidate")
    assert "data.license" not in model.tags
