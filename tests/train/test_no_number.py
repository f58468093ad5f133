"""Losses that are no numbers: what is written of them, and how a run gets over them."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pipeline.data.index import DatasetIndex
from pipeline.errors import UserError
from pipeline.train import checkpoint
from pipeline.train.checkpoint import checkpoint_root, read_state
from pipeline.train.trainer import Trainer
from tests.train.settings import settings

Indexes = tuple[DatasetIndex, DatasetIndex]
OFTEN = {"log_every_steps": 1, "max_device_batch_size": 4, "epochs": 1}  # two micro-batches in a step, five steps


def run(
    indexes: Indexes,
    run_dir: Path,
    spoiled: tuple[int, ...] = (),
    rank: int = 0,
    resume: Path | None = None,
    **sections: dict,
) -> list[dict[str, Any]]:
    """A run in which the first loss of the `spoiled` steps of a rank is no number; returns the events."""
    events: list[dict[str, Any]] = []
    defaults = {"train": OFTEN, "checkpoint": {"every_samples": 8, "keep_last": 99}, "ema": {"decay": 0.5}}
    merged = {name: defaults.get(name, {}) | sections.get(name, {}) for name in defaults | sections}
    config, derived = settings(*indexes, torch.distributed.get_world_size(), **merged)
    trainer = Trainer(config, derived, *indexes, run_dir, torch.device("cpu"), events.append, resume=resume)
    forward, first = trainer.criterion, trainer.state.samples_seen // 8 * derived.accumulation
    count = iter(range(first, 10**9))

    def spoil(*inputs: torch.Tensor) -> torch.Tensor:
        step, micro = divmod(next(count), derived.accumulation)
        here = step + 1 in spoiled and micro == 0 and torch.distributed.get_rank() == rank
        return forward(*inputs) * float("nan" if here else 1)

    trainer.criterion = spoil  # type: ignore[assignment]
    trainer.fit()
    torch.distributed.barrier()  # rank 0 is the one that writes
    return events


def weights(run_dir: Path, samples: int, file: str = "model.safetensors") -> dict[str, torch.Tensor]:
    return load_file(checkpoint_root(run_dir) / checkpoint.folder_name(samples) / file)


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def warnings(events: list[dict[str, Any]]) -> list[str]:
    return [event["message"] for event in events if event["kind"] == "warning"]


def test_a_run_stops_before_the_step_and_tells_what_the_layers_gave(one_rank, indexes, tmp_path):
    """A rate far too large: the first step spoils the weights, later ones overflow."""
    with pytest.raises(UserError) as error:
        run(indexes(), tmp_path, optim={"lr": 1e18, "momentum": 0.0})
    step = int(
        re.match(r"the training loss is no number at step (\d) .* on rank 0: lower optim.lr", str(error.value))[1]
    )
    assert step in (2, 3)
    assert all(checkpoint.samples_of(f) < step * 8 for f in checkpoint.checkpoints(checkpoint_root(tmp_path)))
    (file,) = (tmp_path / "diagnosis").iterdir()
    assert str(file) in str(error.value)
    told = json.loads(file.read_text())
    assert (told["step"], told["on_ranks"], told["weights_that_are_no_numbers"]) == (step, [0], [])
    (mine,) = told["ranks"]
    assert len(mine["losses"]) == 2 * step
    assert mine["losses"][-1] in ("nan", "inf")
    assert len(mine["samples"]) == 8
    assert all(Path(sample).is_file() for sample in mine["samples"])
    assert mine["first_layer"] in mine["largest_outputs"]
    assert mine["largest_outputs"]["features.conv0"] > 0


def test_a_step_can_be_left_out_and_changes_nothing(one_rank, indexes, tmp_path):
    """Weights, averages' weights and statistics before and after it are the same, and so is momentum."""
    data = indexes()
    events = run(data, tmp_path, (2, 4), train=OFTEN | {"on_nan": "skip", "nan_limit": 2})
    assert [event["step"] for event in events if event["kind"] == "step"] == [1, 2, 3, 4, 5]
    assert [re.sub(", see .*", "", text) for text in warnings(events)] == [
        "the training loss is no number at step 2 (epoch 0.20) on rank 0: the step is left out (1 of at most 2",
        "the training loss is no number at step 4 (epoch 0.60) on rank 0: the step is left out (2 of at most 2",
    ]
    for file in ("model.safetensors", "optimizer.safetensors"):
        assert equal(weights(tmp_path, 16, file), weights(tmp_path, 8, file))
        assert not equal(weights(tmp_path, 24, file), weights(tmp_path, 16, file))
    assert read_state(checkpoint_root(tmp_path) / checkpoint.folder_name(24))["mended"] == 1
    rest = tmp_path / "rest"
    resume = checkpoint_root(tmp_path) / checkpoint.folder_name(24)
    run(data, rest, (2, 4), resume=resume, train=OFTEN | {"on_nan": "skip", "nan_limit": 2})
    assert equal(weights(rest, 40), weights(tmp_path, 40))
    with pytest.raises(UserError, match=r"at step 4 .* on rank 0, 1 times before in this run: lower optim.lr"):
        run(data, tmp_path / "fewer", (2, 4), train=OFTEN | {"on_nan": "skip", "nan_limit": 1})


