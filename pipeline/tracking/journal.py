"""What a run has to tell the tracking store, on disk first: one JSON object a line, in order."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

_LIMITS = {"metrics": 1000, "tags": 100}  # of one call to MLflow; records of other kinds go alone


class Journal:
    """Appends records to a file, and reads those after a place in it.

    A record that a crash or a full disk cut short is removed before the next one is written. One that cannot be written
    is lost, which `told` hears of once.
    """

    def __init__(self, file: Path, told: Callable[[str], None]) -> None:
        self.file, self._told = file, told
        self._full = False
        content = file.read_bytes() if file.exists() else b""
        self.size = content.rfind(b"\n") + 1

    def append(self, kind: str, **content: Any) -> None:
        """Adds a record."""
        line = (json.dumps({"kind": kind} | content) + "\n").encode()
        try:
            with self.file.open("ab") as stream:
                os.ftruncate(stream.fileno(), self.size)
                stream.write(line)
        except OSError as error:
            if not self._full:
                self._told(f"{self.file} cannot be written: {error.strerror}; records of this run are lost meanwhile")
            self._full = True
            return
        self.size += len(line)

    def read(self, place: int) -> tuple[list[dict[str, Any]], int]:
        """The records from `place` on that one call can send, all of a kind, and the place after them."""
        taken: list[dict[str, Any]] = []
        values = 0
        for record, end in self._from(place):
            kind = record["kind"]
            values += len(record.get("values", ()))
            if taken and (kind not in _LIMITS or kind != taken[0]["kind"] or values > _LIMITS[kind]):
                break
            taken.append(record)
            place = end
        return taken, place

    def records(self, place: int = 0) -> Iterator[dict[str, Any]]:
        """All records from `place` on."""
        return (record for record, _ in self._from(place))

    def _from(self, place: int) -> Iterator[tuple[dict[str, Any], int]]:
        with suppress(FileNotFoundError), self.file.open("rb") as stream:
            stream.seek(place)
            while place < self.size:
                line = stream.readline()
                place += len(line)
                yield json.loads(line), place
