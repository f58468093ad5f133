"""A resumed run equals an uninterrupted one, at any ZeRO stage and number of ranks; when checkpoints are written."""

import itertools
import json
import resource
import shutil
import signal
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.multiprocessing import ProcessExitedException

from pipeline.data.index import DatasetIndex
from pipeline.errors import UserError
from pipeline.train import checkpoint
from pipeline.train.checkpoint import best_checkpoint, checkpoint_root
from pipeline.train.events import Event, Resumed, Step, Stopped, Warned
from pipeline.train.state import create_engine
from pipeline.train.watchdog import Watchdog
from tests.train.settings import CPU, new_trainer, settings

Indexes = tuple[DatasetIndex, DatasetIndex]
WEIGHTS = ("model.safetensors", "ema.safetensors", "optimizer.safetensors")
MIDDLE, END = 24, 64  # samples; an epoch has 40, a step 8
PLAN: dict[str, dict] = {
    "train": {"epochs": 1.6, "log_every_steps": 1},
    "checkpoint": {"every_samples": MIDDLE, "keep_last": 9},
    "ema": {"decay": 0.9},
    "model": {"drop_rate": 0.2},
}


def run(
    indexes: Indexes, run_dir: Path, resume: Path | None = None, options: dict | None = None, **sections: dict
) -> list[Event]:
    """Trains the plan, or the rest of it after `resume`, on each rank; returns the events."""
    events: list[Event] = []
    merged = {name: PLAN.get(name, {}) | sections.get(name, {}) for name in PLAN | sections}
    workers = torch.distributed.get_world_size()
    config, derived = settings(*indexes, workers, **merged)
    new_trainer(config, derived, indexes, run_dir, events.append, resume=resume, **(options or {})).fit()
    return events


def at(run_dir: Path, samples: int) -> Path:
    return checkpoint_root(run_dir) / checkpoint.folder_name(samples)


def losses(events: list[Event]) -> dict[int, float]:
    return {e.step: e.loss for e in events if isinstance(e, Step)}


def every_case(indexes: Indexes, folder: Path) -> list[str]:
    """Returns the cases in which the resumed run does not equal the uninterrupted one bit for bit."""
    different = []
    optimizers = [{"name": "sgd"}, {"name": "adamw", "lr": 0.001}]
    cases = [(stage, 4, optimizers[0]) for stage in range(4)]
    cases += [(stage, 8, optimizers[1]) for stage in (1, 3)]
    cases += [(0, 8, {"name": name, "lr": 0.01}) for name in ("lamb", "muon")]
    cases += [(0, 8, {"name": "sgd"})]  # the last one in fp16
    for number, (stage, device_batch, optim) in enumerate(cases):
        whole, rest = folder / f"whole{number}", folder / f"rest{number}"
        sections = {"engine": {"zero_stage": stage}, "optim": optim}
        precision = "fp16" if number == len(cases) - 1 else "fp32"
        train = {"train": PLAN["train"] | {"max_device_batch_size": device_batch, "precision": precision}}
        first = run(indexes, whole, **sections, **train)
        second = run(indexes, rest, at(whole, MIDDLE), **sections, **train)
        same = losses(second) == {step: loss for step, loss in losses(first).items() if step > MIDDLE // 8}
        for file in WEIGHTS:
            ends = [load_file(at(run_dir, END) / file) for run_dir in (whole, rest)]
            same = same and ends[0].keys() == ends[1].keys()
            same = same and all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])
        if not same:
            different.append(f"stage {stage}, {device_batch} images at once, {optim['name']}, {precision}")
    return different


@pytest.mark.slow
def test_a_resumed_run_equals_an_uninterrupted_one_at_every_zero_stage_with_every_optimizer(
    run_ranks, indexes, tmp_path
):
    assert run_ranks(1, every_case, indexes(), tmp_path) == [[]]


FROZEN = {"finetune": {"freeze_batch_norm": True}, "model": {}, "optim": {"name": "adamw", "lr": 0.001}}


def part(indexes: Indexes, run_dir: Path, stage: int, resume: Path | None = None) -> None:
    run(indexes, run_dir, resume, engine={"zero_stage": stage}, **FROZEN | {"model": {"drop_rate": 0.0}})


