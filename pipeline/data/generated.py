"""Data sets that a data source makes here: `data.root=digits://`, and those of plugins."""

import hashlib
from pathlib import Path

from pipeline.extension_points import DATA_SOURCES, is_generated


def generate_data(root: str, output: Path) -> str:
    """The folder of a data set that is made, in `output/data`; any other root as it is.

    Raises:
        DataError: the source refuses what stands behind its name.
    """
    if not is_generated(root):
        return root
    source, _, rest = root.partition("://")
    name = source if not rest else f"{source}-{hashlib.sha256(rest.encode()).hexdigest()[:16]}"
    folder = output / "data" / name
    DATA_SOURCES[source](rest, folder)
    return str(folder)
