"""The training loop on one rank: events, checkpoints, bit-for-bit resume, out of memory, distillation."""

import json
import re
import socket
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pipeline.errors import UserError
from pipeline.model.densenet import create
from pipeline.model.pretrained import Pretrained
from pipeline.model.weights import load_model
from pipeline.train import batch_size_finder, checkpoint
from pipeline.train.checkpoint import best_checkpoint, checkpoint_root
from pipeline.train.events import Evaluated, Event, Profiled, Resumed, Saved, Step, Warned
from tests.train.settings import new_trainer, settings

CPU = torch.device("cpu")
EVERYTHING = {  # every source of randomness, and progressive resizing in the middle of the run
    "data": {"image_size": 32, "progressive_resize": [[1.2, 24]]},
    "augment": {
        "brightness": 0.4,
        "contrast": 0.4,
        "saturation": 0.4,
        "lighting": 0.1,
        "erase_prob": 0.5,
        "erase_fill": "noise",
        "mixup_alpha": 0.2,
        "cutmix_alpha": 1.0,
    },
    "model": {"drop_rate": 0.2, "layer_drop_rate": 0.1},
    "ema": {"decay": 0.9},
}


def run(indexes: tuple, run_dir: Path, resume: Path | None = None, **sections: dict) -> list[Event]:
    events: list[Event] = []
    config, derived = settings(*indexes, **sections)
    new_trainer(config, derived, indexes, run_dir, events.append, resume=resume).fit()
    return events


def losses(events: list[Event]) -> dict[int, float]:
    return {e.step: e.loss for e in events if isinstance(e, Step)}


@pytest.mark.slow
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(one_rank, indexes, tmp_path):
    data = indexes()
    whole = run(data, tmp_path / "whole", checkpoint={"keep_last": 9}, **EVERYTHING)
    middle = checkpoint_root(tmp_path / "whole") / checkpoint.folder_name(40)
    assert checkpoint.verify(middle) is None
    rest = run(data, tmp_path / "rest", resume=middle, checkpoint={"keep_last": 9}, **EVERYTHING)
    assert rest[0] == Resumed(40, middle)
    assert losses(rest) == {step: loss for step, loss in losses(whole).items() if step > 5}
    for file in ("model.safetensors", "ema.safetensors"):
        ends = [load_file(best_or_last(tmp_path / name) / file) for name in ("whole", "rest")]
        assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0]), file
    assert not torch.equal(ends[0]["classifier.weight"], load_file(middle / "ema.safetensors")["classifier.weight"])
    evaluations = [[(e.weights, e.result.loss) for e in events if isinstance(e, Evaluated)] for events in (whole, rest)]
    assert [weights for weights, _ in evaluations[0]] == ["raw", "ema"] * 2
    assert evaluations[1] == evaluations[0][2:]


def best_or_last(run_dir: Path) -> Path:
    return checkpoint.checkpoints(checkpoint_root(run_dir))[-1]


@pytest.mark.slow
def test_events_checkpoints_and_the_model_card(one_rank, indexes, tmp_path):
    train_index, val_index = data = indexes()
    events = run(data, tmp_path, train={"max_device_batch_size": 4})  # two micro-batches per step
    steps = [e for e in events if isinstance(e, Step)]
    assert [e.step for e in steps] == [2, 4, 6, 8, 10]
    assert [e.samples_seen for e in steps] == [16, 32, 48, 64, 80]
    assert all(0 <= e.data_wait <= 1 and e.img_per_s > 0 for e in steps)
    evals = [e for e in events if isinstance(e, Evaluated)]
    assert [(e.samples_seen, e.result.total, e.result.top5_k) for e in evals] == [(40, 13, 3), (80, 13, 3)]
    saved = [e.checkpoint for e in events if isinstance(e, Saved)]
    assert saved == checkpoint.checkpoints(checkpoint_root(tmp_path))
    best = best_checkpoint(tmp_path)
    card = json.loads((best / "model.json").read_text())
    assert card["classes"] == list(train_index.classes)
    assert card["metrics"]["total"] == len(val_index)
    assert card["metrics"]["top1_correct"] == max(e.result.top1_correct for e in evals)
    create("densenet_tiny", 3).load_state_dict(load_file(best / "model.safetensors"), strict=True)


@pytest.mark.slow
def test_a_checkpoint_of_another_run_is_refused_with_the_differences(one_rank, indexes, tmp_path):
    data = indexes()
    run(data, tmp_path / "first", train={"epochs": 1})
    saved = best_or_last(tmp_path / "first")
    with pytest.raises(UserError, match=r"run.seed was 5 and is 6; optim.name was sgd and is adamw"):
        run(data, tmp_path / "second", resume=saved, run={"seed": 6}, optim={"name": "adamw"})


@pytest.mark.slow
def test_the_model_card_names_the_better_one_of_weights_and_ema(one_rank, indexes, tmp_path):
    data = indexes()
    events = run(data, tmp_path, ema={"decay": 0.5}, checkpoint={"keep_last": 9}, model={"in_chans": 1})
    found = [e for e in events if isinstance(e, Evaluated)]
    evals = {(e.samples_seen, e.weights): (e.result.top1_correct, -e.result.loss) for e in found}
    for samples in (40, 80):
        folder = checkpoint_root(tmp_path) / checkpoint.folder_name(samples)
        card = json.loads((folder / "model.json").read_text())
        better = max(("raw", "ema"), key=lambda weights: evals[samples, weights])
        assert card["weights"] == {"raw": "model.safetensors", "ema": "ema.safetensors"}[better]
        assert (card["metrics"]["top1_correct"], -card["metrics"]["loss"]) == evals[samples, better]
        assert card["architecture"]["in_chans"] == 1
        model = load_model(folder)
        assert model.features.conv0.weight.shape[1] == 1


