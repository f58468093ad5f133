"""Data sets that are generated locally: `data.root=digits://`, and data sources of plugins."""

import hashlib
from pathlib import Path

from pipeline.extension_points import DATA_SOURCES, is_generated


def generate_data(root: str, output: Path) -> str:
    """Generates a data source's data set below `output/data` and returns its folder; returns other roots unchanged.

    Raises:
        DataError: the source rejects the part after `://`.
    """
    if not is_generated(root):
        return root
    source, _, rest = root.partition("://")
    name = source if not rest else f"{source}-{hashlib.sha256(rest.encode()).hexdigest()[:16]}"
    folder = output / "data" / name
    DATA_SOURCES[source](rest, folder)
    return str(folder)
