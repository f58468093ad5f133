"""What can be added from outside, one table each: a plugin (`run.plugins`) registers its own under new names.

`docs/extending.md` shows each. Models are the sixth: timm's registry is their table.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pipeline.choices import Choices
from pipeline.schedules import BUILT_IN, Point, Shape

__all__ = [
    "AUGMENTATIONS",
    "DATA_SOURCES",
    "OPTIMIZERS",
    "SCHEDULES",
    "TRACKERS",
    "Optimizer",
    "Point",
    "Shape",
    "Sink",
]


@dataclass(frozen=True)
class Optimizer:
    """An optimizer of timm's factory, under the name `timm`; or what `build(groups, optim)` returns.

    `optim` is the section of the config, and `reads` are its keys that the optimizer takes besides `lr` and
    `weight_decay`. `moments` are the numbers that it keeps for each weight; with `whole_weights` it looks at weights as
    they are, not as the parts that ZeRO 1-3 cut them into.
    """

    reads: tuple[str, ...] = ()
    moments: int = 1
    whole_weights: bool = False
    timm: str | None = None
    build: Callable[[list[dict[str, Any]], Any], Any] | None = None


_MOMENTUM, _ADAM = ("momentum", "nesterov"), ("betas", "eps")
OPTIMIZERS: Choices[Optimizer] = Choices(
    "optim.name",
    {
        "sgd": Optimizer(_MOMENTUM, timm="momentum"),
        "adamw": Optimizer(_ADAM, moments=2, timm="adamw"),
        "lamb": Optimizer(_ADAM, moments=2, whole_weights=True, timm="lamb"),
        "lars": Optimizer(_MOMENTUM, whole_weights=True, timm="lars"),
        "muon": Optimizer((*_MOMENTUM, *_ADAM), whole_weights=True, timm="muon"),
    },
)

SCHEDULES: Choices[Shape] = Choices("schedule.name", BUILT_IN)

# `augment(images_BCHW, random_B4)` returns the images of a batch, normalized fp32 on their device, changed. Random
# numbers, four in [0, 1] for each image, are functions of seed, epoch and sample: so a resumed run repeats them.
AUGMENTATIONS: Choices[Callable[[Any, Any], Any]] = Choices("augment.custom", {})

# `write(rest, folder)` makes the data set of `data.root=NAME://rest`, unless it is there: class folders in
# `folder/train` and `folder/val`, or what `densenet data prepare` makes.
_WRITERS: dict[str, Callable[[str, Path], None] | str] = {"digits": "pipeline.data.digits:write_source"}
DATA_SOURCES: Choices[Callable[[str, Path], None]] = Choices("data.root", _WRITERS)


class Sink(Protocol):
    """A tracker: takes a run's records in order. See `pipeline.tracking.journal` for their kinds."""

    def deliver(self, records: list[dict[str, Any]]) -> None:
        """Stores records, all of one kind. After an error it gets the same ones again, a while later."""


# `open(config, run_dir)` makes the sink of a run.
TRACKERS: Choices[Callable[[Any, Path], Sink]] = Choices("tracking.custom", {})


def is_generated(root: str | None) -> bool:
    """Whether a data root stands for a data set that is made here (`digits://`)."""
    scheme, sign, _ = (root or "").partition("://")
    return bool(sign) and scheme in DATA_SOURCES
