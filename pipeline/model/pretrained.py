"""Locations of the pretrained weights and of the knowledge distillation teacher of a run."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Pretrained:
    """Paths of pretrained weights and teacher: weights files, or folders with a model card."""

    weights: Path | None = None
    teacher: Path | None = None


NO_PRETRAINED = Pretrained()
