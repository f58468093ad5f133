"""The journal of a run: all records for the tracking store in order, on disk first, as JSON Lines."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

_BATCH_LIMITS = {"metrics": 1000, "tags": 100}  # values per MLflow call; records of other kinds are sent one by one


class Journal:
    """Appends records to a file, and reads them from a byte offset on.

    A record truncated by a crash or a full disk is removed before the next one is written. A record that cannot be
    written is lost; `warn` is called once for the first one.
    """

    def __init__(self, file: Path, warn: Callable[[str], None]) -> None:
        self.file, self._warn = file, warn
        self._write_failed = False
        content = file.read_bytes() if file.exists() else b""
        self.size = content.rfind(b"\n") + 1

    def append(self, kind: str, **content: Any) -> None:
        """Appends a record."""
        line = (json.dumps({"kind": kind} | content) + "\n").encode()
        try:
            with self.file.open("ab") as stream:
                os.ftruncate(stream.fileno(), self.size)
                stream.write(line)
        except OSError as error:
            if not self._write_failed:
                self._warn(f"{self.file} cannot be written: {error.strerror}; records of this run are lost until then")
            self._write_failed = True
            return
        self.size += len(line)

    def read_batch(self, offset: int) -> tuple[list[dict[str, Any]], int]:
        """Returns the records of one kind from `offset` on that fit into one MLflow call, and the offset after them."""
        batch: list[dict[str, Any]] = []
        values = 0
        for record, end in self._read_from(offset):
            kind = record["kind"]
            values += len(record.get("values", ()))
            if batch and (kind not in _BATCH_LIMITS or kind != batch[0]["kind"] or values > _BATCH_LIMITS[kind]):
                break
            batch.append(record)
            offset = end
        return batch, offset

    def records(self, offset: int = 0) -> Iterator[dict[str, Any]]:
        """Yields all records from `offset` on."""
        return (record for record, _ in self._read_from(offset))

    def _read_from(self, offset: int) -> Iterator[tuple[dict[str, Any], int]]:
        with suppress(FileNotFoundError), self.file.open("rb") as stream:
            stream.seek(offset)
            while offset < self.size:
                line = stream.readline()
                offset += len(line)
                yield json.loads(line), offset
