"""`prepare`: every source layout, reproducible bytes, resuming, shares, corrupt images."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from pipeline.data.dataset import open_splits, read_manifest
from pipeline.data.images import ignore_pil_warnings
from pipeline.data.order import ORDER_VERSION
from pipeline.data.tools.data_card import DATA_CARD
from pipeline.data.tools.layouts import detect_layout
from pipeline.data.tools.pool import Pool
from pipeline.data.tools.prepare import PrepareOptions, PrepareResult, prepare
from pipeline.errors import DataError
from tests.data import synthetic
from tests.data.synthetic import CLASSES

SMALL = PrepareOptions(shard_bytes=20_000)


def run(source: Path, target: Path, options: PrepareOptions = SMALL, **arguments: object) -> PrepareResult:
    with Pool(1) as pool:
        return prepare(source, target, options, pool, **arguments)


def contents(root: Path) -> dict[str, bytes]:
    return {
        str(f.relative_to(root)): f.read_bytes() for f in sorted(root.rglob("*")) if f.is_file() and f.name != DATA_CARD
    }


def labels_by_name(root: Path) -> dict[str, dict[str, int]]:
    train, val = open_splits(str(root), "train", "val", root)
    tables = {"train": train.to_table(), "val": val.to_table()}
    return {s: dict(zip(t["name"].to_pylist(), t["label"].to_pylist(), strict=True)) for s, t in tables.items()}


@pytest.fixture
def ilsvrc(tmp_path) -> Path:
    synthetic.write_ilsvrc(tmp_path / "ilsvrc", synthetic.images())
    return tmp_path / "ilsvrc"


WRITERS: dict[str, Callable[[Path, synthetic.Images], None]] = {
    "ilsvrc": synthetic.write_ilsvrc,
    "kaggle": synthetic.write_kaggle,
    "parquet": synthetic.write_parquet,
    "webdataset": synthetic.write_webdataset,
    "folders": synthetic.write_folders,
}


@pytest.mark.parametrize("layout", WRITERS)
def test_each_layout_is_recognized_and_its_images_keep_their_class(layout, tmp_path):
    tree = synthetic.images()
    WRITERS[layout](tmp_path / "source", tree)
    assert detect_layout(tmp_path / "source").name == layout
    run(tmp_path / "source", tmp_path / "set")
    for split, index in zip(tree, open_splits(str(tmp_path / "set"), "train", "val", tmp_path), strict=True):
        assert index.classes == CLASSES
        stored = sorted((CLASSES[label], zlib.crc32(index.read(i))) for i, label in enumerate(index.labels_N))
        plain = [(w, zlib.crc32(c)) for w, fs in tree[split].items() for n, c in fs.items() if is_plain(n)]
        assert len(stored) == sum(map(len, tree[split].values()))
        assert set(plain) <= set(stored)


def is_plain(name: str) -> bool:
    return not any(word in name for word in ("2933", "cmyk", "ycck"))


def test_labels_are_ranks_of_the_wordnet_ids_and_not_ilsvrc2012_ids(ilsvrc, tmp_path):
    run(ilsvrc, tmp_path / "set")
    labels = labels_by_name(tmp_path / "set")
    assert labels["val"]["n04557648/ILSVRC2012_val_00000001.JPEG"] == 2  # the kit's number for it is 1
    for by_name in labels.values():
        for name, label in by_name.items():
            assert CLASSES[label] == name.partition("/")[0]


@pytest.mark.parametrize("flat_labels", [synthetic.write_devkit, synthetic.write_kaggle_labels])
def test_a_flat_validation_folder_needs_a_list_of_labels(flat_labels, tmp_path):
    tree = synthetic.images()
    synthetic.write_folders(tmp_path / "source", tree, flat_val=True)
    with pytest.raises(DataError, match="is flat: .* would be one class. Put ILSVRC2012_devkit_t12.tar.gz or"):
        run(tmp_path / "source", tmp_path / "set")
    flat_labels(tmp_path / "source", tree)
    run(tmp_path / "source", tmp_path / "set")
    assert labels_by_name(tmp_path / "set")["val"]["n04557648/ILSVRC2012_val_00000001.JPEG"] == 2


def test_unusual_formats_are_converted_to_jpegs_of_the_same_colors(ilsvrc, tmp_path):
    done = run(ilsvrc, tmp_path / "set")
    assert done.manifest.made["converted"] == 3
    train, _ = open_splits(str(tmp_path / "set"), "train", "val", tmp_path)
    names = train.to_table()["name"].to_pylist()
    for i in range(len(train)):
        with ignore_pil_warnings(), Image.open(io.BytesIO(train.read(i))) as image:
            assert (image.format, image.mode in ("L", "RGB")) == ("JPEG", True), names[i]
            assert image.size == (train.widths_N[i], train.heights_N[i])
    for number, name in ((50, "2933"), (51, "cmyk"), (52, "ycck")):
        with Image.open(io.BytesIO(train.read(names.index(f"n02105855/n02105855_{name}.JPEG")))) as image:
            expected = np.asarray(synthetic.image(number), np.float64)
            assert np.abs(np.asarray(image, np.float64) - expected).mean() < 6, name
    turned = names.index("n02105855/n02105855_turned.JPEG")
    assert (train.widths_N[turned], train.heights_N[turned]) == (80, 40)  # as stored: EXIF orientation is not applied
    assert "n02105855/it's a #1 \u00e9\u4f8b.jpg" in names


def test_shards_are_read_by_the_webdataset_package(ilsvrc, tmp_path):
    run(ilsvrc, tmp_path / "set")
    train, _ = open_splits(str(tmp_path / "set"), "train", "val", tmp_path)
    files = sorted(str(file) for file in (tmp_path / "set" / "train").iterdir())
    assert len(files) > 1
    dataset = webdataset.WebDataset(files, shardshuffle=False).decode("rgb8").to_tuple("jpg", "cls")
    with ignore_pil_warnings():
        decoded = list(dataset)
    assert [label for _, label in decoded] == train.labels_N.tolist()
    for i, (image, _) in enumerate(decoded):
        assert image.shape[:2] == (train.heights_N[i], train.widths_N[i])


def test_same_input_and_seed_give_the_same_bytes_at_any_number_of_processes(ilsvrc, tmp_path):
    run(ilsvrc, tmp_path / "one")
    with Pool(3) as pool:
        prepare(ilsvrc, tmp_path / "three", SMALL, pool)
    first = contents(tmp_path / "one")
    assert contents(tmp_path / "three") == first
    assert not any(".prepare" in name for name in first)
    run(ilsvrc, tmp_path / "other", PrepareOptions(shard_bytes=20_000, seed=1))
    assert contents(tmp_path / "other")["train/train-000000.tar"] != first["train/train-000000.tar"]


def test_shards_are_in_a_shuffled_order(ilsvrc, tmp_path):
    run(ilsvrc, tmp_path / "set")
    train, _ = open_splits(str(tmp_path / "set"), "train", "val", tmp_path)
    assert train.labels_N.tolist() != sorted(train.labels_N)


def test_class_folders_as_target(ilsvrc, tmp_path):
    tree = synthetic.images()
    tree["train"]["n01440764"]["a.png"] = synthetic.encoded(synthetic.image(80), "PNG")
    synthetic.write_ilsvrc(ilsvrc, tree)
    run(ilsvrc, tmp_path / "set", PrepareOptions(to="folders"))
    root = tmp_path / "set"
    assert (root / "train" / "n01440764" / "n01440764_0.JPEG").read_bytes() == tree["train"]["n01440764"][
        "n01440764_0.JPEG"
    ]
    with Image.open(root / "train" / "n01440764" / "a.png.jpg") as image:
        assert image.format == "JPEG"
    indexes = open_splits(str(root), "train", "val", tmp_path)
    assert sorted(str(index.path(i).relative_to(root)) for index in indexes for i in range(len(index))) == sorted(
        name for name in contents(root) if name.startswith(("train/", "val/"))
    )


def test_reencoding_limits_the_shorter_side_and_never_enlarges_a_file(tmp_path):
    tree = synthetic.images()
    tree["train"]["n01440764"]["big.JPEG"] = synthetic.encoded(synthetic.image(90, (800, 600)), quality=98)
    tree["train"]["n01440764"]["rough.JPEG"] = synthetic.encoded(synthetic.image(91), quality=20)
    synthetic.write_folders(tmp_path / "source", tree)
    run(tmp_path / "source", tmp_path / "set", PrepareOptions(shorter_side=48, quality=90))
    train, _ = open_splits(str(tmp_path / "set"), "train", "val", tmp_path)
    assert (np.minimum(train.widths_N, train.heights_N) <= 48).all()
    names = train.to_table()["name"].to_pylist()
    big = names.index("n01440764/big.JPEG")
    assert (train.widths_N[big], train.heights_N[big]) == (64, 48)
    run(tmp_path / "source", tmp_path / "kept", PrepareOptions(shorter_side=600, quality=90))
    train, _ = open_splits(str(tmp_path / "kept"), "train", "val", tmp_path)
    rough = train.to_table()["name"].to_pylist().index("n01440764/rough.JPEG")
    assert train.read(rough).tobytes() == tree["train"]["n01440764"]["rough.JPEG"]


def test_a_prepared_set_is_a_source_too(ilsvrc, tmp_path):
    for to in ("shards", "folders"):
        run(ilsvrc, tmp_path / to, PrepareOptions(to=to))
        run(tmp_path / to, tmp_path / f"from-{to}", PrepareOptions(to="folders", shorter_side=40))
        assert detect_layout(tmp_path / to).name == "prepared"
    assert contents(tmp_path / "from-folders" / "train") == contents(tmp_path / "from-shards" / "train")


KILLED = """
import sys
from pathlib import Path
from pipeline.data.images import ignore_pil_warnings
from pipeline.data.tools.pool import Pool
from pipeline.data.tools.prepare import PrepareOptions, prepare

