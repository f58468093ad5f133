"""Maps images to the model's classes: by the class names of the data, or by a labels file (ImageNet-ReaL)."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.data.class_names import to_nfc
from pipeline.data.index import DatasetIndex
from pipeline.errors import DataError, listed


def map_labels(index: DatasetIndex, classes: Sequence[str]) -> NDArray[np.int64]:
    """Returns each image's label as an index into the model's class list, matched by class name.

    If all class names of the data are plain numbers, as the folders of ImageNet-V2, they are indices into the list.

    Raises:
        DataError: The model does not know a class.
    """
    class_ids = {to_nfc(name): i for i, name in enumerate(classes)}
    unknown = [name for name in index.classes if to_nfc(name) not in class_ids]
    if unknown and all(name.isdecimal() and int(name) < len(classes) for name in index.classes):
        return np.array([int(name) for name in index.classes])[index.labels_N]
    if unknown:
        raise DataError(
            f"the data in {index.root} have {len(unknown)} classes that the model does not know: {listed(unknown)}. It "
            f"knows {len(classes)}: {listed(list(classes))}."
        )
    return np.array([class_ids[to_nfc(name)] for name in index.classes])[index.labels_N]


def read_label_sets(file: Path, index: DatasetIndex, num_classes: int) -> list[set[int]]:
    """Reads the classes that count as correct for each image from a JSON file; returns them in the index's order.

    The file contains a list with one entry per image in the order of file names (like ImageNet-ReaL), or an object with
    one entry per file name. An entry is a class or a list of classes, as indices into the model's class list. Images
    with an empty list are not counted.

    Raises:
        DataError: The file has another format, or does not match the images.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"--labels={file} cannot be read as JSON: {error}.") from error
    names = index.names()
    if isinstance(content, dict):
        by_name = {_stem(name): entry for name, entry in content.items()}
        missing = [name for name in names if name not in by_name]
        if missing:
            raise DataError(f"--labels={file} has no entry for {len(missing)} images: {listed(missing)}.")
    elif isinstance(content, list) and len(content) == len(names):
        by_name = dict(zip(sorted(names), content, strict=True))
    else:
        size = f"{len(content)} entries" if isinstance(content, list) else f"a {type(content).__name__}"
        raise DataError(
            f"--labels={file} has {size}, but there are {len(names)} images: pass a list with one entry per image in "
            f"the order of file names, or an object with one entry per file name."
        )
    if len(by_name) < len(set(names)) or len(set(names)) < len(names):
        raise DataError(
            f"the images in {index.root} have duplicate file names, so --labels={file} cannot be matched by name."
        )
    return [_label_set(by_name[name], name, file, num_classes) for name in names]


def _label_set(entry: object, name: str, file: Path, num_classes: int) -> set[int]:
    class_ids = entry if isinstance(entry, list) else [entry]
    if any(not isinstance(i, int) or isinstance(i, bool) or not 0 <= i < num_classes for i in class_ids):
        raise DataError(f"--labels={file}: {name} has {entry!r}; classes must be integers from 0 to {num_classes - 1}.")
    return set(class_ids)


def _stem(name: str) -> str:
    return name.rpartition("/")[2].partition(".")[0]
