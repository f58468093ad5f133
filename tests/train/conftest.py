"""A small picture set."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.data.dataset import open_splits
from pipeline.data.index import DatasetIndex


@pytest.fixture
def indexes(tmp_path: Path) -> Callable[..., tuple[DatasetIndex, DatasetIndex]]:
    """`indexes(train=N, val=M, classes=K)`: pictures of 32 pixels whose brightness tells the class."""

    def make(train: int = 40, val: int = 13, classes: int = 3) -> tuple[DatasetIndex, DatasetIndex]:
        rng = np.random.default_rng(0)
        for split, count in (("train", train), ("val", val)):
            for i in range(count):
                label = i % classes
                file = tmp_path / "set" / split / f"class{label}" / f"{i:03d}.jpg"
                file.parent.mkdir(parents=True, exist_ok=True)
                light = 40 + 170 * label / (classes - 1)
                pixels = np.clip(rng.normal(light, 40, (32, 32, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(file, quality=95)
        return open_splits(str(tmp_path / "set"), "train", "val", tmp_path / "cache")

    return make
