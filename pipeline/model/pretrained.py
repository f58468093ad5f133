"""Where the models are that a run starts or learns from."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Pretrained:
    """Where a run's weights and its teacher are: files of weights, or folders with a model card."""

    weights: Path | None = None
    teacher: Path | None = None


NO_PRETRAINED = Pretrained()
