"""Exact evaluation: counts every image once at any number of workers, without padding or dropping."""

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from numpy.typing import NDArray

from pipeline.data.dali import Loader
from pipeline.data.plan import EvalPlan, rank_eval_batches
from pipeline.evaluation.counts import EvalResult

_MAX_MATRIX_CLASSES = 2000  # a larger confusion matrix would take gigabytes
Forward = Callable[[torch.Tensor], torch.Tensor]


class AccuracyCounter:
    """Sums up correct predictions, losses and the confusion matrix of one rank, on the device."""

    def __init__(self, num_classes: int, device: torch.device) -> None:
        self.top5_k = min(5, num_classes)
        self._total = 0
        self._counts = torch.zeros(3, dtype=torch.int64, device=device)
        self._loss = torch.zeros((), dtype=torch.float64, device=device)
        self._matrix_KK: torch.Tensor | None = None
        if num_classes <= _MAX_MATRIX_CLASSES:
            self._matrix_KK = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)

    def add(self, logits_NK: torch.Tensor, labels_N: torch.Tensor) -> None:
        """Adds a batch: logits [N, K] and labels [N], int64. Images with non-finite logits count as wrong."""
        loss_N = F.cross_entropy(logits_NK, labels_N, reduction="none").double()
        finite_N = logits_NK.isfinite().all(dim=1) & loss_N.isfinite()
        topk_NK = logits_NK.topk(self.top5_k).indices
        correct_NK = (topk_NK == labels_N[:, None]) & finite_N[:, None]
        self._total += len(labels_N)
        self._counts += torch.stack([correct_NK[:, 0].sum(), correct_NK.sum(), finite_N.sum()])
        self._loss += torch.where(finite_N, loss_N, 0).sum()
        if self._matrix_KK is not None:
            self._matrix_KK.index_put_((labels_N, topk_NK[:, 0]), finite_N.long(), accumulate=True)

    def result(self) -> tuple[EvalResult, NDArray[np.int64] | None]:
        """Sums up all ranks (a collective); every rank returns the same result and confusion matrix [K, K]."""
        counts = torch.cat([self._counts, self._counts.new_tensor([self._total])])
        dist.all_reduce(counts)
        dist.all_reduce(self._loss)
        top1, top5, finite, total = counts.tolist()
        if self._matrix_KK is not None:
            dist.all_reduce(self._matrix_KK)
        matrix_KK = None if self._matrix_KK is None else self._matrix_KK.cpu().numpy()
        loss = self._loss.item() / finite if finite else None
        return EvalResult(total, top1, top5, self.top5_k, loss, total - finite), matrix_KK


@torch.no_grad()
def evaluate(
    forward: Forward,
    loader: Loader,
    plan: EvalPlan,
    batch_size: int,
    num_classes: int,
    forward_is_collective: bool,
) -> tuple[EvalResult, NDArray[np.int64] | None]:
    """Evaluates a model on the whole evaluation split, divided among the ranks (a collective).

    Returns the counts of correct predictions, and the confusion matrix [K, K] (true by predicted class) for up to
    2,000 classes; the matrix ignores images with non-finite logits.

    `forward` maps images [N, C, H, W] to logits [N, K], in evaluation mode. Ranks may have unequal numbers of batches:
    where a forward pass is itself collective (ZeRO stage 3), ranks without further batches join it with a blank image
    that does not count.
    """
    rank, workers = dist.get_rank(), dist.get_world_size()
    num_samples = len(loader.index)
    batches = rank_eval_batches(num_samples, rank, workers, batch_size)
    device = loader.device
    counter = AccuracyCounter(num_classes, device)
    done = 0
    for batch in loader.run(plan.batch(ids_B) for ids_B in batches):
        counter.add(forward(batch.images_NCHW), batch.labels_N)
        done += 1
    if forward_is_collective:
        most_batches = math.ceil(math.ceil(num_samples / workers) / batch_size)
        for _ in range(done, most_batches):
            forward(torch.zeros(1, loader.channels, plan.crop, plan.crop, device=device))
    return counter.result()
