"""Labels of ImageNet's validation images, from the development kit or from Kaggle's list.

A class's label is the rank of its WordNet id among the sorted ids. The kit's ILSVRC2012_ID is a different numbering; it
only maps an image to its WordNet id.
"""

import csv
import io
import tarfile
from pathlib import Path

import numpy as np

from pipeline.errors import DataError

DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"
KAGGLE_VAL, KAGGLE_CLASSES = "LOC_val_solution.csv", "LOC_synset_mapping.txt"
_META, _TRUTH = "data/meta.mat", "data/ILSVRC2012_validation_ground_truth.txt"
_VAL_IMAGE = "ILSVRC2012_val_{:08d}"


def devkit_labels(file: Path) -> dict[str, str]:
    """Reads the WordNet ids of the validation images from the development kit, by file name without extension.

    Raises:
        DataError: the kit is corrupt or lacks one of its two tables.
    """
    from scipy.io import loadmat

    contents: dict[str, bytes] = {}
    try:
        with tarfile.open(file, "r:gz") as archive:
            for info in archive:
                for name in (_META, _TRUTH):
                    if info.isreg() and info.name.endswith(name):
                        stream = archive.extractfile(info)
                        contents[name] = stream.read() if stream is not None else b""
        missing = [name for name in (_META, _TRUTH) if name not in contents]
        if missing:
            raise DataError(f"{file} lacks {', '.join(missing)}: download it again.")
        synsets = np.atleast_1d(loadmat(io.BytesIO(contents[_META]), squeeze_me=True)["synsets"])
        wnids = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in synsets}
        truth = [wnids[int(line)] for line in contents[_TRUTH].split()]
    except (tarfile.TarError, OSError, EOFError, ValueError, KeyError, IndexError, TypeError) as error:
        raise DataError(f"{file} cannot be read ({type(error).__name__}: {error}): download it again.") from error
    return {_VAL_IMAGE.format(number): wnid for number, wnid in enumerate(truth, start=1)}


def kaggle_labels(file: Path) -> dict[str, str]:
    """Reads the WordNet ids of the validation images from `LOC_val_solution.csv`, by file name without extension.

    A line lists boxes of five words each, a class and four coordinates; the first box's class is the image's label.

    Raises:
        DataError: the file has another format.
    """
    labels: dict[str, str] = {}
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            rows = csv.DictReader(stream)
            if not {"ImageId", "PredictionString"} <= set(rows.fieldnames or ()):
                raise DataError(f"{file} must have the columns ImageId and PredictionString; it has {rows.fieldnames}.")
            for row in rows:
                words = (row["PredictionString"] or "").split()
                if not words:
                    raise DataError(f"{file}, line {rows.line_num}: {row['ImageId']} has no class.")
                if labels.setdefault(row["ImageId"], words[0]) != words[0]:
                    raise DataError(
                        f"{file}, line {rows.line_num}: {row['ImageId']} has another class in an earlier line."
                    )
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{file} cannot be read ({error}): download it again.") from error
    return labels
