"""Staging: shards from a folder or a URI are copied to a node's local disk once, completely, and verified."""

import multiprocessing
import shutil
from pathlib import Path

import fsspec
import pytest

from pipeline.config import RunConfig
from pipeline.data.dataset import open_splits
from pipeline.data.index import DatasetIndex
from pipeline.data.staging import fetch_indexes, stage
from pipeline.data.tools.pool import Pool
from pipeline.data.tools.prepare import PrepareOptions, prepare
from pipeline.errors import DataError
from tests.data import synthetic
from tests.servers import s3_store


@pytest.fixture
def shards(tmp_path) -> Path:
    synthetic.write_folders(tmp_path / "source", synthetic.images())
    with Pool(1) as pool:
        prepare(tmp_path / "source", tmp_path / "set", PrepareOptions(shard_bytes=20_000), pool)
    return tmp_path / "set"


def opened(root: Path) -> DatasetIndex:
    return open_splits(str(root), "train", "val", root)[0]


def same_samples(one: DatasetIndex, two: DatasetIndex) -> bool:
    return all(one.read(i).tobytes() == two.read(i).tobytes() for i in range(len(one)))


def test_shards_of_a_folder_are_copied_and_read_from_the_copy(shards, tmp_path):
    index = opened(shards)
    staged = stage(index, str(shards), tmp_path / "fast")
    assert staged.root.is_relative_to(tmp_path / "fast")
    assert staged.fingerprint == index.fingerprint
    assert same_samples(index, staged)
    assert {file.name for file in (tmp_path / "fast").rglob("*") if file.is_file()} == {
        "lock",
        *(Path(name).name for name in index.shards),
    }


def memory_copy(root: Path) -> str:
    files = fsspec.filesystem("memory")
    files.put(str(root), "/bucket/set", recursive=True)
    return "memory://bucket/set"


def test_a_set_in_memory_is_fetched_and_staged(shards, tmp_path):
    uri = memory_copy(shards)
    train, val = fetch_indexes(uri, ("train", "val"), tmp_path / "cache")
    assert same_samples(opened(shards), stage(train, uri, tmp_path / "fast"))
    assert len(stage(val, uri, tmp_path / "fast")) == 9


def test_a_file_uri_is_fetched_and_staged(shards, tmp_path):
    uri = f"file://{shards}"
    train, _ = fetch_indexes(uri, ("train", "val"), tmp_path / "cache")
    assert same_samples(opened(shards), stage(train, uri, tmp_path / "fast"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning")  # of the store's client and server
def test_a_bucket_is_fetched_and_staged(shards, tmp_path, monkeypatch):
    with s3_store(monkeypatch):
        fsspec.filesystem("s3").put(f"{shards}/", "bucket/set/", recursive=True)
        train, _ = fetch_indexes("s3://bucket/set", ("train", "val"), tmp_path / "cache")
        assert same_samples(opened(shards), stage(train, "s3://bucket/set", tmp_path / "fast"))
        with pytest.raises(DataError, match=r"s3://bucket/gone: .* does not exist"):
            fetch_indexes("s3://bucket/gone", ("train", "val"), tmp_path / "cache")


def test_a_second_start_copies_only_what_is_missing(shards, tmp_path):
    index = opened(shards)
    staged = stage(index, str(shards), tmp_path / "fast")
    first, second = (staged.root / name for name in list(index.shards)[:2])
    times = first.stat().st_mtime_ns
    second.write_bytes(second.read_bytes()[:100])  # a kill leaves no such shard, but a full disk may
    second.with_name(f".partial-{second.name}").write_bytes(b"half")
    stage(index, str(shards), tmp_path / "fast")
    assert first.stat().st_mtime_ns == times
    assert second.stat().st_size == index.shards[f"train/{second.name}"].bytes
    assert not list(staged.root.rglob(".partial-*"))


def _stage(index: DatasetIndex, source: str, base: Path) -> None:
    stage(index, source, base)


def test_several_processes_of_a_node_copy_once(shards, tmp_path):
    index = opened(shards)
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_stage, args=(index, str(shards), tmp_path / "fast")) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert same_samples(index, stage(index, str(shards), tmp_path / "fast"))


def test_a_corrupt_copy_of_a_shard_is_named_and_removed(shards, tmp_path):
    index = opened(shards)
    name = list(index.shards)[1]
    content = bytearray((shards / name).read_bytes())
    content[700] ^= 1
    (shards / name).write_bytes(content)
    with pytest.raises(DataError, match=f"shard {name} does not match its SHA-256"):
        stage(index, str(shards), tmp_path / "fast")
    assert not list((tmp_path / "fast").rglob(Path(name).name + "*"))


def test_staging_errors_are_named(shards, tmp_path, monkeypatch):
    index = opened(shards)
    (shards / "val" / "val-000000.tar").unlink()
    with pytest.raises(DataError, match=r"val-000000.tar does not exist|No such file"):
        stage(open_index_val(shards), str(shards), tmp_path / "fast")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 10}))
    with pytest.raises(DataError, match="has 10 bytes free, the staged shards need about"):
        stage(index, str(shards), tmp_path / "other")
    with pytest.raises(DataError, match="memory://bucket/none: .* does not exist"):
        fetch_indexes("memory://bucket/none", ("train",), tmp_path / "cache")
    with pytest.raises(DataError, match="sharepoint://x cannot be read: ValueError: Protocol not known: sharepoint"):
        fetch_indexes("sharepoint://x", ("train",), tmp_path / "cache")
    with pytest.raises(DataError, match="is not a directory|Not a directory|File exists"):
        (tmp_path / "file").touch()
        stage(index, str(shards), tmp_path / "file")


def open_index_val(root: Path) -> DatasetIndex:
    from pipeline.data.dataset import open_index, read_manifest

    manifest = read_manifest(root)
    assert manifest is not None
    return open_index(root, manifest, "val")


def test_class_folders_are_not_staged(tmp_path):
    synthetic.write_folders(tmp_path / "set", synthetic.images())
    with pytest.raises(DataError, match="has class folders: prepare shards or unset data.stage"):
        stage(opened(tmp_path / "set"), str(tmp_path / "set"), tmp_path / "fast")


def test_a_uri_needs_a_staging_folder():
    with pytest.raises(ValueError, match="root=s3://bucket/set is a URI: set stage"):
        RunConfig.model_validate({"data": {"root": "s3://bucket/set"}})
    RunConfig.model_validate({"data": {"root": "s3://bucket/set", "stage": "/fast"}})
