"""WebDataset shards and Parquet files at an address: indexed there, and read through a cache, as from a copy."""

import io
import json
import pickle
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import pipeline
from pipeline.data.dataset import MANIFEST, Manifest, open_index, read_manifest
from pipeline.data.index import DatasetIndex
from pipeline.data.order import WindowedOrder
from pipeline.data.parquet_images import copy_images
from pipeline.data.sources import copy_shard
from pipeline.data.staging import fetch_indexes, stage
from pipeline.data.streaming.cache import ShardCache
from pipeline.data.tools.index_at_address import index_at_address
from pipeline.data.tools.index_in_place import index_in_place
from pipeline.data.tools.pool import Pool
from pipeline.data.tools.prepare import PrepareOptions, prepare
from pipeline.data.tools.selection import Selection
from pipeline.data.tools.stats import stats
from pipeline.data.tools.verify import verify
from pipeline.errors import DataError
from pipeline.train.setup import set_up
from tests.data import synthetic
from tests.servers import UnreliableDownloads, s3_store

pytestmark = pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::DeprecationWarning"
)  # of the store's client and server

CLASSES = ("ant", "bee", "cat")
SHARDS, PER_SHARD, VAL = 9, 8, 6
BATCH = 6
MODEL = {"name": "densenet_tiny"}
CONFIG = {"data": {"shuffle": "windowed", "window": 1, "image_size": 32}}

Samples = list[tuple[int, bytes]]


def samples(split: str) -> list[Samples]:
    """Returns the labels and images of each shard of a split."""
    numbers = range(SHARDS * PER_SHARD) if split == "train" else range(1000, 1000 + VAL)
    made = [(i % 3, synthetic.encoded(synthetic.image(i, (40 + i % 9, 36 + i % 7)))) for i in numbers]
    return [made[i : i + PER_SHARD] for i in range(0, len(made), PER_SHARD)]


