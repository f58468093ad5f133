"""Checkpoint storage: copies in a folder or S3 bucket, resuming on an empty disk, corrupt copies and failures."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipeline.data.index import DatasetIndex
from pipeline.errors import UserError
from pipeline.train import checkpoint
from pipeline.train.checkpoint import best_checkpoint, checkpoint_root
from pipeline.train.events import Event, Resumed, Warned
from pipeline.train.state import latest_checkpoint
from pipeline.train.storage import Storage, StorageError, fetch_checkpoints
from tests.servers import s3_store
from tests.train.settings import new_trainer, settings

Indexes = tuple[DatasetIndex, DatasetIndex]
END = checkpoint.folder_name(80)


def run(indexes: Indexes, run_dir: Path, storage: str, **sections: dict) -> list[Event]:
    """Trains a run from its latest checkpoint, local or stored; returns the events."""
    events: list[Event] = []
    config, derived = settings(*indexes, **sections_of(storage, **sections))

    def warn(message: str) -> None:
        events.append(Warned(message))

    latest = latest_checkpoint(config, run_dir, warn)
    new_trainer(config, derived, indexes, run_dir, events.append, resume=latest).fit()
    return events


def sections_of(storage: str, **sections: dict) -> dict[str, dict]:
    plan = {
        "run": {"seed": 5, "name": "run"},
        "train": {"log_every_steps": 1},
        "checkpoint": {"storage": storage, "every_samples": 16, "keep_last": 2},
    }
    return {name: plan.get(name, {}) | sections.get(name, {}) for name in plan | sections}


def names(run_dir: Path) -> list[str]:
    return [folder.name for folder in checkpoint.checkpoints(checkpoint_root(run_dir))]


def warnings(events: list[Event]) -> list[str]:
    return [event.message for event in events if isinstance(event, Warned)]


def test_a_run_without_its_disk_resumes_from_the_stored_copies(one_rank, indexes, tmp_path):
    data, storage = indexes(), Storage(str(tmp_path / "store"), "run")
    whole = tmp_path / "whole"
    run(data, whole, f"file://{tmp_path / 'store'}")
    assert storage.names() == names(whole)

    for name in storage.names()[1:]:  # as if the node had been lost at that point
        storage.remove(name)
    (first,) = storage.names()
    events = run(data, tmp_path / "rest", str(tmp_path / "store"))
    assert events[0] == Resumed(int(first.removeprefix("samples-")), checkpoint_root(tmp_path / "rest") / first)
    ends = [load_file(checkpoint_root(folder) / END / "model.safetensors") for folder in (whole, tmp_path / "rest")]
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])

    config, _ = settings(*data, **sections_of(str(tmp_path / "store")))
    fetch_checkpoints(config, tmp_path / "driver")
    assert best_checkpoint(tmp_path / "driver").name == best_checkpoint(tmp_path / "rest").name
    assert END in names(tmp_path / "driver")


def test_a_corrupt_copy_is_skipped(one_rank, indexes, tmp_path):
    data, store = indexes(), tmp_path / "store"
    run(data, tmp_path / "first", str(store))
    before = sorted(folder.name for folder in (store / "run").iterdir())[-2]
    file = store / "run" / END / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    (store / "run" / before / "optimizer.safetensors").unlink()
    config, _ = settings(*data, **sections_of(str(store)))
    skipped: list[str] = []
    found = latest_checkpoint(config, tmp_path / "second", skipped.append)
    assert found is None or found.name < before
    assert "model.safetensors has " in skipped[0]
    assert "optimizer.safetensors is missing" in skipped[1]
    assert not list(checkpoint_root(tmp_path / "second").glob("*.partial"))


def every_rank(indexes: Indexes, folder: Path) -> list[str]:
    """Simulates two nodes: each rank has a disk of its own, and only rank 0 writes checkpoints."""
    rank = torch.distributed.get_rank()
    config, derived = settings(*indexes, 2, **sections_of(str(folder / "store")))
    run_dir = folder / f"node{rank}"
    for end in (1, 2):
        shorter = config.model_copy(update={"train": config.train.model_copy(update={"epochs": end})})
        latest = latest_checkpoint(shorter, run_dir, print)
        shorter_derived = derived.model_copy(update={"total_steps": 5 * end})
        new_trainer(shorter, shorter_derived, indexes, run_dir, lambda event: None, resume=latest).fit()
        torch.distributed.barrier()
    return names(run_dir)


@pytest.mark.slow
def test_each_node_downloads_the_checkpoint_that_it_lacks(run_ranks, indexes, tmp_path):
    first, second = run_ranks(2, every_rank, indexes(), tmp_path)
    assert END in first
    assert second == [checkpoint.folder_name(40)]


def test_a_storage_that_fails_gives_warnings_and_an_error_only_at_the_end(one_rank, indexes, tmp_path):
    store = tmp_path / "store"
    events: list[Event] = []
    config, derived = settings(*indexes(), **sections_of(str(store)))
    trainer = new_trainer(config, derived, indexes(), tmp_path, events.append)
    store.touch()  # a file where the folder should be
    with pytest.raises(
        UserError, match=r"last checkpoint copies could not be written to the storage: checkpoint.storage="
    ):
        trainer.fit()
    assert all("training continues, and the copy is retried" in text for text in warnings(events))
    assert len(warnings(events)) >= 5
    assert END in names(tmp_path)
    store.unlink()
    run(indexes(), tmp_path, str(store))  # nothing is left to train
    assert END in Storage(str(store), "run").names()


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with s3_store(monkeypatch):
        yield "s3://bucket/runs"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning")  # from the S3 client and server
def test_an_s3_bucket_has_the_checkpoints_that_the_run_keeps(one_rank, indexes, tmp_path, bucket):
    data = indexes()
    run(data, tmp_path / "run", bucket)
    storage = Storage(bucket, "run")
    assert storage.names() == names(tmp_path / "run")
    shutil.rmtree(tmp_path / "run")
    events = run(data, tmp_path / "run", bucket)
    assert events[0].samples_seen == 80
    storage.remove(END)
    assert END not in storage.names()
    with pytest.raises(StorageError, match=r"checkpoint.storage=s3://gone/runs: "):
        Storage("s3://gone/runs", "run").put(checkpoint_root(tmp_path / "run") / END)
    with pytest.raises(StorageError, match=r"checkpoint.storage=carrier://x: ValueError: Protocol not known: carrier"):
        Storage("carrier://x", "run")
