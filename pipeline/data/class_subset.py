"""Class subsets and merges of a data set (`data.classes`): another index of the same files; no image is copied."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np

from pipeline.data.class_list import read_class_list, relabel
from pipeline.data.index import DatasetIndex
from pipeline.data.index_file import save_index
from pipeline.errors import DataError


def with_classes(index: DatasetIndex, file: Path, cache: Path) -> DatasetIndex:
    """Returns the index of the samples of the classes that a list names, with their new names and labels.

    It is saved in the folder `cache`, from which later starts and all ranks of a node map it into memory. The samples
    keep their order. For the format of the list see `pipeline.data.class_list.read_class_list`.

    Raises:
        DataError: the list is invalid, the split has no sample of its classes, or `cache` is not writable.
    """
    new_names = read_class_list(file, index.classes)
    classes, new_labels_K = relabel(new_names, index.classes)
    key = json.dumps([index.fingerprint, classes, new_labels_K.tolist()])
    target = cache / f"classes-{hashlib.sha256(key.encode()).hexdigest()[:16]}.arrow"
    if not target.is_file():
        rows_N = np.flatnonzero(new_labels_K[index.labels_N] >= 0)
        if not len(rows_N):
            raise DataError(
                f"{index.root} has no image of the classes in {file} in one of its splits: correct the list."
            )
        columns = index.columns.take(rows_N)
        try:
            cache.mkdir(parents=True, exist_ok=True)
            save_index(replace(columns, labels_N=new_labels_K[columns.labels_N]), classes, target)
        except OSError as error:
            raise DataError(
                f"the index of the classes in {file} cannot be saved in {cache}: {error.strerror or error}. Set "
                f"run.output to a writable folder."
            ) from error
    subset = DatasetIndex.open(index.root, target, address=index.address)
    subset.shards = {name: index.shards[name] for name in subset.files if name in index.shards}
    return subset
