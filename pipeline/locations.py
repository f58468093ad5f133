"""Finds and rewrites the paths and URIs of a config; the schema marks their keys with `Location`."""

import re
from collections.abc import Callable, Iterator

from pipeline.config import RunConfig
from pipeline.config_fields import Location, Section

_URI = re.compile(r"[a-z][a-z0-9+.:-]*:/")  # s3://..., models:/..., sqlite:///...


def is_uri(location: str) -> bool:
    """Returns whether a location is a URI, not a local path."""
    return _URI.match(location) is not None


def locations(config: RunConfig) -> Iterator[tuple[str, Location, str]]:
    """Yields the key, the mark and the value of each path or URI that is set."""
    for key, mark, value in _marked(config):
        for location in value if isinstance(value, tuple) else (value,):
            if location is not None and mark.matches(location):
                yield key, mark, location


def with_locations(config: RunConfig, replace: Callable[[Location, str], str]) -> RunConfig:
    """Returns the config with each path or URI that is set replaced by `replace(mark, location)`."""

    def new(mark: Location, location: str) -> str:
        return replace(mark, location) if mark.matches(location) else location

    sections: dict[str, dict[str, object]] = {}
    for key, mark, value in _marked(config):
        section, name = key.split(".")
        if value is not None:
            new_value = tuple(new(mark, p) for p in value) if isinstance(value, tuple) else new(mark, value)
            sections.setdefault(section, {})[name] = new_value
    parts = {name: getattr(config, name).model_copy(update=update) for name, update in sections.items()}
    return config.model_copy(update=parts)


def _marked(config: RunConfig) -> Iterator[tuple[str, Location, str | tuple[str, ...] | None]]:
    for name in RunConfig.model_fields:
        section = getattr(config, name)
        if isinstance(section, Section):
            for key, field in type(section).model_fields.items():
                for mark in field.metadata:
                    if isinstance(mark, Location):
                        yield f"{name}.{key}", mark, getattr(section, key)
