"""Named values of a config key, to which plugins add their own."""

import difflib
import pkgutil
from collections.abc import Iterator, Mapping
from typing import Generic, TypeVar, cast

T = TypeVar("T")


class Choices(Mapping[str, T], Generic[T]):
    """What the names that a config key takes stand for; a value may be told as `module:name`, and is imported then."""

    def __init__(self, key: str, known: Mapping[str, T | str]) -> None:
        self.key, self._known = key, dict(known)

    def register(self, name: str, value: T) -> None:
        """Adds a name.

        Raises:
            ValueError: it stands for something else already.
        """
        if self._known.setdefault(name, value) is not value:
            raise ValueError(f"{self.key}={name} is there already: choose another name")

    def check(self, name: str) -> str:
        """The name, where it is known.

        Raises:
            ValueError: it is not; the message has the known ones and the nearest.
        """
        if name not in self._known:
            near = difflib.get_close_matches(name, self._known, n=1, cutoff=0.5)
            hint = f" (did you mean '{near[0]}'?)" if near else ""
            known = either([f"'{known}'" for known in self])
            raise ValueError(f"must be {known or 'a name that a plugin registers, and there is none'}{hint}")
        return name

    def __getitem__(self, name: str) -> T:
        value = self._known[name]
        return cast(T, pkgutil.resolve_name(value) if isinstance(value, str) else value)

    def __iter__(self) -> Iterator[str]:
        return iter(self._known)

    def __len__(self) -> int:
        return len(self._known)


def either(names: list[str], word: str = "or") -> str:
    """`a, b or c`."""
    return f" {word} ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
