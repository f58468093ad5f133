"""Extension points: one registry each for optimizers, schedules, augmentations, data sources and trackers.

A plugin (`run.plugins`) registers its own under new names; `docs/extending.md` has an example of each. Models are
registered in timm.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pipeline.lr_schedules import BUILT_IN, LrSchedule, RunPosition
from pipeline.registry import Registry

__all__ = [
    "AUGMENTATIONS",
    "DATA_SOURCES",
    "OPTIMIZERS",
    "SCHEDULES",
    "TRACKERS",
    "LrSchedule",
    "Optimizer",
    "RunPosition",
    "Sink",
]


@dataclass(frozen=True)
class Optimizer:
    """An optimizer: timm's of the name `timm`, or what `build(param_groups, optim)` returns.

    Args:
        reads: The keys of `optim.*` that it uses in addition to `lr` and `weight_decay`.
        moments: Optimizer state per weight, in numbers.
        needs_full_weights: It computes on whole weight tensors, so ZeRO 1-3, which shard them, are refused.
        timm: The optimizer's name in timm.
        build: Takes torch's parameter groups and the config's `optim` section.
    """

    reads: tuple[str, ...] = ()
    moments: int = 1
    needs_full_weights: bool = False
    timm: str | None = None
    build: Callable[[list[dict[str, Any]], Any], Any] | None = None


_MOMENTUM, _ADAM = ("momentum", "nesterov"), ("betas", "eps")
OPTIMIZERS: Registry[Optimizer] = Registry(
    "optim.name",
    {
        "sgd": Optimizer(_MOMENTUM, timm="momentum"),
        "adamw": Optimizer(_ADAM, moments=2, timm="adamw"),
        "lamb": Optimizer(_ADAM, moments=2, needs_full_weights=True, timm="lamb"),
        "lars": Optimizer(_MOMENTUM, needs_full_weights=True, timm="lars"),
        "muon": Optimizer((*_MOMENTUM, *_ADAM), needs_full_weights=True, timm="muon"),
    },
)

SCHEDULES: Registry[LrSchedule] = Registry("schedule.name", BUILT_IN)

# `augment(images_BCHW, random_B4)` takes a batch of normalized fp32 images and returns the augmented batch on the same
# device. The four random numbers in [0, 1] per image are functions of seed, epoch and sample, so a resumed run repeats
# them.
AUGMENTATIONS: Registry[Callable[[Any, Any], Any]] = Registry("augment.custom", {})

# `write(rest, folder)` writes the data set of `data.root=NAME://rest` unless it exists: class folders in `folder/train`
# and `folder/val`, or the output format of `densenet data prepare`.
_WRITERS: dict[str, Callable[[str, Path], None] | str] = {"digits": "pipeline.data.digits:write_source"}
DATA_SOURCES: Registry[Callable[[str, Path], None]] = Registry("data.root", _WRITERS)


class Sink(Protocol):
    """A tracker's destination: receives a run's records in order. `pipeline.tracking.journal` lists their kinds."""

    def deliver(self, records: list[dict[str, Any]]) -> None:
        """Stores records, all of one kind. After an error, the same records are delivered again later."""


# `open(config, run_dir)` returns the sink of a run.
TRACKERS: Registry[Callable[[Any, Path], Sink]] = Registry("tracking.custom", {})


def is_generated(root: str | None) -> bool:
    """Returns whether a data root is a generated data set, such as `digits://`, not stored data."""
    scheme, sign, _ = (root or "").partition("://")
    return bool(sign) and scheme in DATA_SOURCES