def parquet(rows: Samples, names: tuple[str, ...] | None = CLASSES, paths: bool = False) -> bytes:
    """Returns a Parquet file as Hugging Face writes it."""
    images = [{"bytes": content, "path": f"{i}.jpg" if paths else None} for i, (_, content) in enumerate(rows)]
    image = pa.array(images, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    table = pa.table({"image": image, "label": pa.array([label for label, _ in rows], pa.int64())})
    if names:
        features = {"info": {"features": {"label": {"names": list(names), "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
    buffer = io.BytesIO()
    pq.write_table(table, buffer, row_group_size=3)
    return buffer.getvalue()


def shard(rows: Samples, number: int = 0) -> bytes:
    """Returns a WebDataset shard whose labels are in .cls or, of odd shards, in .json members."""
    members = {}
    for i, (label, content) in enumerate(rows):
        members[f"{number}-{i:03d}.jpg"] = content
        members[f"{number}-{i:03d}.{'json' if number % 2 else 'cls'}"] = (
            json.dumps({"label": label}) if number % 2 else str(label)
        ).encode()
    return synthetic.tar(members)


def source_files(layout: str) -> dict[str, bytes]:
    files = {"README.md": b"a data set", "data/.hidden": b""}
    for split, word in (("train", "train"), ("val", "validation")):
        for number, rows in enumerate(samples(split)):
            name = f"data/{word}-{number:05d}"
            files |= (
                {f"{name}.tar": shard(rows, number)} if layout == "webdataset" else {f"{name}.parquet": parquet(rows)}
            )
    return files


def write(files: dict[str, bytes], address: str) -> str:
    """Writes files below a folder or a URI, and returns it."""
    system, root = fsspec.core.url_to_fs(address)
    for name, content in files.items():
        system.makedirs(f"{root}/{name}".rpartition("/")[0], exist_ok=True)
        system.pipe_file(f"{root}/{name}", content)
    return address


def index(address: str, target: Path, **options: Any) -> tuple[Manifest, list[str]]:
    with Pool(1) as pool:
        return index_at_address(address, target, pool, **options)


@pytest.fixture
def memory() -> Iterator[str]:
    """The address of an empty folder in memory."""
    yield "memory://bucket/set"
    fsspec.filesystem("memory").store.clear()


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch) -> Iterator[UnreliableDownloads]:
    layer = UnreliableDownloads()
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with s3_store(monkeypatch, layer):
        yield layer


def opened(root: Path, split: str) -> DatasetIndex:
    manifest = read_manifest(root)
    assert manifest is not None
    return open_index(root, manifest, split)


def read(root: object, folder: Path, limit: int | None = None, **options: Any) -> list[tuple[list[int], torch.Tensor]]:
    """Reads training batches: each one's samples and pixels."""
    data = pipeline.open_dataset(str(root), stage=folder, stage_limit=limit, cache=folder / "indexes")
    batches = data.batches("train", BATCH, config=pipeline.load_config(CONFIG), **options)
    return [(batch.ids_N.tolist(), batch.images_NCHW) for batch in batches]


def same(one: list[tuple[list[int], torch.Tensor]], two: list[tuple[list[int], torch.Tensor]]) -> bool:
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in zip(one, two, strict=True))


def check_samples(root: Path, folder: Path) -> None:
    """Checks that all splits have the source's bytes and labels, in its order."""
    for split in ("train", "val"):
        staged = stage(opened(root, split), str(root), folder)
        expected = [sample for rows in samples(split) for sample in rows]
        assert [(int(label), staged.read(i).tobytes()) for i, label in enumerate(staged.labels_N)] == expected
        assert staged.columns.crc32_N is not None
        assert staged.columns.crc32_N.tolist() == [zlib.crc32(content) for _, content in expected]
        sizes = [Image.open(io.BytesIO(content)).size for _, content in expected]
        assert list(zip(staged.widths_N.tolist(), staged.heights_N.tolist(), strict=True)) == sizes


@pytest.mark.parametrize("layout", ["webdataset", "parquet"])
def test_a_set_in_memory_is_indexed_and_its_samples_are_those_of_the_source(layout, memory, tmp_path):
    address = write(source_files(layout), memory)
    manifest, notes = index(address + "/", tmp_path / "set")
    assert manifest == read_manifest(tmp_path / "set")
    assert manifest.address == address
    assert manifest.classes == (CLASSES if layout == "parquet" else ("0", "1", "2"))
    ends = {"webdataset": ".tar", "parquet": ".parquet.images"}
    assert list(manifest.splits["val"].shards) == [f"data/validation-00000{ends[layout]}"]
    assert any("README.md" in line for line in notes) and any(".hidden" in line for line in notes)
    assert sorted(path.name for path in (tmp_path / "set").iterdir()) == [MANIFEST, "index"]
    check_samples(tmp_path / "set", tmp_path / "fast")


def test_batches_of_shards_in_a_bucket_are_those_of_a_local_copy(downloads, tmp_path):
    files = source_files("webdataset")
    local = Path(write(files, str(tmp_path / "copy")))
    with Pool(1) as pool:
        index_in_place(local, pool)
    index(write(files, "s3://bucket/set"), tmp_path / "set")
    assert opened(tmp_path / "set", "train").fingerprint == opened(local, "train").fingerprint
    assert same(read(tmp_path / "set", tmp_path / "fast", epochs=2), read(local, tmp_path / "other", epochs=2))


def test_parquet_without_class_names_has_the_classes_of_a_prepared_set(memory, tmp_path):
    source = tmp_path / "source"
    synthetic.write_parquet(source, synthetic.images())
    with Pool(1) as pool:
        prepare(source, tmp_path / "prepared", PrepareOptions(shard_bytes=20_000), pool)
    index(str(source), tmp_path / "set")
    for split in ("train", "val"):
        one, two = opened(tmp_path / "prepared", split), opened(tmp_path / "set", split)
        assert one.classes == two.classes == synthetic.CLASSES
        names = [dict(zip(i.to_table()["name"].to_pylist(), i.labels_N.tolist(), strict=True)) for i in (one, two)]
        assert names[0] == names[1]


@pytest.mark.slow
def test_two_epochs_of_parquet_through_a_cache_of_a_third(downloads, tmp_path):
    """With failed requests and truncated downloads, in the index command and in training."""
    address = write(source_files("parquet"), "s3://bucket/set")
    local = write(source_files("parquet"), str(tmp_path / "copy"))
    errors = {"train-00001.parquet": "500", "train-00005.parquet": "truncated"}
    downloads.error_of = lambda name, request: errors.get(name) if request == 1 else None
    index(address, tmp_path / "set")
    index(local, tmp_path / "local")
    assert opened(tmp_path / "set", "train").fingerprint == opened(tmp_path / "local", "train").fingerprint
    downloads.requests.clear()
    manifest = read_manifest(tmp_path / "set")
    assert manifest is not None
    train, val = (sum(s.bytes for s in manifest.splits[name].shards.values()) for name in ("train", "val"))
    batches = read(tmp_path / "set", tmp_path / "fast", train // 3 + val, epochs=2)
    assert same(batches, read(tmp_path / "local", tmp_path / "other", epochs=2))
    (log,) = (tmp_path / "fast").glob("*-stream/.cache/fetcher.log")
    usages = re.findall(r"(\d+) bytes on disk and (\d+) in progress", log.read_text())
    assert max(int(a) + int(b) for a, b in usages) <= train // 3
    assert "try 1 of data/train" in log.read_text()


def test_the_folder_of_the_index_may_be_at_a_uri_too(memory, tmp_path):
    address = write(source_files("parquet"), memory)
    index(address, tmp_path / "set")
    fsspec.filesystem("memory").put(str(tmp_path / "set"), "/bucket/index", recursive=True)
    train, _ = fetch_indexes("memory://bucket/index", ("train", "val"), tmp_path / "cache")
    assert train.address == address
    staged = stage(train, "memory://bucket/index", tmp_path / "fast")
    assert staged.read(0).tobytes() == samples("train")[0][0][1]
    assert same(
        read("memory://bucket/index", tmp_path / "one", epochs=1), read(tmp_path / "set", tmp_path / "two", epochs=1)
    )


def test_a_repeated_command_reads_only_what_is_missing_or_has_changed(memory, tmp_path):
    files = source_files("webdataset")
    address = write(files | {"data/train-00003.tar": shard([(0, b"\xff\xd8 no image")])}, memory)
    with pytest.raises(DataError, match="1 corrupt images in memory://bucket/set:\n  data/train-00003.tar at byte 512"):
        index(address, tmp_path / "set")
    assert len(list((tmp_path / "set" / ".index").glob("*.parquet"))) == SHARDS, "without the corrupt, with val"
    write({"data/train-00003.tar": files["data/train-00003.tar"]}, memory)
    done: list[int] = []
    with Pool(1, lambda description, size, total: done.append(total)) as pool:
        index_at_address(address, tmp_path / "set", pool)
    assert done == [len(files["data/train-00003.tar"])]
    check_samples(tmp_path / "set", tmp_path / "fast")


@pytest.mark.parametrize("layout", ["webdataset", "parquet"])
def test_a_shard_that_has_changed_since_is_named(layout, memory, tmp_path):
    address = write(source_files(layout), memory)
    index(address, tmp_path / "set")
    rows = samples("train")[4]
    rows[2] = rows[2][0], rows[2][1][:-10] + bytes(8) + b"\xff\xd9"
    end = {"webdataset": ".tar", "parquet": ".parquet"}[layout]
    write({f"data/train-00004{end}": shard(rows, 4) if layout == "webdataset" else parquet(rows)}, memory)
    name = f"data/train-00004{end}" + (".images" if layout == "parquet" else "")
    with pytest.raises(
        DataError, match=f"shard {name} does not match its SHA-256: .* index it again if it has changed"
    ):
        stage(opened(tmp_path / "set", "train"), "", tmp_path / "fast")
    assert not list((tmp_path / "fast").rglob("*00004*"))


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        (parquet(samples("train")[4][::-1]), "its SHA-256 differs from the index in 3 tries"),
        (parquet(samples("train")[4][:-1]), r"its images have [\d,]+ bytes, the index has [\d,]+ in 3 tries"),
        (parquet(samples("train")[4])[:-100], r"it cannot be unpacked \(.*cannot be read as Parquet"),
        (None, "it does not exist. To continue, copy the data set there again"),
    ],
)
def test_a_parquet_file_that_has_changed_since_ends_streaming(stored, message, tmp_path):
    source = Path(write(source_files("parquet"), str(tmp_path / "source")))
    index(str(source), tmp_path / "set")
    file = source / "data" / "train-00004.parquet"
    if stored is None:
        file.unlink()
    else:
        file.write_bytes(stored)
    train, name = opened(tmp_path / "set", "train"), "data/train-00004.parquet.images"
    order = WindowedOrder(0, train.first_rows_S1, 1)
    with (
        ShardCache(train, order, str(source), tmp_path / "fast", stop=len(train), limit=10**9) as cache,
        pytest.raises(DataError, match=rf"shard {name} of {source} cannot be fetched: {message}"),
    ):
        cache.readable(train).read(4 * PER_SHARD)


def test_images_are_unpacked_from_any_struct_column_with_bytes(tmp_path):
    rows = samples("train")[0]
    image = pa.array([content for _, content in rows], pa.large_binary())
    column = pa.StructArray.from_arrays([pa.array(range(len(rows))), image], ["id", "bytes"])
    table = pa.table({"caption": ["x"] * len(rows), "img": column, "label": pa.array([0] * len(rows), pa.int8())})
    pq.write_table(table, tmp_path / "one.parquet", row_group_size=3)
    files = fsspec.filesystem("file")
    copied = copy_images(files, str(tmp_path / "one.parquet"), tmp_path / "images")
    assert (tmp_path / "images").read_bytes() == b"".join(content for _, content in rows)
    assert copy_shard(files, str(tmp_path), "one.parquet.images", tmp_path / "again") == copied
    assert copied.bytes == sum(len(content) for _, content in rows)


JPEG = samples("val")[0][0][1]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "has no .tar and no .parquet files, but contains: nothing. Correct the address"),
        ({"train/a/x.jpg": JPEG}, r"no .parquet files, but contains: train/a/x.jpg. Correct .*data prepare` converts"),
        ({"train.tar": b"", "val.parquet": b""}, "has .tar and .parquet files: choose one with --layout webdataset or"),
        ({MANIFEST: b"", "train.tar": b""}, "is a data set with an index already: use data.root=memory://bucket/set"),
        ({"train.tar": shard([(0, JPEG), (1, JPEG)])}, "has no validation split: choose one with --val-per-class"),
        (
            {"train.tar": synthetic.tar({"x.jpg": JPEG}), "val.tar": b""},
            "set/train.tar: 1 images have no label in",
        ),
        ({"train.tar": shard([(2**40, JPEG)]), "val.tar": b""}, "train.tar: the label 1099511627776 is out of range"),
        ({"train.tar": shard([(0, JPEG), (1, JPEG)])[:-9000], "val.tar": b""}, "set/train.tar is truncated"),
        ({"train.tar": shard([(0, JPEG)]), "val.tar": shard([(0, JPEG)])}, "has only one class, 0"),
        ({"train.tar": shard([(0, JPEG)]), "val.tar": shard([(1, JPEG)])}, "no training image has the labels 1"),
        ({"train.tar": shard([(0, JPEG)]), "val.tar": shard([])}, "memory://bucket/set has no val image"),
        ({"train.parquet": b"PAR1 no", "val.parquet": b""}, "set/train.parquet cannot be read as Parquet"),
        (
            {"train.parquet": parquet([(0, b"")]), "val.parquet": b""},
            "train.parquet, row 0: the image's bytes are",
        ),
        (
            {"train.parquet": parquet([(0, JPEG), (1, JPEG)]), "val.parquet": parquet([(0, JPEG)], CLASSES[::-1])},
            "set/train.parquet and memory://bucket/set/val.parquet differ in their label column",
        ),
        (
            {"train.parquet": parquet([(-1, JPEG)]), "val.parquet": parquet([(0, JPEG)])},
            "1 images have negative label",
        ),
    ],
)
def test_bad_sources_are_named(files, message, memory, tmp_path):
    with pytest.raises(DataError, match=message):
        index(write(files, memory), tmp_path / "set")
    assert not (tmp_path / "set" / MANIFEST).exists()
    assert not list(tmp_path.rglob(".partial-*"))