@pytest.mark.slow
def test_a_run_with_pretrained_weights_and_a_teacher_distills(one_rank, indexes, tmp_path):
    """With alpha 1 and the teacher's own weights, the distillation loss stays 0."""
    data = indexes()
    run(data, tmp_path / "teacher")
    teacher = best_checkpoint(tmp_path / "teacher")
    config, derived = settings(
        *data,
        model={"weights": str(teacher), "num_classes": 3},
        loss={"teacher": str(teacher), "distillation_alpha": 1.0, "distillation_temperature": 2.0},
        finetune={"freeze_batch_norm": True},
        train={"log_every_steps": 1},
    )
    events: list[Event] = []
    new_trainer(
        config, derived, data, tmp_path / "student", events.append, pretrained=Pretrained(teacher, teacher)
    ).fit()
    assert all(loss == pytest.approx(0, abs=1e-6) for loss in losses(events).values())


@pytest.mark.slow
def test_more_logits_than_classes_are_trained_and_listed_as_unused(one_rank, indexes, tmp_path):
    mixed = {"augment": EVERYTHING["augment"], "model": {"num_classes": 5}, "train": {"epochs": 1}}
    run(indexes(), tmp_path, **mixed)
    card = json.loads((best_or_last(tmp_path) / "model.json").read_text())
    assert card["classes"] == ["class0", "class1", "class2", "(unused 3)", "(unused 4)"]
    assert card["num_classes"] == 5
    with pytest.raises(UserError, match="model.num_classes=2 is less than the 3 classes in data.root"):
        settings(*indexes(), model={"num_classes": 2})


def test_profile_steps_writes_a_trace(one_rank, indexes, tmp_path):
    train = {"epochs": 1, "profile_steps": [2, 3]}
    events = run(indexes(), tmp_path, train=train)
    (file,) = [event.file for event in events if isinstance(event, Profiled)]
    names = {event.get("name") for event in json.loads(file.read_text())["traceEvents"]}
    assert "aten::conv2d" in names


def run_with_a_slow_rank(indexes: tuple, run_dir: Path) -> tuple[list[str], list[Step]]:
    """Returns rank 0's warnings and steps in a run whose rank 1 is slow in each forward pass."""
    events: list[Event] = []
    config, derived = settings(*indexes, 2, train={"epochs": 1, "log_every_steps": 1})
    trainer = new_trainer(config, derived, indexes, run_dir, events.append)
    criterion, slow = trainer.criterion, torch.distributed.get_rank() == 1

    def criterion_that_waits(*inputs: torch.Tensor) -> torch.Tensor:
        threading.Event().wait(0.5 if slow else 0)
        return criterion(*inputs)

    trainer.criterion = criterion_that_waits  # type: ignore[assignment]
    trainer.fit()
    steps = [event for event in events if isinstance(event, Step)]
    return [event.message for event in events if isinstance(event, Warned)], steps


@pytest.mark.slow
def test_a_straggler_is_warned_of_once(run_ranks, indexes, tmp_path):
    ((warning,), steps), _ = run_ranks(2, run_with_a_slow_rank, indexes(), tmp_path)
    assert re.match(
        rf"rank 1 on {socket.gethostname()} is slow: its forward passes take [\d.]+ times as long as", warning
    )
    assert [event.slow_ranks for event in steps] == [0, *[1] * (len(steps) - 1)]
    assert {event.slowest_rank for event in steps} == {1}
    assert all(event.slowest_rank_ratio >= 1.2 for event in steps)


def test_out_of_memory_names_a_micro_batch_that_keeps_the_global_batch(one_rank, indexes, tmp_path):
    data = indexes()
    config, derived = settings(*data)
    trainer = new_trainer(config, derived, data, tmp_path, [].append)

    def run_out_of_memory(*inputs: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    trainer.engine.module.features.conv0.register_forward_pre_hook(run_out_of_memory)
    with pytest.raises(UserError) as error:
        trainer.fit()
    assert str(error.value) == (
        "GPU out of memory with micro-batches of 8 images: set train.max_device_batch_size=4 (gradient accumulation "
        "steps become 2, the global batch stays 8), or train.on_out_of_memory=halve, or "
        "model.memory=activation-checkpointing."
    )


def test_find_batch_size_halves_the_micro_batch_until_it_fits(one_rank, indexes, tmp_path, monkeypatch):
    """The memory fits two images, then none; a step of 8 images is then four micro-batches."""
    data, fitting, create_unlimited = indexes(), 2, batch_size_finder.create

    def create_with_little_memory(*arguments: Any) -> torch.nn.Module:
        def allocate(module: torch.nn.Module, inputs: tuple[torch.Tensor]) -> None:
            if len(inputs[0]) > fitting:
                raise torch.OutOfMemoryError("CUDA out of memory")

        model = create_unlimited(*arguments)
        model.register_forward_pre_hook(allocate)
        return model

    monkeypatch.setattr(batch_size_finder, "create", create_with_little_memory)
    events = run(data, tmp_path / "halved", train={"epochs": 1, "on_out_of_memory": "halve"})
    (warning,) = [event.message for event in events if isinstance(event, Warned)]
    assert warning == (
        "out of memory with micro-batches of 8 images: using 2 per device and 4 gradient accumulation steps; the "
        "global batch stays 8, batch norm's statistics are over 2 images"
    )
    expected = run(data, tmp_path / "expected", train={"epochs": 1, "max_device_batch_size": 2})
    assert losses(events) == losses(expected)
    fitting = 0
    with pytest.raises(
        UserError,
        match="out of memory with micro-batches of 1 images: set model.memory=activation-checkpointing. No smaller",
    ):
        run(data, tmp_path / "none", train={"on_out_of_memory": "halve"})
