"""What a source holds and is not taken: counted by reason, with a few names, so that nothing vanishes silently."""

_NAMES = 3


class IgnoredFiles:
    """Counts by reason, a plural that follows the number: `hidden files`. It can be sent to other processes."""

    def __init__(self) -> None:
        self._found: dict[str, tuple[int, tuple[str, ...]]] = {}

    def __bool__(self) -> bool:
        return bool(self._found)

    def add(self, reason: str, name: str) -> None:
        """Counts one more; the first few names are kept."""
        count, names = self._found.get(reason, (0, ()))
        self._found[reason] = count + 1, (*names, name)[:_NAMES]

    def merge(self, other: "IgnoredFiles") -> None:
        """Adds what another one has counted."""
        for reason, (more, others) in other._found.items():
            count, names = self._found.get(reason, (0, ()))
            self._found[reason] = count + more, (names + others)[:_NAMES]

    def counts(self) -> dict[str, int]:
        """How many there are of each reason."""
        return {reason: count for reason, (count, _) in sorted(self._found.items())}

    def lines(self, without: str | None = None) -> list[str]:
        """A line for each reason but one: `4 hidden files: a/.x.jpg, b/.y.jpg, c/.z.jpg, ...`."""
        return [
            f"{count:,} {reason}: {', '.join(names)}{', ...' if count > len(names) else ''}"
            for reason, (count, names) in sorted(self._found.items())
            if reason != without
        ]