def test_a_missing_label_in_parquet_names_the_row(memory, tmp_path):
    table = pa.table({"image": [{"bytes": JPEG}] * 5, "label": pa.array([0, 1, 0, None, 1])})
    buffer = io.BytesIO()
    pq.write_table(table, buffer, row_group_size=2)
    write({"train.parquet": buffer.getvalue(), "val.parquet": b""}, memory)
    with pytest.raises(DataError, match=r"memory://bucket/set/train.parquet, row 3: the label is missing"):
        index(memory, tmp_path / "set")


def test_targets_in_use_are_refused(memory, tmp_path):
    write(source_files("parquet"), memory)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "other").touch()
    with pytest.raises(DataError, match="full is not empty: choose an empty or a new folder"):
        index(memory, tmp_path / "full")
    index(memory, tmp_path / "set")
    with pytest.raises(DataError, match=f"has a {MANIFEST} already: remove it to index again"):
        index(memory, tmp_path / "set")
    with pytest.raises(DataError, match="is the source: choose another folder, or omit --to"):
        index(str(tmp_path / "full"), tmp_path / "full")


def test_missing_credentials_and_packages_are_named(downloads, tmp_path, monkeypatch):
    write(source_files("parquet"), "s3://bucket/set")
    with pytest.raises(DataError, match="sharepoint://x cannot be read: ValueError: Protocol not known: sharepoint"):
        index("sharepoint://x", tmp_path / "set")
    with pytest.raises(DataError, match=r"gs://x needs a package that is not installed \(.*gcsfs"):
        index("gs://x", tmp_path / "set")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    fsspec.filesystem("s3").clear_instance_cache()
    with pytest.raises(DataError, match=r"s3://bucket/set cannot be read: NoCredentials.* Set the credentials in the"):
        index("s3://bucket/set", tmp_path / "set")


