"""Where the models are that a run starts or learns from."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config import MAX_PIXELS


@dataclass(frozen=True)
class Sources:
    """Where a run's weights and its teacher are: files of weights, or folders with a model card."""

    weights: Path | None = None
    teacher: Path | None = None


NO_SOURCES = Sources()


def read_card(folder: Path) -> dict[str, Any]:
    """The card of a checkpoint's or a registered model's folder."""
    card = json.loads((folder / "model.json").read_text(encoding="utf-8"))
    return {"max_pixels": MAX_PIXELS} | card  # of models that were made before the limit could be set
