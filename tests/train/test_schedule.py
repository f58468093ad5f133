"""Learning rate schedules as functions of the samples seen."""

from itertools import pairwise

import pytest
import torch

from pipeline.config import RunConfig
from pipeline.derived import derive
from pipeline.train.schedule import learning_rate

BATCH, IMAGES = 10, 100


def learning_rates(**schedule: object) -> list[float]:
    config = RunConfig.model_validate(
        {
            "train": {"global_batch_size": BATCH, "epochs": 10},
            "optim": {"lr": 1.0},
            "schedule": schedule,
        }
    )
    d = derive(config, workers=1, cpus_per_worker=1, device="cpu", train_samples=IMAGES, val_samples=1, num_classes=2)
    return [learning_rate(config.schedule, d, step * BATCH) for step in range(d.total_steps)]


def test_step_drops_exactly_at_its_milestones():
    r = learning_rates(name="step", milestones=[3, 6], gamma=0.1)
    assert r[:30] == [1.0] * 30
    assert r[30:60] == pytest.approx([0.1] * 30)
    assert r[60:] == pytest.approx([0.01] * 40)


def test_warmup_starts_low_and_reaches_the_peak_with_its_last_step():
    r = learning_rates(name="step", milestones=[9], warmup_epochs=2)
    assert r[:20] == pytest.approx([(i + 1) / 20 for i in range(20)])
    assert r[20] == 1.0


def test_cosine_falls_from_the_peak_to_almost_zero():
    r = learning_rates(name="cosine", warmup_epochs=1)
    assert max(r) == r[10] == 1.0
    assert r[10:] == sorted(r[10:], reverse=True)
    assert 0 < r[-1] < 0.001


def test_cosine_is_half_the_peak_in_the_middle():
    assert learning_rates(name="cosine")[50] == pytest.approx(0.5)


def test_linear_falls_in_a_line_to_its_end():
    r = learning_rates(name="linear", warmup_epochs=2, min_lr_ratio=0.1)
    assert r[19] == r[20] == 1.0
    assert r[60] == pytest.approx(0.55)
    steps = {round(a - b, 9) for a, b in pairwise(r[20:])}
    assert steps == {round(0.9 / 80, 9)}


def test_one_cycle_is_torchs():
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    peak = 0.3 * 100  # torch puts its peak at step pct_start * total_steps - 1
    other = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=1.0, total_steps=101, pct_start=31 / 101, final_div_factor=1e9, cycle_momentum=False
    )
    expected = []
    for _ in range(100):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        other.step()
    r = learning_rates(name="one-cycle", pct_start=0.3)
    assert r.index(max(r)) == peak
    assert r == pytest.approx(expected, abs=1e-6)


def test_the_learning_rate_depends_only_on_the_samples_seen():
    config = RunConfig.model_validate({"train": {"global_batch_size": BATCH, "epochs": 10}})
    d = derive(config, workers=1, cpus_per_worker=1, device="cpu", train_samples=IMAGES, val_samples=1, num_classes=2)
    forwards = [learning_rate(config.schedule, d, seen) for seen in range(0, 1000, 10)]
    assert forwards == [learning_rate(config.schedule, d, seen) for seen in reversed(range(0, 1000, 10))][::-1]