def test_commands_that_need_the_images_in_a_folder_say_so(memory, tmp_path):
    index(write(source_files("parquet"), memory), tmp_path / "set")
    message = "set has only the index of the shards at memory://bucket/set.*copy them to a folder"
    with Pool(1) as pool:
        for command in (
            lambda: verify(tmp_path / "set", pool),
            lambda: stats(tmp_path / "set", 0, pool),
            lambda: prepare(tmp_path / "set", tmp_path / "new", PrepareOptions(shard_bytes=20_000), pool),
        ):
            with pytest.raises(DataError, match=message):
                command()
    with pytest.raises(DataError, match=r"is an index of the shards at memory://bucket/set: set stage to a folder"):
        pipeline.open_dataset(tmp_path / "set")


def test_training_needs_a_stage_folder(memory, tmp_path):
    index(write(source_files("parquet"), memory), tmp_path / "set")
    config = pipeline.load_config({"data": {"root": str(tmp_path / "set")}, "run": {"output": str(tmp_path / "out")}})
    with pytest.raises(DataError, match=r"set is an index of the shards at memory://bucket/set: set data.stage to a"):
        pipeline.fit(config)


def test_training_on_shards_ordered_by_class_warns_if_they_are_read_in_windows(memory, tmp_path):
    files = {f"train-{label}{i}.tar": shard([(label, JPEG)] * 4) for label in range(3) for i in range(4)}
    index(write(files | {"val.tar": shard([(0, JPEG), (1, JPEG), (2, JPEG)])}, memory), tmp_path / "set")
    data = {"root": str(tmp_path / "set"), "stage": str(tmp_path / "fast"), "window": 1, "image_size": 32}
    for shuffle in ("full", "windowed"):
        sections = {"data": data | {"shuffle": shuffle}, "train": {"global_batch_size": 4}, "model": MODEL}
        config = pipeline.load_config(sections | {"run": {"output": str(tmp_path / "out")}})
        setup = set_up(config, device="cpu", workers=1, cpus_per_worker=1, embedded=True)
        found = [line for line in setup.warnings if "windows of 1 shards have 1.0 classes on average" in line]
        assert len(found) == (shuffle == "windowed")


