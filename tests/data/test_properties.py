"""Property tests: samplers, index, and corrupt files of a data set, for any size, seed and world size."""

import hashlib
import json
import random
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.dataset import index_file, open_splits
from pipeline.data.index import DatasetIndex
from pipeline.data.index_file import load_index, save_index
from pipeline.data.plan import EvalPlan, TrainPlan, micro_batch, rank_eval_batches
from pipeline.data.tables import table_of
from pipeline.data.tools.pool import Pool
from pipeline.data.tools.prepare import PrepareOptions, prepare
from pipeline.data.tools.tars import Member, read_members
from pipeline.data.tools.verify import verify
from pipeline.errors import CorruptSample, DataError
from tests.data import synthetic

seeds = st.integers(0, 2**32 - 1)
sides = st.integers(1, 5000)
QUICK = settings(max_examples=60)


@QUICK
@given(
    seed=seeds,
    samples=st.integers(1, 400),
    workers=st.integers(1, 9),
    grad_accum=st.integers(1, 4),
    device_batch=st.integers(1, 8),
    steps=st.integers(1, 5),
)
def test_global_batches_do_not_depend_on_workers_and_gradient_accumulation(
    seed, samples, workers, grad_accum, device_batch, steps
):
    plan = TrainPlan(seed, *np.full((2, samples), 64), (0.08, 1.0), (3 / 4, 4 / 3), 0.5)
    size = workers * grad_accum * device_batch
    for step in range(steps):
        parts = [
            micro_batch(step, micro, rank, workers, device_batch, grad_accum)
            for micro in range(grad_accum)
            for rank in range(workers)
        ]
        together = np.sort(np.concatenate(parts))
        assert np.array_equal(together, np.arange(step * size, (step + 1) * size))
        whole = plan.locate(together)[1]
        split = {int(p): int(i) for part in parts for p, i in zip(part, plan.locate(part)[1], strict=True)}
        assert [split[int(p)] for p in together] == whole.tolist()


@QUICK
@given(samples=st.integers(0, 500), workers=st.integers(1, 40), batch=st.integers(1, 64))
def test_evaluation_has_every_sample_once_at_any_world_size(samples, workers, batch):
    by_rank = [np.concatenate([[], *rank_eval_batches(samples, rank, workers, batch)]) for rank in range(workers)]
    assert np.array_equal(np.concatenate(by_rank), np.arange(samples))
    assert max(map(len, by_rank)) - min(map(len, by_rank)) <= 1


@QUICK
@given(
    seed=seeds,
    shapes=st.lists(st.tuples(sides, sides), min_size=1, max_size=30),
    area=st.tuples(st.floats(0.001, 1), st.floats(0.001, 1)).map(sorted),
    ratio=st.tuples(st.floats(0.05, 20), st.floats(0.05, 20)).map(sorted),
)
def test_windows_are_inside_their_images(seed, shapes, area, ratio):
    heights_N, widths_N = np.array(shapes).T
    plan = TrainPlan(seed, widths_N, heights_N, tuple(area), tuple(ratio), 0.5)
    batch = plan.batch(np.arange(len(shapes)), 32)
    ends_B2 = batch.window_starts_B2 + batch.window_shapes_B2
    assert (batch.window_starts_B2 >= 0).all() and (batch.window_shapes_B2 >= 1).all()
    assert (ends_B2 <= np.stack([heights_N, widths_N], axis=1)[batch.ids_B]).all()


