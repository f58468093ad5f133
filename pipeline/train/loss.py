"""Training losses: cross-entropy or binary cross-entropy, label smoothing and knowledge distillation."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from pipeline.config_train import Loss

Teacher = Callable[[torch.Tensor], torch.Tensor]


class Criterion:
    """The mean loss of a micro-batch.

    With a teacher (knowledge distillation), which maps the same images to logits without gradients, the loss is
    `(1 - alpha) L(labels) + alpha T^2 KL(teacher / T || student / T)` (Hinton et al. 2015, arXiv 1503.02531).
    """

    def __init__(self, loss: Loss, num_classes: int, teacher: Teacher | None = None) -> None:
        self._loss, self._num_classes, self._teacher = loss, num_classes, teacher

    def __call__(self, logits_NK: torch.Tensor, targets: torch.Tensor, images_NCHW: torch.Tensor) -> torch.Tensor:
        """Returns a scalar; `targets` are labels (int64 [N]) or soft labels (fp32 [N, K], from mixup or CutMix)."""
        if self._loss.name == "bce":
            loss = self._binary(logits_NK, targets)
        else:
            loss = F.cross_entropy(logits_NK, targets, label_smoothing=self._loss.label_smoothing)
        if self._teacher is None:
            return loss
        teacher_NK = self._teacher(images_NCHW)
        t, alpha = self._loss.distillation_temperature, self._loss.distillation_alpha
        divergence = F.kl_div(
            F.log_softmax(logits_NK / t, dim=1),
            F.log_softmax(teacher_NK / t, dim=1),
            reduction="batchmean",
            log_target=True,
        )
        return (1 - alpha) * loss + alpha * t**2 * divergence

    def _binary(self, logits_NK: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Binary cross-entropy per class, mean over images and classes (Wightman et al. 2021, arXiv 2110.00476)."""
        targets_NK = F.one_hot(targets, self._num_classes).float() if targets.ndim == 1 else targets
        smoothing = self._loss.label_smoothing
        return F.binary_cross_entropy_with_logits(
            logits_NK, targets_NK * (1 - smoothing) + smoothing / self._num_classes
        )
