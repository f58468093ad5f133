"""Types of the config's keys: names, URIs, locations and numbers, and the base class of its sections."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from pipeline.formatting import parse_bytes
from pipeline.registry import Registry

Auto = Literal["auto"]

Device = Literal["cpu", "cuda"]

Interpolation = Literal["bilinear", "bicubic"]

MemoryMode = Literal["none", "activation-checkpointing", "shared-stats", "fused"]

Precision = Literal["fp32", "bf16", "fp16"]

Count = Annotated[int, Field(ge=1)]

Fraction = Annotated[float, Field(ge=0, le=1)]

Rgb = tuple[float, float, float]


def _plain_name(name: str) -> str:
    if not name or any(c in name for c in "/\\\0") or name.startswith("."):
        raise ValueError("must be a plain folder name: no slashes, no leading dot")
    return name


def _no_password(uri: str) -> str:
    if re.search(r"://[^/@:]*:[^/@]+@", uri):
        raise ValueError("must not contain a password, since configs are saved and logged: use environment variables")
    return uri


def _number_of_bytes(size: int | str) -> int | str:
    if parse_bytes(str(size)) < 1:
        raise ValueError("must be at least 1 byte")
    return size


def valid_by(error_of: Callable[[str], str | None]) -> AfterValidator:
    """Returns a validator that rejects a name for which `error_of` returns an error."""

    def check(name: str) -> str:
        error = error_of(name)
        if error is not None:
            raise ValueError(error)
        return name

    return AfterValidator(check)


def registered(registry: Registry[Any]) -> AfterValidator:
    """Returns a validator that rejects a name that a registry does not have."""
    return AfterValidator(registry.check)


Name = Annotated[str, AfterValidator(_plain_name)]

Uri = Annotated[str, AfterValidator(_no_password)]

ByteSize = Annotated[int | str, AfterValidator(_number_of_bytes)]  # as given: an integer, or text such as 200GB


@dataclass(frozen=True)
class Location:
    """Marks a key whose value is a path or URI; `pipeline.locations` finds them.

    All nodes must see the same `input` and `output`; `local` is on each node's own disk, `store` is an MLflow store.
    Values for which `matches` is false are not locations.
    """

    kind: Literal["input", "output", "local", "store"]
    matches: Callable[[str], bool] = lambda value: True


class Section(BaseModel):
    """A section of the config: immutable, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
