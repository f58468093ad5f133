"""Ignored files: counts by reason, with a few names, so that no file is skipped silently."""

from typing import Any

_NAMES = 3


class IgnoredFiles:
    """Counts ignored files by reason, a plural such as `hidden files`. It can be pickled."""

    def __init__(self) -> None:
        self._by_reason: dict[str, tuple[int, tuple[str, ...]]] = {}

    def __bool__(self) -> bool:
        return bool(self._by_reason)

    def add(self, reason: str, name: str) -> None:
        """Counts one file; keeps the first few names."""
        count, names = self._by_reason.get(reason, (0, ()))
        self._by_reason[reason] = count + 1, (*names, name)[:_NAMES]

    def merge(self, other: "IgnoredFiles") -> None:
        """Adds the counts and names of `other`."""
        for reason, (more, others) in other._by_reason.items():
            count, names = self._by_reason.get(reason, (0, ()))
            self._by_reason[reason] = count + more, (names + others)[:_NAMES]

    def to_json(self) -> dict[str, Any]:
        """Returns a JSON object, for `from_json`."""
        return dict(self._by_reason)

    @staticmethod
    def from_json(by_reason: dict[str, Any]) -> "IgnoredFiles":
        """Returns the counts and names of `to_json`."""
        ignored = IgnoredFiles()
        ignored._by_reason = {reason: (count, tuple(names)) for reason, (count, names) in by_reason.items()}
        return ignored

    def counts(self) -> dict[str, int]:
        """Returns the number of files for each reason."""
        return {reason: count for reason, (count, _) in sorted(self._by_reason.items())}

    def lines(self, exclude: str | None = None) -> list[str]:
        """Returns a line for each reason except `exclude`: `4 hidden files: a/.x.jpg, b/.y.jpg, c/.z.jpg, ...`."""
        return [
            f"{count:,} {reason}: {', '.join(names)}{', ...' if count > len(names) else ''}"
            for reason, (count, names) in sorted(self._by_reason.items())
            if reason != exclude
        ]
