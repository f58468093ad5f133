"""NaN and infinite losses: the diagnosis file, and stopping, skipping or rewinding (`train.on_nan`)."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipeline.config import RunConfig
from pipeline.data.index import DatasetIndex
from pipeline.derived import Derived, derive
from pipeline.errors import UserError
from pipeline.train import checkpoint
from pipeline.train.checkpoint import checkpoint_root, read_state
from pipeline.train.events import Evaluated, Event, Step, Warned
from pipeline.train.meter import Meter
from pipeline.train.trainer import Trainer
from tests.train.settings import new_trainer, settings

Indexes = tuple[DatasetIndex, DatasetIndex]
FILES = ("model.safetensors", "optimizer.safetensors", "ema.safetensors")
TRAIN = {"log_every_steps": 1, "max_device_batch_size": 4, "epochs": 1}  # five steps of two micro-batches


def run(
    indexes: Indexes,
    run_dir: Path,
    bad_steps: tuple[int, ...] = (),
    rank: int = 0,
    resume: Path | None = None,
    **sections: dict,
) -> list[Event]:
    """Runs a training in which the first loss of each of the `bad_steps` is NaN on a rank; returns the events."""
    events: list[Event] = []
    defaults = {"train": TRAIN, "checkpoint": {"every_samples": 8, "keep_last": 99}, "ema": {"decay": 0.5}}
    merged = {name: defaults.get(name, {}) | sections.get(name, {}) for name in defaults | sections}
    config, derived = settings(*indexes, torch.distributed.get_world_size(), **merged)
    trainer = new_trainer(config, derived, indexes, run_dir, events.append, resume=resume)
    forward, first = trainer.criterion, trainer.state.samples_seen // 8 * derived.gradient_accumulation_steps
    count = iter(range(first, 10**9))

    def spoil(*inputs: torch.Tensor) -> torch.Tensor:
        step, micro = divmod(next(count), derived.gradient_accumulation_steps)
        is_bad = step + 1 in bad_steps and micro == 0 and torch.distributed.get_rank() == rank
        return forward(*inputs) * float("nan" if is_bad else 1)

    trainer.criterion = spoil  # type: ignore[assignment]
    trainer.fit()
    torch.distributed.barrier()  # rank 0 is the one that writes
    return events


def weights(run_dir: Path, samples: int, file: str = "model.safetensors") -> dict[str, torch.Tensor]:
    return load_file(checkpoint_root(run_dir) / checkpoint.folder_name(samples) / file)


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def warnings(events: list[Event]) -> list[str]:
    return [event.message for event in events if isinstance(event, Warned)]


def test_a_run_stops_before_the_step_and_writes_a_diagnosis_file(one_rank, indexes, tmp_path):
    """The learning rate is far too large: the first step breaks the weights, later ones overflow."""
    with pytest.raises(UserError) as error:
        run(indexes(), tmp_path, optim={"lr": 1e18, "momentum": 0.0})
    step = int(
        re.match(r"the training loss is NaN or infinite at step (\d) .* on rank 0: lower optim.lr", str(error.value))[1]
    )
    assert step in (2, 3)
    assert all(checkpoint.samples_of(f) < step * 8 for f in checkpoint.checkpoints(checkpoint_root(tmp_path)))
    (file,) = (tmp_path / "diagnosis").iterdir()
    assert str(file) in str(error.value)
    diagnosis = json.loads(file.read_text())
    assert (diagnosis["step"], diagnosis["on_ranks"], diagnosis["non_finite_weights"]) == (step, [0], [])
    (findings,) = diagnosis["ranks"]
    assert len(findings["losses"]) == 2 * step
    assert findings["losses"][-1] in ("nan", "inf")
    assert len(findings["samples"]) == 8
    assert all(Path(sample).is_file() for sample in findings["samples"])
    assert findings["first_layer"] in findings["largest_outputs"]
    assert findings["largest_outputs"]["features.conv0"] > 0


def test_a_skipped_step_changes_nothing(one_rank, indexes, tmp_path):
    """Weights, EMA, batch norm statistics and momentum are the same before and after it."""
    data = indexes()
    events = run(data, tmp_path, (2, 4), train=TRAIN | {"on_nan": "skip", "nan_limit": 2})
    assert [event.step for event in events if isinstance(event, Step)] == [1, 2, 3, 4, 5]
    assert [re.sub(", see .*", "", text) for text in warnings(events)] == [
        "the training loss is NaN or infinite at step 2 (epoch 0.20) on rank 0: the step is skipped (1 of at most 2",
        "the training loss is NaN or infinite at step 4 (epoch 0.60) on rank 0: the step is skipped (2 of at most 2",
    ]
    windows = [(e.skipped_steps, e.loss is None) for e in events if isinstance(e, Step)]
    assert windows == [(0, False), (1, True), (0, False), (1, True), (0, False)]
    for file in FILES:
        assert equal(weights(tmp_path, 16, file), weights(tmp_path, 8, file))
        assert equal(weights(tmp_path, 32, file), weights(tmp_path, 24, file))  # the EMA now lags behind the weights
        assert not equal(weights(tmp_path, 24, file), weights(tmp_path, 16, file))
    assert read_state(checkpoint_root(tmp_path) / checkpoint.folder_name(24))["non_finite_steps"] == 1
    rest = tmp_path / "rest"
    resume = checkpoint_root(tmp_path) / checkpoint.folder_name(24)
    run(data, rest, (2, 4), resume=resume, train=TRAIN | {"on_nan": "skip", "nan_limit": 2})
    assert equal(weights(rest, 40), weights(tmp_path, 40))
    with pytest.raises(UserError, match=r"at step 4 .* on rank 0, 1 times before in this run: lower optim.lr"):
        run(data, tmp_path / "fewer", (2, 4), train=TRAIN | {"on_nan": "skip", "nan_limit": 1})


def every_stage(indexes: Indexes, folder: Path) -> list[bool]:
    """Returns whether a bad step on rank 1 changed nothing, and a rewind restored everything, by ZeRO stage."""
    held = []
    for stage in range(4):
        run_dir, sections = folder / f"skip{stage}", {"engine": {"zero_stage": stage}, "optim": {"name": "adamw"}}
        run(indexes, run_dir, (3,), 1, train=TRAIN | {"on_nan": "skip"}, **sections)
        held += [equal(weights(run_dir, 24, f), weights(run_dir, 16, f)) for f in FILES]
        run_dir = folder / f"rewind{stage}"
        rare = {"every_samples": 16, "keep_last": 99}
        run(indexes, run_dir, (4,), 1, train=TRAIN | {"on_nan": "rewind"}, checkpoint=rare, **sections)
        held += [equal(weights(run_dir, 32, f), weights(run_dir, 16, f)) for f in FILES]
        held.append(not equal(weights(run_dir, 40), weights(run_dir, 32)))
    return held


@pytest.mark.slow
def test_all_ranks_agree_at_every_zero_stage(run_ranks, indexes, tmp_path):
    data = indexes()
    for held in run_ranks(2, every_stage, data, tmp_path):
        assert held == [True] * 28


def test_a_rewind_needs_a_checkpoint(one_rank, indexes, tmp_path):
    with pytest.raises(UserError, match="NaN or infinite at step 1 .* on rank 0: lower optim.lr"):
        run(indexes(), tmp_path, (1,), train=TRAIN | {"on_nan": "rewind"})


def spoiling_trainer(indexes: Indexes, run_dir: Path, events: list[Event], after: int, on_nan: str = "stop") -> Trainer:
    """Returns a trainer one of whose weights becomes NaN in the step after `after` samples."""
    train = TRAIN | {"on_nan": on_nan}
    config, derived = settings(*indexes, train=train, checkpoint={"every_samples": 8, "keep_last": 99})
    trainer = new_trainer(config, derived, indexes, run_dir, events.append)
    step = trainer.engine.step

    def spoiling(**options: bool) -> bool:
        applied = step(**options)
        if trainer.state.samples_seen == after:
            trainer.engine.module.classifier.weight.data[0, 0] = float("nan")
        return applied

    trainer.engine.step = spoiling  # type: ignore[method-assign]
    return trainer


@pytest.mark.parametrize(
    ("on_nan", "reason"),
    [("stop", ""), ("skip", ", and skipping steps cannot help: classifier.weight itself is NaN or infinite")],
)
def test_a_checkpoint_with_non_finite_weights_is_not_written(one_rank, indexes, tmp_path, on_nan, reason):
    events: list[Event] = []
    trainer = spoiling_trainer(indexes(), tmp_path, events, after=8, on_nan=on_nan)
    with pytest.raises(UserError, match=f"the training loss is NaN or infinite at step 3 .* on rank 0{reason}: lower"):
        trainer.fit()
    (text,) = warnings(events)
    assert "classifier.weight in model.safetensors holds NaN or infinite values" in text
    assert [checkpoint.samples_of(f) for f in checkpoint.checkpoints(checkpoint_root(tmp_path))] == [8]
    diagnosis = json.loads((tmp_path / "diagnosis" / "step-0000003.json").read_text())
    assert diagnosis["non_finite_weights"] == ["classifier.weight"]


def test_a_run_with_non_finite_last_weights_has_no_result(one_rank, indexes, tmp_path):
    events: list[Event] = []
    trainer = spoiling_trainer(indexes(), tmp_path, events, after=32)
    with pytest.raises(
        UserError,
        match=r"the run's last checkpoint .* could not be written: classifier.weight in model"
        r".safetensors holds NaN or infinite values. The training has diverged, and nothing is reg",
    ):
        trainer.fit()
    (evaluation,) = [event for event in events if isinstance(event, Evaluated)]
    assert (evaluation.result.non_finite, evaluation.result.top1_correct, evaluation.result.loss) == (13, 0, None)
    assert [checkpoint.samples_of(f) for f in checkpoint.checkpoints(checkpoint_root(tmp_path))] == [8, 16, 24, 32]


def test_the_mean_loss_ignores_skipped_steps(one_rank):
    meter = Meter(two_micro_batches(), torch.device("cpu"), print)
    for losses, end in (((1.0, 3.0), "applied"), ((100.0, float("nan")), "skipped"), ((5.0, 7.0), "overflowed")):
        meter.begin_step()
        for loss in losses:
            meter.add_loss(torch.tensor(loss))
        meter.end_forward()
        if end == "skipped":
            meter.skip_step()
            meter.reset()  # an evaluation: skipped steps before it still count
        else:
            meter.end_step(applied=end == "applied")
    metrics, _ = meter.read(3)
    assert (metrics.loss, metrics.skipped_steps) == (6.0, 2)
    meter.begin_step()
    meter.add_loss(torch.tensor(1.0))
    meter.add_loss(torch.tensor(1.0))
    meter.end_forward()
    meter.end_step(applied=True)
    assert meter.read(4)[0].skipped_steps == 0


def two_micro_batches() -> Derived:
    config = RunConfig.model_validate({"train": {"global_batch_size": 8, "max_device_batch_size": 4}})
    return derive(config, workers=1, cpus_per_worker=1, device="cpu", train_samples=40, val_samples=8, num_classes=3)


def test_fp16_gradients_that_overflow_in_every_step_end_the_run_and_change_nothing(one_rank, indexes, tmp_path):
    """The losses are finite, the gradients never are: no smaller loss scale helps."""
    data, events = indexes(), []
    config, derived = settings(*data, train=TRAIN | {"epochs": 2}, ema={"decay": 0.5})
    fp16 = derived.model_copy(update={"precision": "fp16"})
    trainer = new_trainer(config, fp16, data, tmp_path, events.append)
    scaler = trainer.engine.loss_scaler
    scaler.load_state_dict(scaler.state_dict() | {"scale": 4.0})
    trainer.engine.module.classifier.weight.register_hook(lambda gradient: gradient * float("inf"))
    trainer.engine.ema.module.classifier.weight.data += 1  # so that an update of the EMA shows
    before = [trainer.engine.full_state(), trainer.engine.ema_state()]
    with pytest.raises(
        UserError, match="fp16 gradients overflowed in every step up to step 3, although .* fallen to 0.5"
    ):
        trainer.fit()
    steps = [event for event in events if isinstance(event, Step)]
    assert [event.skipped_steps for event in steps] == [1, 1]
    assert all(event.loss is not None for event in steps)
    for then, now in zip(before, (trainer.engine.full_state(), trainer.engine.ema_state()), strict=True):
        assert all(torch.equal(then[name], now[name]) for name in then if "running" not in name and "num_" not in name)
