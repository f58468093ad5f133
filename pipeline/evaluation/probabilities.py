"""Class probabilities of a model for all images of a split, plain and with test-time augmentation (TTA)."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from pipeline.config_fields import Device
from pipeline.data.dali import Loader
from pipeline.data.index import DatasetIndex
from pipeline.data.plan import EvalPlan, rank_eval_batches
from pipeline.model.card import ModelCard, Transform
from pipeline.model.weights import load_model

# Test-time augmentations: positions of the crops (0: top or left, 1: bottom or right); each crop is also flipped.
CENTER = (0.5, 0.5)
VIEWS: dict[str, tuple[tuple[float, float], ...]] = {
    "flip": (CENTER,),
    "ten-crop": (CENTER, (0.0, 0.0), (0.0, 1.0), (1.0, 0.0), (1.0, 1.0)),
}


def model_probabilities(
    folder: Path,
    index: DatasetIndex,
    transform: Transform | None = None,
    *,
    views: str | None = None,
    batch_size: int = 64,
    progress: Callable[[int], None] = lambda images: None,
) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
    """Like `card_probabilities`, for the model in a folder with a model card."""
    return card_probabilities(
        load_model(folder),
        ModelCard.read(folder),
        index,
        transform,
        views=views,
        batch_size=batch_size,
        progress=progress,
    )


def card_probabilities(
    model: nn.Module,
    card: ModelCard,
    index: DatasetIndex,
    transform: Transform | None = None,
    *,
    views: str | None = None,
    batch_size: int = 64,
    progress: Callable[[int], None] = lambda images: None,
) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
    """Like `probabilities`, on the GPU if there is one; `transform` defaults to that of the model card."""
    return probabilities(
        model,
        index,
        transform or card.transform,
        views=views,
        device="cuda" if torch.cuda.is_available() else "cpu",
        channels=card.in_chans,
        threads=len(os.sched_getaffinity(0)),
        batch_size=batch_size,
        progress=progress,
    )


@torch.inference_mode()
def probabilities(
    model: nn.Module,
    index: DatasetIndex,
    transform: Transform,
    *,
    views: str | None,
    device: Device,
    channels: Literal[1, 3],
    threads: int,
    batch_size: int,
    progress: Callable[[int], None] = lambda images: None,
) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
    """Computes class probabilities [N, K] of all images in the index's order.

    Returns:
        Probabilities of the center crop, and probabilities averaged over the crops of `VIEWS[views]` and their
        horizontal flips as in Krizhevsky et al. (2012); None without `views`. An image with a NaN or infinite logit
        has NaN for all classes.

    The images are decoded again for each crop position. `progress` receives the number of images of each batch, for
    every crop position.
    """
    model = model.to(device).eval()
    anchors = VIEWS[views] if views else (CENTER,)
    plain: NDArray[np.float32] | None = None
    total: NDArray[np.float32] | None = None
    with Loader(
        index,
        device=device,
        device_id=torch.cuda.current_device() if device == "cuda" else None,
        threads=threads,
        max_batch_size=batch_size,
        interpolation=transform.interpolation,
        mean=transform.mean,
        std=transform.std,
        channels=channels,
    ) as loader:
        for anchor in anchors:
            plan = EvalPlan(index.widths_N, index.heights_N, transform.resize, transform.crop, anchor)
            for batch in loader.run(plan.batch(ids_B) for ids_B in rank_eval_batches(len(index), 0, 1, batch_size)):
                crop_NK = _softmax(model(batch.images_NCHW))
                if plain is None:
                    plain = np.zeros((len(index), crop_NK.shape[1]), np.float32)
                    total = np.zeros_like(plain) if views else None
                if anchor == CENTER:
                    plain[batch.ids_N] = crop_NK.cpu().numpy()
                if total is not None:
                    flipped_NK = _softmax(model(batch.images_NCHW.flip(3)))
                    total[batch.ids_N] += (crop_NK + flipped_NK).cpu().numpy() / (2 * len(anchors))
                progress(len(batch.ids_N))
    assert plain is not None
    return plain, total


def _softmax(logits_NK: torch.Tensor) -> torch.Tensor:
    finite_N1 = logits_NK.isfinite().all(dim=1, keepdim=True)
    return torch.where(finite_N1, logits_NK.float().softmax(dim=1), torch.nan)