@pytest.mark.slow
def test_a_run_resumes_at_another_zero_stage_and_number_of_ranks(run_ranks, indexes, tmp_path):
    """The result is the same to round-off with frozen norms, whose statistics depend on the ranks' batches."""
    data = indexes()
    run_ranks(1, part, data, tmp_path / "one", 0)
    run_ranks(2, part, data, tmp_path / "two", 3, at(tmp_path / "one", MIDDLE))
    run_ranks(1, part, data, tmp_path / "back", 2, at(tmp_path / "two", 2 * MIDDLE))
    run_ranks(2, part, data, tmp_path / "again", 1, at(tmp_path / "one", MIDDLE))
    for name, file in itertools.product(("two", "back", "again"), WEIGHTS):
        ours, expected = (load_file(at(tmp_path / run, END) / file) for run in (name, "one"))
        assert ours.keys() == expected.keys()
        for key, value in expected.items():
            assert torch.allclose(ours[key], value, rtol=1e-3, atol=1e-6), (name, file, key)


def test_should_stop_ends_the_run_after_a_checkpoint_from_which_it_resumes(one_rank, indexes, tmp_path):
    data = indexes()
    whole = run(data, tmp_path / "whole")
    answers = iter([False, False, False, False, True])
    stopped = run(data, tmp_path / "stopped", options={"should_stop": lambda: next(answers)})
    assert Stopped(40) in stopped
    assert checkpoint.verify(at(tmp_path / "stopped", 40)) is None
    rest = run(data, tmp_path / "stopped", at(tmp_path / "stopped", 40))
    assert losses(stopped) | losses(rest) == losses(whole)


def test_should_save_writes_a_checkpoint_and_the_run_continues(one_rank, indexes, tmp_path):
    answers = iter([False, False, True, *[False] * 9])
    rarely = {"every_samples": None, "keep_last": 9}
    run(indexes(), tmp_path, options={"should_save": lambda: next(answers)}, checkpoint=rarely)
    assert {24, END} <= {checkpoint.samples_of(f) for f in checkpoint.checkpoints(checkpoint_root(tmp_path))}


def test_every_minutes_keep_last_and_keep_every_epochs(one_rank, indexes, tmp_path):
    often = {"every_minutes": 1e-9, "every_samples": None, "keep_last": 1, "keep_every_epochs": 1}
    run(indexes(), tmp_path, checkpoint=often)
    kept = {checkpoint.samples_of(folder) for folder in checkpoint.checkpoints(checkpoint_root(tmp_path))}
    assert kept >= {40, END}, "the first of the second epoch, and the last"
    assert len(kept) <= 3, "and the best"


