"""The demo data set: scikit-learn's handwritten digits as JPEG class folders."""

from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.errors import DataError
from pipeline.files import atomic_folder

TRAIN_IMAGES, VAL_IMAGES = 1437, 360
_SIDE = 32
_QUALITY = 95


def write_source(rest: str, folder: Path) -> None:
    """Writes the data source `digits://`.

    Raises:
        DataError: `rest` is not empty, or `folder` holds something else.
    """
    if rest:
        raise DataError(f"data.root=digits://{rest}: nothing may follow digits://.")
    write_digits(folder)


def write_digits(root: Path) -> None:
    """Writes `root`/{train,val}/DIGIT/NNNN.jpg: 1,437 and 360 gray images of 32 x 32 pixels.

    The source is scikit-learn's 1,797 digits of 8 x 8 pixels, gray values 0-16 (from the UCI set "Optical Recognition
    of Handwritten Digits"). The split is a fixed shuffle, stratified by class. The folder is written atomically; a
    complete one is not changed.

    Raises:
        DataError: `root` exists and holds something else.
    """
    if root.exists():
        counts = _count_images(root)
        if counts != (TRAIN_IMAGES, VAL_IMAGES):
            raise DataError(f"{root} is not the digits data set ({counts[0]} + {counts[1]} images): move or remove it.")
        return
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    train_ids, _ = train_test_split(
        np.arange(len(digits.target)), test_size=VAL_IMAGES, random_state=0, stratify=digits.target
    )
    in_train = np.isin(np.arange(len(digits.target)), train_ids)
    with atomic_folder(root) as temporary:
        for i, (image, label) in enumerate(zip(digits.images, digits.target, strict=True)):
            folder = temporary / ("train" if in_train[i] else "val") / str(label)
            folder.mkdir(parents=True, exist_ok=True)
            gray = Image.fromarray(np.rint(image * 255 / 16).astype(np.uint8))
            gray.resize((_SIDE, _SIDE), Image.Resampling.BICUBIC).save(folder / f"{i:04d}.jpg", quality=_QUALITY)


def _count_images(root: Path) -> tuple[int, int]:
    train, val = (sum(1 for _ in (root / split).glob("?/*.jpg")) for split in ("train", "val"))
    return train, val
