"""Registries: the named implementations of a config key, to which plugins add their own."""

import difflib
import pkgutil
from collections.abc import Iterator, Mapping
from typing import Generic, TypeVar, cast

from pipeline.formatting import join_names

T = TypeVar("T")


class Registry(Mapping[str, T], Generic[T]):
    """Maps the allowed names of a config key to values; a value given as `module:name` is imported on first access."""

    def __init__(self, key: str, entries: Mapping[str, T | str]) -> None:
        self.key, self._entries = key, dict(entries)

    def register(self, name: str, value: T) -> None:
        """Adds an entry.

        Raises:
            ValueError: the name is already registered for another value.
        """
        if self._entries.setdefault(name, value) is not value:
            raise ValueError(f"{self.key}={name} is already registered: choose another name")

    def check(self, name: str) -> str:
        """Returns the name if it is registered.

        Raises:
            ValueError: it is unknown; the message lists the registered names and suggests the closest one.
        """
        if name not in self._entries:
            near = difflib.get_close_matches(name, self._entries, n=1, cutoff=0.5)
            hint = f" (did you mean '{near[0]}'?)" if near else ""
            known = join_names([f"'{known}'" for known in self])
            raise ValueError(f"must be {known or 'a name that a plugin registers, and none is registered'}{hint}")
        return name

    def __getitem__(self, name: str) -> T:
        value = self._entries[name]
        return cast(T, pkgutil.resolve_name(value) if isinstance(value, str) else value)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)