def test_an_index_keeps_its_address(memory, tmp_path):
    index(write(source_files("parquet"), memory), tmp_path / "set")
    train = opened(tmp_path / "set", "train")
    for other in (pickle.loads(pickle.dumps(train)), train.with_root(tmp_path), train.subset(np.arange(3))):
        assert other.address == memory
    (tmp_path / "classes.txt").write_text("ant\ncat\n")
    data = pipeline.open_dataset(
        tmp_path / "set", stage=tmp_path / "fast", cache=tmp_path, classes=tmp_path / "classes.txt"
    )
    chosen = data.index("train")
    assert (chosen.classes, chosen.address) == (("ant", "cat"), memory)
    assert chosen.read(1).tobytes() == samples("train")[0][2][1]


@pytest.mark.parametrize("layout", ["webdataset", "parquet"])
def test_a_validation_split_and_classes_can_be_chosen(memory, tmp_path, layout):
    files = {name: content for name, content in source_files(layout).items() if "validation" not in name}
    (tmp_path / "classes.txt").write_text("1 b\n2 c\n" if layout == "webdataset" else "bee b\ncat c\n")
    selection = Selection(tmp_path / "classes.txt", val_per_class=4)
    manifest, _ = index(write(files, memory), tmp_path / "index", selection=selection)
    assert manifest.classes == ("b", "c")
    assert [manifest.splits[split].samples for split in ("train", "val")] == [SHARDS * PER_SHARD * 2 // 3 - 8, 8]
    data = pipeline.open_dataset(tmp_path / "index", stage=tmp_path / "stage", cache=tmp_path / "cache")
    contents = {content: label for rows in samples("train") for label, content in rows}
    for split in ("train", "val"):
        opened = data.index(split)
        read = [contents.pop(opened.read(i).tobytes()) for i in range(len(opened))]
        assert [label - 1 for label in read] == opened.labels_N.tolist()
    assert set(contents.values()) == {0}
