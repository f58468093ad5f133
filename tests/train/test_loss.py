"""Training losses against formulas written out and against timm's."""

import pytest
import torch
import torch.nn.functional as F
from timm.loss import BinaryCrossEntropy

from pipeline.config_train import Loss
from pipeline.train.loss import Criterion

torch.manual_seed(0)
LOGITS_NK = torch.randn(6, 4)
LABELS_N = torch.tensor([0, 1, 2, 3, 1, 0])
SOFT_LABELS_NK = torch.rand(6, 4).softmax(dim=1)
IMAGES_NCHW = torch.randn(6, 3, 2, 2)


def value(targets: torch.Tensor, teacher: torch.nn.Module | None = None, /, **loss: object) -> float:
    return Criterion(Loss(**loss), 4, teacher)(LOGITS_NK, targets, IMAGES_NCHW).item()


def test_cross_entropy_of_labels_and_soft_labels_with_label_smoothing():
    assert value(LABELS_N) == pytest.approx(F.cross_entropy(LOGITS_NK, LABELS_N).item())
    one_hot_NK = F.one_hot(LABELS_N, 4).float()
    for targets, soft_labels_NK in ((LABELS_N, one_hot_NK), (SOFT_LABELS_NK, SOFT_LABELS_NK)):
        smooth_NK = 0.9 * soft_labels_NK + 0.1 / 4
        by_hand = -(smooth_NK * LOGITS_NK.log_softmax(dim=1)).sum(dim=1).mean()
        assert value(targets, label_smoothing=0.1) == pytest.approx(by_hand.item(), rel=1e-5)


def test_binary_cross_entropy_is_timms():
    assert value(LABELS_N, name="bce", label_smoothing=0.1) == pytest.approx(
        BinaryCrossEntropy(smoothing=0.1)(LOGITS_NK, LABELS_N).item(), rel=1e-5
    )
    assert value(SOFT_LABELS_NK, name="bce") == pytest.approx(
        BinaryCrossEntropy(smoothing=0)(LOGITS_NK, SOFT_LABELS_NK).item(), rel=1e-5
    )


def test_distillation_weights_the_labels_and_the_teachers_softened_logits():
    teacher = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 4))
    student_NK = (LOGITS_NK / 3).log_softmax(dim=1)
    teacher_NK = (teacher(IMAGES_NCHW) / 3).softmax(dim=1)
    divergence = (teacher_NK * (teacher_NK.log() - student_NK)).sum(dim=1).mean()
    expected = 0.3 * F.cross_entropy(LOGITS_NK, LABELS_N) + 0.7 * 9 * divergence
    got = value(LABELS_N, teacher, teacher="x", distillation_alpha=0.7, distillation_temperature=3)
    assert got == pytest.approx(expected.item(), rel=1e-5)


def test_a_student_with_its_teachers_logits_has_no_distillation_loss():
    class Same(torch.nn.Module):
        def forward(self, images_NCHW: torch.Tensor) -> torch.Tensor:
            return LOGITS_NK

    got = value(LABELS_N, Same(), teacher="x", distillation_alpha=1, distillation_temperature=2)
    assert got == pytest.approx(0, abs=1e-6)
