"""Which class of the model each image is of: by the data's class names, or by a file of labels."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.data.class_names import to_nfc
from pipeline.data.index import DatasetIndex
from pipeline.errors import DataError, listed


def map_labels(index: DatasetIndex, classes: Sequence[str]) -> NDArray[np.int64]:
    """Each image's place in the model's class list, by the name of its class in the data.

    Where the data's classes have plain numbers for names, as ImageNet-V2's folders, they are places in the list.

    Raises:
        DataError: the model does not know a class.
    """
    places = {to_nfc(name): place for place, name in enumerate(classes)}
    unknown = [name for name in index.classes if to_nfc(name) not in places]
    if unknown and all(name.isdecimal() and int(name) < len(classes) for name in index.classes):
        return np.array([int(name) for name in index.classes])[index.labels_N]
    if unknown:
        raise DataError(
            f"the data in {index.root} have {len(unknown)} classes that the model does not know: {listed(unknown)}. It "
            f"knows {len(classes)}: {listed(list(classes))}."
        )
    return np.array([places[to_nfc(name)] for name in index.classes])[index.labels_N]


def read_label_sets(file: Path, index: DatasetIndex, num_classes: int) -> list[set[int]]:
    """The classes that count as right for each image, in the index's order, from a JSON file.

    It holds a list with one entry for each image in the order of file names (as ImageNet-ReaL's), or an object with
    an entry for each file name. An entry is a class or a list of classes, by place in the model's list; images
    without any are not counted.

    Raises:
        DataError: it is not such a file, or not of these images.
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
            f"--labels={file} holds {size}, there are {len(names)} images: give a list with an entry for each in the "
            f"order of file names, or an object with an entry for each file name."
        )
    if len(by_name) < len(set(names)) or len(set(names)) < len(names):
        raise DataError(f"the images in {index.root} have file names that occur twice, so labels cannot be told.")
    return [_accepted(by_name[name], name, file, num_classes) for name in names]


def _accepted(entry: object, name: str, file: Path, num_classes: int) -> set[int]:
    places = entry if isinstance(entry, list) else [entry]
    if any(not isinstance(p, int) or isinstance(p, bool) or not 0 <= p < num_classes for p in places):
        raise DataError(f"--labels={file}: {name} has {entry!r}; classes are numbers from 0 to {num_classes - 1}.")
    return set(places)


def _stem(name: str) -> str:
    return name.rpartition("/")[2].partition(".")[0]
