"""Rows of a task: pickled alone, without the table that all tasks share."""

import pickle

import numpy as np

from pipeline.data.tables import table_of
from pipeline.data.tools.rows import Rows


def test_pickled_rows_are_a_copy_of_these_rows_only():
    count = 100_000
    table = table_of({"path": ["a.tar"] * count, "name": [f"{i}" for i in range(count)], "length": np.arange(count)})
    for rows in (Rows(table, np.array([7, 3])), Rows(table.slice(3, 2))):
        content = pickle.dumps(rows)
        assert len(content) < 10_000
        copy = pickle.loads(content)
        assert (len(copy), copy.bytes, copy.table()) == (2, rows.bytes, rows.table())
        assert set(copy.table()["path"].to_pylist()) == {"a.tar"}
    assert Rows(table, np.array([7, 3])).table()["name"].to_pylist() == ["7", "3"]
