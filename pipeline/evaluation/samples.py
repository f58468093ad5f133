"""A model's answers to some images, with the images, to look at."""

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

_LOOKED_AT = 96
_SIDE = 128  # pixels


def sample_predictions(folder: Path, index: DatasetIndex, count: int = 12) -> list[dict[str, Any]]:
    """Up to `count` images that the model misses and as many that it hits, of 96 that are evenly spread.

    Each has `image` (JPEG in base64, at most 128 pixels), `label`, and `predicted`: the three most probable classes
    with their probabilities, best first. Those missed come first, the surest one before the others. Images for which
    the model gives NaN are left out.
    """
    rows = np.unique(np.linspace(0, len(index) - 1, min(_LOOKED_AT, len(index))).astype(np.int64))
    subset = index.subset(rows)
    classes = ModelCard.read(folder).classes
    given_NK, _ = model_probabilities(folder, subset)
    labels_N, best_N = map_labels(subset, classes), best_class(given_NK)
    order = np.argsort(-given_NK.max(axis=1), kind="stable")
    order = order[best_N[order] != NO_CLASS]
    missed, hit = ([i for i in order if (best_N[i] == labels_N[i]) == right][:count] for right in (False, True))
    return [
        {
            "image": _thumbnail(subset, int(i)),
            "label": classes[labels_N[i]],
            "predicted": [(classes[k], float(given_NK[i, k])) for k in np.argsort(-given_NK[i], kind="stable")[:3]],
        }
        for i in (*missed, *hit)
    ]


def _thumbnail(index: DatasetIndex, sample: int) -> str:
    pixels = int(index.widths_N[sample] * index.heights_N[sample])  # within the limit: the index was opened by it
    small = to_rgb(decode(index.read(sample).tobytes(), pixels)).convert("RGB")
    small.thumbnail((_SIDE, _SIDE))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=85)
    return base64.b64encode(buffer.getvalue()).decode()