@QUICK
@given(
    shapes=st.lists(st.tuples(sides, sides), min_size=1, max_size=30),
    crop=st.integers(8, 512),
    more=st.integers(0, 200),
    anchor=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
def test_crops_are_inside_the_resized_images(shapes, crop, more, anchor):
    heights_N, widths_N = np.array(shapes).T
    batch = EvalPlan(widths_N, heights_N, crop + more, crop, anchor).batch(np.arange(len(shapes)))
    assert (batch.sizes_B2.min(axis=1) == crop + more).all()
    assert (batch.origins_B2 >= 0).all() and (batch.origins_B2 + crop <= batch.sizes_B2).all()


paths = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0/"), min_size=1, max_size=20)
rows = st.lists(
    st.tuples(
        st.lists(paths, min_size=1, max_size=3).map("/".join),
        st.integers(0, 2**40),
        st.integers(1, 2**32 - 1),
        st.integers(0, 999),
        sides,
        sides,
    ),
    max_size=40,
)


@QUICK
@given(rows=rows)
def test_an_index_is_read_as_it_was_written(rows, tmp_path_factory):
    rows = sorted(rows)  # samples of a shard are consecutive
    classes = tuple(f"{i:03d}" for i in range(1000))
    folder = tmp_path_factory.mktemp("index")
    names = ("path", "offset", "length", "label", "width", "height")
    columns = {name: [row[i] for row in rows] for i, name in enumerate(names)} | {
        "name": [row[0][::-1] for row in rows]
    }
    in_shards = table_of(columns | {"name": [row[0][::-1] for row in rows]})
    in_folders = table_of({name: values for name, values in columns.items() if name != "offset"})
    for table in (in_shards, in_folders):
        index = DatasetIndex.of_table(Path("/x"), classes, table)
        save_index(index.columns, classes, folder / "train.arrow")
        opened = DatasetIndex.open(Path("/elsewhere"), folder / "train.arrow")
        for read in (index, opened):
            assert read.to_table().to_pydict() == table.to_pydict()
            assert read.fingerprint == fingerprint_by_definition(classes, table)
            assert [str(read.path(i).relative_to(read.root)) for i in range(len(rows))] == columns["path"]
        assert opened.summary == index.summary


def fingerprint_by_definition(classes: tuple[str, ...], table: pa.Table) -> str:
    """SHA-256 over classes, paths, offsets, lengths and labels, as in the first release: registered models have it."""
    digest = hashlib.sha256(json.dumps(classes).encode())
    paths = table["path"].to_pylist()
    digest.update(np.array([len(path.encode()) for path in paths], np.int64).tobytes())
    digest.update("".join(paths).encode())
    for name in ("offset", "length", "label"):
        digest.update(table[name].to_numpy().astype(np.int64).tobytes())
    return digest.hexdigest()


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    """A small prepared data set in shards."""
    root = tmp_path_factory.mktemp("prepared")
    synthetic.write_folders(root / "source", synthetic.images())
    with Pool(1) as pool:
        prepare(root / "source", root / "set", PrepareOptions(shard_bytes=20_000), pool)
    return root / "set"


@settings(max_examples=150)
@given(seed=seeds, kind=st.sampled_from(["flip", "cut", "zero"]))
def test_a_corrupt_index_is_refused_or_unchanged(shards, seed, kind, tmp_path_factory):
    rng = random.Random(seed)
    file = index_file(shards, "train")
    content = bytearray(file.read_bytes())
    at = rng.randrange(len(content))
    if kind == "flip":
        content[at] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        del content[at:]
    else:
        content[at : at + 16] = bytes(min(16, len(content) - at))
    corrupt = tmp_path_factory.mktemp("corrupt") / "train.arrow"
    corrupt.write_bytes(content)
    try:
        changed = load_index(corrupt)
    except DataError as error:
        assert str(corrupt) in str(error)
    else:
        same, arrays = load_index(file), changed.columns.arrays()
        assert (changed.classes, changed.summary) == (same.classes, same.summary)
        assert changed.columns.files == same.columns.files
        assert arrays.keys() == same.columns.arrays().keys()
        for name, array in same.columns.arrays().items():
            assert np.array_equal(arrays[name], array), f"byte {at} of {len(content)} changes the index"


@settings(max_examples=100)
@given(seed=seeds)
def test_a_corrupt_byte_anywhere_in_a_shard_is_detected_with_its_sample(shards, seed, tmp_path_factory):
    rng = random.Random(seed)
    root = tmp_path_factory.mktemp("rotten") / "set"
    shutil.copytree(shards, root)
    file = rng.choice(sorted((root / "train").glob("*.tar")))
    content = bytearray(file.read_bytes())
    at = rng.randrange(len(content))
    content[at] ^= 1 << rng.randrange(8)
    file.write_bytes(content)
    index, _ = open_splits(str(root), "train", "val", root)
    valid = open_splits(str(shards), "train", "val", root)[0]
    for sample in range(len(index)):
        try:
            assert bytes(index.read(sample)) == bytes(valid.read(sample))
        except CorruptSample as error:
            assert str(file) in str(error)
            start = index.columns.offsets_N[sample]
            assert start <= at < start + index.columns.lengths_N[sample], "a valid sample is called corrupt"
    with Pool(1) as pool:
        report = verify(root, pool)
    assert any(file.name in str(finding) for finding in report.findings), "verify does not find it"


def _listed(file: Path, content: bytes) -> list[Member] | None:
    """Returns the members of an archive with this content; None if it is refused by name."""
    file.write_bytes(content)
    try:
        return list(read_members(file))
    except DataError as error:
        assert str(file) in str(error)
        return None


@pytest.mark.parametrize("name", ["n01440764/a.JPEG", f"{'long/' * 40}a.JPEG"])
def test_an_archive_with_a_corrupt_byte_is_refused_or_lists_the_same(name, tmp_path):
    """Changes each byte, and truncates at each byte: headers, images, padding, end markers, blocks of long names."""
    file = tmp_path / "x.tar"
    valid = synthetic.tar({name: b"x" * 700, "b.JPEG": b"y" * 10, "c.JPEG": b"z" * 512})
    end = len(valid.rstrip(b"\0")) + 512  # the first block of the end marker is enough
    original = _listed(file, valid)
    assert original is not None and [member.length for member in original] == [700, 10, 512]
    for at in range(end):
        corrupt = bytearray(valid)
        corrupt[at] ^= 0x10
        if at >= original[0].offset - 512:  # a long name's blocks before it have no checksum
            assert _listed(file, corrupt) in (None, original), f"byte {at} changes what is listed"
        else:
            _listed(file, corrupt)
        assert _listed(file, valid[:at]) is None, f"an archive truncated to {at} bytes is accepted"
