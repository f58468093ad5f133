"""Which config keys hold places, as the schema marks them, and what a command makes of all of them."""

import re
from collections.abc import Callable, Iterator

from pipeline.config import Location, RunConfig, Section

_ADDRESS = re.compile(r"[a-z][a-z0-9+.:-]*:/")  # s3://..., models:/..., sqlite:///...


def is_uri(place: str) -> bool:
    """Whether a place is an address, and not a path of this machine."""
    return _ADDRESS.match(place) is not None


def locations(config: RunConfig) -> Iterator[tuple[str, Location, str]]:
    """Each place that is set: its key, what the schema says of it, and the value."""
    for key, mark, value in _marked(config):
        for place in value if isinstance(value, tuple) else (value,):
            if place is not None and mark.holds(place):
                yield key, mark, place


def with_locations(config: RunConfig, changed: Callable[[Location, str], str]) -> RunConfig:
    """The config with each place that is set replaced by `changed(mark, place)`."""

    def new(mark: Location, place: str) -> str:
        return changed(mark, place) if mark.holds(place) else place

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