def every_stage(indexes: Indexes, folder: Path) -> list[bool]:
    """Whether a bad step of the second rank changed nothing, and a return brought all back, stage by stage."""
    held = []
    for stage in range(4):
        run_dir, sections = folder / f"skip{stage}", {"engine": {"zero_stage": stage}, "optim": {"name": "adamw"}}
        run(indexes, run_dir, (3,), 1, train=OFTEN | {"on_nan": "skip"}, **sections)
        held += [
            equal(weights(run_dir, 24, f), weights(run_dir, 16, f))
            for f in ("model.safetensors", "optimizer.safetensors")
        ]
        run_dir = folder / f"rewind{stage}"
        rare = {"every_samples": 16, "keep_last": 99}
        run(indexes, run_dir, (4,), 1, train=OFTEN | {"on_nan": "rewind"}, checkpoint=rare, **sections)
        held += [
            equal(weights(run_dir, 32, f), weights(run_dir, 16, f))
            for f in ("model.safetensors", "optimizer.safetensors")
        ]
        held.append(not equal(weights(run_dir, 40), weights(run_dir, 32)))
    return held


@pytest.mark.slow
def test_all_ranks_agree_at_every_stage(run_ranks, indexes, tmp_path):
    data = indexes()
    for held in run_ranks(2, every_stage, data, tmp_path):
        assert held == [True] * 20


def test_a_return_needs_a_checkpoint(one_rank, indexes, tmp_path):
    with pytest.raises(UserError, match="no number at step 1 .* on rank 0: lower optim.lr"):
        run(indexes(), tmp_path, (1,), train=OFTEN | {"on_nan": "rewind"})


def test_a_checkpoint_of_weights_that_are_no_numbers_is_not_written(one_rank, indexes, tmp_path):
    events: list[dict[str, Any]] = []
    config, derived = settings(*indexes(), train=OFTEN, checkpoint={"every_samples": 8, "keep_last": 99})
    trainer = Trainer(config, derived, *indexes(), tmp_path, torch.device("cpu"), events.append)
    step = trainer.engine.step

    def spoiling(**options: bool) -> None:
        step(**options)
        if trainer.state.samples_seen == 8:
            trainer.engine.module.classifier.weight.data[0, 0] = float("nan")

    trainer.engine.step = spoiling  # type: ignore[method-assign]
    with pytest.raises(UserError, match="the training loss is no number at step 3"):
        trainer.fit()
    (text,) = warnings(events)
    assert "classifier.weight in model.safetensors holds values that are no numbers" in text
    assert [checkpoint.samples_of(f) for f in checkpoint.checkpoints(checkpoint_root(tmp_path))] == [8]
    told = json.loads((tmp_path / "diagnosis" / "step-0000003.json").read_text())
    assert told["weights_that_are_no_numbers"] == ["classifier.weight"]
