"""Small data sets of synthetic JPEGs."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def write_image(file: Path, number: int, width: int, height: int, mode: str = "RGB") -> None:
    """Writes a smooth image, unique for each number."""
    rng = np.random.default_rng(number)
    coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8))
    file.parent.mkdir(parents=True, exist_ok=True)
    coarse.resize((width, height), Image.Resampling.BICUBIC).convert(mode).save(file, "JPEG", quality=92)


@pytest.fixture
def folders(tmp_path: Path) -> Callable[..., Path]:
    """`folders(train=N, val=M)` writes class folders a, b and c of images of all sizes, some of them gray."""

    def write(train: int = 41, val: int = 12) -> Path:
        root = tmp_path / "set"
        for split, count in (("train", train), ("val", val)):
            for i in range(count):
                name = f"{'abc'[i % 3]}/it's {i:03d}.JPEG"
                mode = "L" if i % 5 == 0 else "RGB"
                write_image(root / split / name, i, 32 + 7 * i % 50, 32 + 5 * i % 60, mode)
        return root

    return write
