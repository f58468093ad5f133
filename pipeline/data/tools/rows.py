"""Rows of a table for one task: they are copied only when the task is sent to its process or runs."""

from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray


class Rows:
    """Some rows of a table in the index's schema: the tasks of millions of images share it until they are pickled.

    `rows_n` are their n positions, in the order of `table`; by default all.
    """

    def __init__(self, source: pa.Table, rows_n: NDArray[np.int64] | None = None) -> None:
        self._source, self._rows_n = source, rows_n

    def __len__(self) -> int:
        return len(self._source) if self._rows_n is None else len(self._rows_n)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles a copy of the rows, instead of the whole table."""
        return Rows, (self.table(),)

    def table(self) -> pa.Table:
        """Returns a copy of the rows, with paths as plain strings."""
        rows = self._source.take(np.arange(len(self)) if self._rows_n is None else self._rows_n)
        return rows.set_column(rows.schema.get_field_index("path"), "path", rows["path"].cast(pa.string()))

    @property
    def bytes(self) -> int:
        """Bytes of the images."""
        lengths_N = self._source["length"].to_numpy()
        return int(lengths_N.sum() if self._rows_n is None else lengths_N[self._rows_n].sum())
