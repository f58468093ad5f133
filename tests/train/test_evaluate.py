"""Exact evaluation: the same counts at any world size, and top-k with few classes."""

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms import functional as tv

from pipeline.data.dali import Loader
from pipeline.data.index import DatasetIndex
from pipeline.data.plan import EvalPlan
from pipeline.evaluation.counts import EvalResult
from pipeline.model.densenet import create
from pipeline.train.engine import Engine
from pipeline.train.evaluate import AccuracyCounter, evaluate
from tests.train.settings import settings


def fixed_model(classes: int) -> torch.nn.Module:
    """Random weights whose running statistics fit the images, so that its predictions vary."""
    torch.manual_seed(1)
    model = create("densenet_tiny", classes)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for _ in range(5):
            model(torch.randn(16, 3, 32, 32, generator=generator))
    return model


def evaluate_rank(train_index: DatasetIndex, val_index: DatasetIndex, batch_size: int, stage: int) -> EvalResult:
    workers = torch.distributed.get_world_size()
    config, derived = settings(
        train_index, val_index, workers, train={"global_batch_size": 2 * workers}, engine={"zero_stage": stage}
    )
    engine = Engine(config, derived, fixed_model(derived.num_classes), torch.device("cpu"))
    with Loader(
        val_index,
        device="cpu",
        device_id=None,
        threads=1,
        max_batch_size=batch_size,
        interpolation="bilinear",
        mean=config.data.mean,
        std=config.data.std,
    ) as loader:
        plan = EvalPlan(val_index.widths_N, val_index.heights_N, 32, 32)
        engine.train(False)
        result, matrix_KK = evaluate(
            engine.forward, loader, plan, batch_size, derived.num_classes, engine.forward_is_collective
        )
        assert matrix_KK.sum() == result.total
        assert matrix_KK.trace() == result.top1_correct
        return result


def plain_count(val_index: DatasetIndex, classes: int) -> EvalResult:
    """Evaluates one image at a time with PIL and plain PyTorch."""
    model = fixed_model(classes).eval()
    config, _ = settings(val_index, val_index)
    top1 = top5 = 0
    loss = 0.0
    for i, label in enumerate(val_index.labels_N.tolist()):
        with Image.open(val_index.path(i)) as image:
            image = tv.normalize(tv.to_tensor(image.convert("RGB")), config.data.mean, config.data.std)
        with torch.no_grad():
            logits_1K = model(image[None])
        best = logits_1K[0].topk(min(5, classes)).indices.tolist()
        top1 += best[0] == label
        top5 += label in best
        loss += F.cross_entropy(logits_1K, torch.tensor([label])).item()
    return EvalResult(len(val_index), top1, top5, min(5, classes), loss / len(val_index))


@pytest.mark.slow
def test_counts_over_103_images_are_the_same_for_1_2_3_and_7_workers(run_ranks, indexes):
    train_index, val_index = indexes(val=103, classes=8)
    expected = plain_count(val_index, 8)
    assert expected.total == 103
    assert 0 < expected.top1_correct < expected.top5_correct < 103  # neither all wrong nor all right
    for workers, batch_size in ((1, 16), (2, 7), (3, 8), (7, 4)):
        for result in run_ranks(workers, evaluate_rank, train_index, val_index, batch_size, 1):
            assert (result.total, result.top1_correct, result.top5_correct, result.top5_k) == (
                expected.total,
                expected.top1_correct,
                expected.top5_correct,
                5,
            ), workers
            assert result.loss == pytest.approx(expected.loss, rel=1e-5)


@pytest.mark.slow
def test_ranks_with_unequal_batches_do_not_hang_when_weights_are_sharded(run_ranks, indexes):
    train_index, val_index = indexes(val=9, classes=3)
    expected = plain_count(val_index, 3)
    for result in run_ranks(2, evaluate_rank, train_index, val_index, 4, 3):  # one batch on rank 0, two on rank 1
        assert (result.total, result.top1_correct) == (9, expected.top1_correct)


def test_top5_with_fewer_than_five_classes_counts_all(one_rank):
    counter = AccuracyCounter(3, torch.device("cpu"))
    counter.add(torch.tensor([[3.0, 2.0, 1.0], [1.0, 2.0, 3.0]]), torch.tensor([0, 0]))
    result, matrix_KK = counter.result()
    assert (result.total, result.top1_correct, result.top5_correct, result.top5_k) == (2, 1, 2, 3)
    assert matrix_KK.tolist() == [[1, 0, 1], [0, 0, 0], [0, 0, 0]]


NAN, INF = float("nan"), float("inf")


def test_images_with_non_finite_logits_count_as_wrong(one_rank):
    """`topk` sorts NaN first, so class 0 would count as correct."""
    counter = AccuracyCounter(3, torch.device("cpu"))
    logits_NK = torch.tensor([[NAN, NAN, NAN], [INF, 0.0, 0.0], [0.0, -INF, 0.0], [3.0, 2.0, 1.0]])
    counter.add(logits_NK, torch.tensor([0, 0, 0, 0]))
    result, matrix_KK = counter.result()
    assert (result.total, result.top1_correct, result.top5_correct, result.non_finite) == (4, 1, 1, 3)
    assert result.loss == pytest.approx(F.cross_entropy(logits_NK[3:], torch.tensor([0])).item())
    assert matrix_KK.tolist() == [[1, 0, 0], [0, 0, 0], [0, 0, 0]]
    counter = AccuracyCounter(3, torch.device("cpu"))
    counter.add(logits_NK[:2], torch.tensor([0, 0]))
    assert counter.result()[0] == EvalResult(2, 0, 0, 3, None, 2)


def test_a_result_with_non_finite_outputs_is_never_the_better_one():
    good, worse = EvalResult(10, 5, 9, 5, 1.0), EvalResult(10, 5, 9, 5, 2.0)
    partly, none = EvalResult(10, 9, 9, 5, 0.1, 1), EvalResult(10, 0, 0, 5, None, 10)
    order = [good, worse, partly, none]
    for i, result in enumerate(order):
        assert not result.better_than(result)
        assert all(result.better_than(other) and not other.better_than(result) for other in order[i + 1 :])