def full_disk(indexes: Indexes, run_dir: Path) -> tuple[list[str], str, list[str]]:
    """Returns warnings, the final error and the remaining files, with a limit of 100 kB per file."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    events: list[Event] = []
    config, derived = settings(*indexes, **PLAN)
    trainer = new_trainer(config, derived, indexes, run_dir, events.append)
    error = ""
    try:
        trainer.fit()
    except UserError as caught:
        error = str(caught)
    warnings = [event.message for event in events if isinstance(event, Warned)]
    return warnings, error, [str(path) for path in checkpoint_root(run_dir).iterdir()]


@pytest.mark.slow
def test_a_full_disk_gives_warnings_and_an_error_only_at_the_end(run_ranks, indexes, tmp_path):
    ((warnings, error, left),) = run_ranks(1, full_disk, indexes(), tmp_path)
    assert len(warnings) == 4, "at 24, 40, 48 and 64 samples"
    for warning in warnings:
        assert "could not be written: " in warning
        assert "File too large" in warning
        assert "training continues" in warning
    assert "the run's last checkpoint" in error
    assert "start the run again" in error
    assert left == []


def test_a_deleted_checkpoint_folder_is_created_again(one_rank, indexes, tmp_path):
    """Deleted between and during checkpoint writes: the result is the same."""
    data, root, removed = indexes(), checkpoint_root(tmp_path / "run"), []

    def vanish() -> bool:
        if checkpoint.checkpoints(root) and len(removed) < 3:
            removed.append(root)
            shutil.rmtree(root, ignore_errors=True)
        return False

    run(data, tmp_path / "run", options={"should_stop": vanish})
    assert removed
    run(data, tmp_path / "whole")
    kept = checkpoint.checkpoints(root)
    assert kept[-1] == at(tmp_path / "run", END)
    assert all(checkpoint.verify(folder) is None for folder in kept)
    ends = [load_file(at(tmp_path / name, END) / "model.safetensors") for name in ("run", "whole")]
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])
    assert best_checkpoint(tmp_path / "run") in kept


def test_allow_changed_accepts_a_changed_setting(one_rank, indexes, tmp_path):
    data = indexes()
    run(data, tmp_path / "first")
    middle = at(tmp_path / "first", MIDDLE)
    with pytest.raises(UserError, match=r"run.seed was 5 and is 6.* list the key in checkpoint.allow_changed"):
        run(data, tmp_path / "second", middle, run={"seed": 6})
    allowed = PLAN["checkpoint"] | {"allow_changed": ["run.seed"]}
    events = run(data, tmp_path / "second", middle, run={"seed": 6}, checkpoint=allowed)
    assert isinstance(events[0], Resumed)


def test_a_run_does_not_resume_on_data_that_has_grown(one_rank, indexes, tmp_path):
    train, val = indexes()
    run((train.subset(np.arange(len(train) - 4)), val), tmp_path / "first")
    with pytest.raises(
        UserError, match=r"training images was \d+ and is \d+; data was .* \(with model.weights=.* weights\)"
    ):
        run((train, val), tmp_path / "second", at(tmp_path / "first", MIDDLE))


@pytest.mark.slow
def test_a_run_in_an_earlier_sample_order_is_not_resumed_but_its_weights_are_read(one_rank, indexes, tmp_path):
    data = indexes()
    run(data, tmp_path / "first")
    middle = at(tmp_path / "first", MIDDLE)
    state = checkpoint.read_state(middle)
    del state["identity"]["sample order"]  # as in checkpoints of the first order
    checkpoint.write_json(middle / "state.json", state)
    (middle / checkpoint.MANIFEST).unlink()
    middle.rename(checkpoint.partial_folder(middle))
    checkpoint.commit(middle)
    manifest = json.loads((middle / checkpoint.MANIFEST).read_text())
    checkpoint.write_json(middle / checkpoint.MANIFEST, manifest | {"format": 5})
    message = (
        rf"wrote it \(version 1; this .* version 2\).* Finish the run with that release, .* model.weights={middle}"
    )
    with pytest.raises(UserError, match=message):
        run(data, tmp_path / "second", middle)
    assert checkpoint.verify(middle) is None
    config, derived = settings(*data)
    create_engine(config, derived, CPU, pytest.fail, weights=middle)
    allowed = PLAN["checkpoint"] | {"allow_changed": ["sample order"]}
    assert isinstance(run(data, tmp_path / "second", middle, checkpoint=allowed)[0], Resumed)


def hanging(indexes: Indexes, run_dir: Path) -> None:
    """Trains with the workers' watchdog; rank 1 hangs in the middle."""
    log = (run_dir / f"rank{torch.distributed.get_rank()}.log").open("w")

    def stuck() -> bool:
        if torch.distributed.get_rank() == 1:
            threading.Event().wait()  # forever
        return False

    with Watchdog(5, log, grace_s=5) as watchdog:
        run(indexes, run_dir, options={"heartbeat": watchdog.heartbeat, "should_stop": stuck})


@pytest.mark.slow
def test_ranks_that_hang_write_their_stacks_and_end(run_ranks, indexes, tmp_path):
    with pytest.raises(ProcessExitedException):
        run_ranks(2, hanging, indexes(), tmp_path)
    stacks = [(tmp_path / f"rank{rank}.log").read_text() for rank in (0, 1)]
    assert "in stuck" in stacks[1]
    assert "in all_reduce" in stacks[0]
    assert all("Timeout" in stack for stack in stacks)
