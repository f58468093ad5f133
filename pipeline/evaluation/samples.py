"""Sample predictions of a model with thumbnails, for visual inspection."""

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.data.images import decode, to_rgb
from pipeline.data.index import DatasetIndex
from pipeline.evaluation.labels import map_labels
from pipeline.evaluation.probabilities import model_probabilities
from pipeline.evaluation.scores import NO_CLASS, best_class
from pipeline.model.card import ModelCard

_CANDIDATES = 96  # images
_SIDE = 128  # pixels


def sample_predictions(folder: Path, index: DatasetIndex, count: int = 12) -> list[dict[str, Any]]:
    """Returns up to `count` wrong and up to `count` correct predictions among 96 evenly spaced images.

    Each entry has `image` (JPEG in base64, at most 128 pixels), `label`, and `predicted`: the three most probable
    classes with their probabilities, best first. Wrong predictions come first, in descending confidence. Images with
    NaN outputs are excluded.
    """
    rows = np.unique(np.linspace(0, len(index) - 1, min(_CANDIDATES, len(index))).astype(np.int64))
    subset = index.subset(rows)
    classes = ModelCard.read(folder).classes
    probabilities_NK, _ = model_probabilities(folder, subset)
    labels_N, best_N = map_labels(subset, classes), best_class(probabilities_NK)
    order = np.argsort(-probabilities_NK.max(axis=1), kind="stable")
    order = order[best_N[order] != NO_CLASS]
    wrong, correct = ([i for i in order if (best_N[i] == labels_N[i]) == match][:count] for match in (False, True))
    return [
        {
            "image": _thumbnail(subset, int(i)),
            "label": classes[labels_N[i]],
            "predicted": [
                (classes[k], float(probabilities_NK[i, k])) for k in np.argsort(-probabilities_NK[i], kind="stable")[:3]
            ],
        }
        for i in (*wrong, *correct)
    ]


def _thumbnail(index: DatasetIndex, sample: int) -> str:
    pixels = int(index.widths_N[sample]) * int(index.heights_N[sample])  # opening the index checked the limit
    small = to_rgb(decode(index.read(sample).tobytes(), pixels)).convert("RGB")
    small.thumbnail((_SIDE, _SIDE))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=85)
    return base64.b64encode(buffer.getvalue()).decode()