if __name__ == "__main__":
    with Pool(2, lambda description, done, total: print(description, done, total, flush=True)) as pool:
        prepare(Path(sys.argv[1]), Path(sys.argv[2]), PrepareOptions(shard_bytes=60_000, shorter_side=300), pool)
"""


@pytest.mark.slow
def test_a_killed_preparation_resumes_and_gives_the_same_bytes(tmp_path):
    tree = synthetic.images()
    for i in range(60):
        tree["train"]["n01440764"][f"more_{i}.JPEG"] = synthetic.encoded(synthetic.image(200 + i, (640, 480)))
    synthetic.write_ilsvrc(tmp_path / "source", tree)
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    target = tmp_path / "set"
    command = [sys.executable, str(script), str(tmp_path / "source"), str(target)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            description, done, total = line.split()
            if description == "preparing" and int(done) > int(total) / 4:
                break
        os.kill(process.pid, signal.SIGKILL)
        process.stdout.read()  # returns when the workers, which share it, have ended
    assert read_manifest(target) is None
    finished = {f: f.stat().st_mtime_ns for f in target.glob("*/*.tar")}
    assert finished
    (target / ".prepare" / "train-000099.123.tmp").write_bytes(b"half")
    with pytest.raises(DataError, match="unfinished preparation of other images, with other options"):
        run(tmp_path / "source", target, PrepareOptions(shard_bytes=60_000, shorter_side=200))
    resumed = run(tmp_path / "source", target, PrepareOptions(shard_bytes=60_000, shorter_side=300))
    assert 0 < resumed.parts_reused < resumed.parts
    assert {f: f.stat().st_mtime_ns for f in finished} == finished
    run(tmp_path / "source", tmp_path / "whole", PrepareOptions(shard_bytes=60_000, shorter_side=300))
    assert contents(target) == contents(tmp_path / "whole")


@pytest.mark.parametrize("layout", ["ilsvrc", "parquet"])
def test_shares_on_several_machines_write_the_same_bytes_as_one_process(layout, tmp_path):
    source = tmp_path / "source"
    WRITERS[layout](source, synthetic.images())
    whole = run(source, tmp_path / "whole")
    target = tmp_path / "set"
    done = [run(source, target, share=(k, 3)) for k in (2, 0)]
    assert [share.manifest for share in done] == [None, None]
    assert done[1].parts_missing > 0
    assert run(source, target, share=(2, 3)).parts_reused == done[0].parts, "finished parts are written again"
    with pytest.raises(DataError, match="another number of shares or by an earlier version"):
        run(source, target)
    last = run(source, target, share=(1, 3))
    assert last.parts + done[0].parts + done[1].parts == whole.parts
    assert contents(target) == contents(tmp_path / "whole")
    assert run(source, target, share=(0, 3)).parts == 0


def test_shares_at_the_same_time_complete_the_set_once(ilsvrc, tmp_path):
    target = tmp_path / "set"
    program = "import sys; from launch.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", program, "data", "prepare", str(ilsvrc), str(target), "--shard-size", "0.02"]
    shares = [subprocess.Popen([*command, "--workers=1", f"--share={k}/3"], stdout=subprocess.PIPE) for k in range(3)]
    printed = [share.communicate(timeout=120)[0].decode() for share in shares]
    assert [share.returncode for share in shares] == [0, 0, 0], printed
    run(ilsvrc, tmp_path / "whole")
    assert contents(target) == contents(tmp_path / "whole")


def test_a_finished_set_is_not_rewritten_and_another_is_refused(ilsvrc, tmp_path):
    first = run(ilsvrc, tmp_path / "set")
    before = contents(tmp_path / "set")
    assert run(ilsvrc, tmp_path / "set").manifest == first.manifest
    assert contents(tmp_path / "set") == before
    with pytest.raises(DataError, match="already contains a data set of other images, of other options, or in"):
        run(ilsvrc, tmp_path / "set", PrepareOptions(shard_bytes=20_000, seed=9))


def test_a_preparation_is_not_continued_in_another_sample_order(ilsvrc, tmp_path, monkeypatch):
    with monkeypatch.context() as earlier:
        earlier.setattr("pipeline.data.tools.prepare.ORDER_VERSION", ORDER_VERSION - 1)
        assert run(ilsvrc, tmp_path / "set", share=(0, 3)).parts_missing > 0
        run(ilsvrc, tmp_path / "whole")
    before = sorted((tmp_path / "set").glob("*/*.tar"))
    with pytest.raises(DataError, match="earlier version, whose sample order differs: repeat that command, with that"):
        run(ilsvrc, tmp_path / "set", share=(1, 3))
    assert sorted((tmp_path / "set").glob("*/*.tar")) == before
    with pytest.raises(DataError, match="in the sample order of an earlier version: choose another folder"):
        run(ilsvrc, tmp_path / "whole")
    options = PrepareOptions(to="folders")
    with monkeypatch.context() as earlier:
        earlier.setattr("pipeline.data.tools.prepare.ORDER_VERSION", ORDER_VERSION - 1)
        run(ilsvrc, tmp_path / "folders", options)
    run(ilsvrc, tmp_path / "folders", options)  # whose images have no order


def test_corrupt_images_are_all_named_or_skipped(tmp_path):
    tree = synthetic.images()
    files = tree["train"]["n01440764"]
    files["cut.JPEG"] = files["n01440764_0.JPEG"][:-40]
    files["page.JPEG"] = b"<html>404 Not ImageLocation</html>"
    files["empty.JPEG"] = b""
    synthetic.write_ilsvrc(tmp_path / "source", tree)
    with pytest.raises(DataError) as error:
        run(tmp_path / "source", tmp_path / "set")
    for words in ("3 corrupt", "cut.JPEG", "is a truncated JPEG", "begins with '<html>404", "it is empty"):
        assert words in str(error.value)
    assert read_manifest(tmp_path / "set") is None
    done = run(tmp_path / "source", tmp_path / "set", skip_corrupt=True)
    assert len(done.skipped_corrupt) == 3
    assert done.manifest.splits["train"].samples == sum(map(len, tree["train"].values())) - 3
    assert json.loads((tmp_path / "set" / "dataset.json").read_text())["made"]["ignored"] == done.skipped_corrupt


def test_no_class_may_become_empty(tmp_path):
    tree = synthetic.images()
    tree["train"]["n01440764"] = {"a.JPEG": b"nothing"}
    synthetic.write_ilsvrc(tmp_path / "source", tree)
    with pytest.raises(DataError, match="the training split has no readable image of the classes n01440764"):
        run(tmp_path / "source", tmp_path / "set", skip_corrupt=True)


def cut(name: str, keep: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        (root / name).write_bytes(keep((root / name).read_bytes()))

    return change


def escaping(root: Path) -> None:
    inner = synthetic.tar({"../../evil.JPEG": b"x"})
    (root / "ILSVRC2012_img_train.tar").write_bytes(synthetic.tar({"n01440764.tar": inner}))


def inner_cut(root: Path) -> None:
    inner = synthetic.tar({"a.JPEG": b"x" * 2000})[:-9000]
    (root / "ILSVRC2012_img_train.tar").write_bytes(synthetic.tar({"n01440764.tar": inner}))


@pytest.mark.parametrize(
    ("corruption", "message"),
    [
        (
            cut("ILSVRC2012_img_train.tar", lambda c: c[:-30_000]),
            "img_train.tar is truncated: its end-of-archive marker is missing",
        ),
        (cut("ILSVRC2012_img_val.tar", lambda c: c[: len(c) // 2]), "img_val.tar is truncated"),
        (inner_cut, "img_train.tar, n01440764.tar is truncated"),
        (escaping, "'../../evil.JPEG' has a path outside the archive"),
        (cut("ILSVRC2012_devkit_t12.tar.gz", lambda c: c[:200]), "devkit_t12.tar.gz cannot be read"),
        (lambda r: (r / "ILSVRC2012_devkit_t12.tar.gz").unlink(), "lacks ILSVRC2012_devkit_t12.tar.gz"),
        (lambda r: (r / "ILSVRC2012_img_val.tar").unlink(), "lacks ILSVRC2012_img_val.tar"),
        (cut("ILSVRC2012_img_train.tar", lambda c: b"PK" * 600), "cannot be read as an uncompressed tar archive"),
    ],
)
def test_corrupt_archives_are_named(corruption, message, ilsvrc, tmp_path):
    corruption(ilsvrc)
    with pytest.raises(DataError, match=message):
        run(ilsvrc, tmp_path / "set")


def shard(files: dict[str, bytes]) -> Callable[[Path], None]:
    return lambda root: (root / "x-train-0.tar").write_bytes(synthetic.tar(files)) and None


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (shard({"a.jpg": b"x"}), "x-train-0.tar: 1 images have no label in a .cls or .json: a.jpg"),
        (shard({"a.jpg": b"x", "a.cls": b"-1"}), "1 images have negative labels, as test sets do"),
        (shard({"a.jpg": b"x", "a.cls": b"cat"}), "x-train-0.tar, a.cls: the label must be an integer"),
        (shard({"a.jpg": b"x", "a.png": b"x", "a.cls": b"1"}), "a sample has two images, a.jpg and a.png"),
        (shard({"a.jpg": b"x", "a.cls": b"1", "a.json": b'{"label": 2}'}), "a.json has label 2, a.cls has 1"),
        (lambda r: (r / "unclear.tar").write_bytes(synthetic.tar({})), "split unclear: unclear.tar"),
    ],
)
def test_corrupt_shards_are_named(write, message, tmp_path):
    synthetic.write_webdataset(tmp_path / "source", synthetic.images())
    write(tmp_path / "source")
    with pytest.raises(DataError, match=message):
        run(tmp_path / "source", tmp_path / "set")


def test_numbers_are_labels_where_names_hold_no_wordnet_ids(tmp_path):
    tree = {
        split: {w: {f"p{i}.jpg": c for i, c in enumerate(files.values())} for w, files in classes.items()}
        for split, classes in synthetic.images().items()
    }
    synthetic.write_parquet(tmp_path / "named", tree, ("zebra", "ant", "cow"), prefix="")
    done = run(tmp_path / "named", tmp_path / "set")
    assert done.manifest.classes == ("zebra", "ant", "cow")  # labels keep their meaning: names are not sorted
    synthetic.write_parquet(tmp_path / "plain", tree, None, prefix="")
    assert run(tmp_path / "plain", tmp_path / "set2").manifest.classes == ("0", "1", "2")


def test_unknown_and_ambiguous_layouts_are_refused(tmp_path, ilsvrc):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"has no known layout; it contains: nothing. Supported layouts:\n  prepared"):
        run(tmp_path / "empty", tmp_path / "set")
    with pytest.raises(DataError, match="is not a folder"):
        run(tmp_path / "gone", tmp_path / "set")
    with pytest.raises(DataError, match="layout 'imagnet' is unknown: use prepared, ilsvrc"):
        run(ilsvrc, tmp_path / "set", layout="imagnet")
    synthetic.write_folders(ilsvrc, synthetic.images())
    with pytest.raises(DataError, match="matches several layouts, ilsvrc and folders: choose one with --layout"):
        run(ilsvrc, tmp_path / "set")
    assert run(ilsvrc, tmp_path / "set", layout="folders").manifest.made["from"] == "folders"


def test_targets_that_cannot_be_used_are_refused(ilsvrc, tmp_path, monkeypatch):
    with pytest.raises(DataError, match="must not be inside the source"):
        run(ilsvrc, ilsvrc / "set")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    with pytest.raises(DataError, match=r"is not empty \(it contains thesis.tex\)"):
        run(ilsvrc, tmp_path / "full")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 1000}))
    with pytest.raises(DataError, match=r"has 1.0 KB free, the images need about \d+\.\d KB"):
        run(ilsvrc, tmp_path / "set")


def test_two_preparations_of_one_target_are_refused(ilsvrc, tmp_path):
    from filelock import FileLock

    (tmp_path / "set" / ".prepare").mkdir(parents=True)
    with (
        FileLock(tmp_path / "set" / ".prepare" / "lock.0"),
        pytest.raises(DataError, match="another process is preparing"),
    ):
        run(ilsvrc, tmp_path / "set")


def test_a_killed_worker_is_an_error(tmp_path):
    with pytest.raises(DataError, match="a worker process died without an error"), Pool(2) as pool:
        pool.map(_die, [1], "dying")


def _die(task: int) -> None:
    time.sleep(0)
    os.kill(os.getpid(), signal.SIGKILL)
