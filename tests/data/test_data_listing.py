"""Listing folders: links, special files, hidden files, names; each entry is listed, named as a problem, or counted."""

import os
import socket
from pathlib import Path

import pytest

from pipeline.data.dataset import open_splits
from pipeline.data.folder_index import scan_images
from pipeline.data.ignored import IgnoredFiles
from pipeline.data.listing import HIDDEN, SYSTEM, tree
from pipeline.data.tools.pool import Pool
from pipeline.data.tools.prepare import PrepareOptions, prepare
from pipeline.data.tools.stats import stats
from pipeline.data.tools.verify import verify
from pipeline.errors import DataError
from tests.data.conftest import write_image


def add_special_files(folder: Path) -> dict[str, str]:
    """Puts special files and broken links into a folder, and returns their problems by name."""
    os.mkfifo(folder / "fifo.jpg")
    (folder / "broken.jpg").symlink_to("/dev/null/gone")
    (folder / "self.jpg").symlink_to("self.jpg")
    (folder / "null.jpg").symlink_to("/dev/null")
    (folder / "lost.jpg").symlink_to("lost/further.jpg")
    previous = os.getcwd()
    os.chdir(folder)  # the path of a socket is 107 bytes long at most
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind("socket.jpg")
    finally:
        os.chdir(previous)
    with open(os.fsencode(folder) + b"/\xff.jpg", "wb") as file:
        file.write(b"x")
    return {
        "fifo.jpg": "is a FIFO, not a file",
        "broken.jpg": "is a broken link to /dev/null/gone",
        "self.jpg": "cannot be read (Too many levels of symbolic links)",
        "null.jpg": "is a device, not a file",
        "lost.jpg": "is a broken link to lost/further.jpg",
        "socket.jpg": "is a socket, not a file",
        "\\xff.jpg": "has a name that is not UTF-8: rename it",
    }


def test_special_files_are_named_and_nothing_hangs(tmp_path):
    write_image(tmp_path / "set" / "a.jpg", 0, 40, 40)
    problems = add_special_files(tmp_path / "set")
    index, found, _ = scan_images(tmp_path / "set")
    assert index.to_table()["path"].to_pylist() == ["a.jpg"]
    assert found == problems


def test_linked_folders_are_followed_and_each_is_listed_once(tmp_path):
    root = tmp_path / "set"
    for name in ("set/m/1.jpg", "elsewhere/2.jpg", "elsewhere/deep/3.jpg", "more/4.jpg"):
        write_image(tmp_path / name, 0, 40, 40)
    (root / "a-link-to-m").symlink_to("m")
    (root / "out").symlink_to(tmp_path / "elsewhere")
    (root / "out-again").symlink_to(tmp_path / "elsewhere" / "deep")
    (root / "m" / "up").symlink_to("..")
    (tmp_path / "elsewhere" / "onward").symlink_to(tmp_path / "more")
    (tmp_path / "more" / "back").symlink_to(tmp_path / "elsewhere")
    (root / "same.jpg").symlink_to("m/1.jpg")
    found = tree(root)
    assert list(found.files) == ["m/1.jpg", "out/2.jpg", "out/deep/3.jpg", "out/onward/4.jpg", "same.jpg"]
    assert found.problems == {
        "a-link-to-m": "is a link to a folder that is already listed as m",
        "m/up": "is a link to a folder that is already listed as .",
        "out-again": "is a link to a folder that is already listed as out/deep",
        "out/onward/back": "is a link to a folder that is already listed as out",
    }


def test_hidden_files_are_counted(tmp_path):
    names = (".DS_Store", "._a.jpg", "Thumbs.db", ".hidden.jpg", ".git/config", "__MACOSX/a.jpg", "@eaDir/a.jpg")
    for name in ("a.jpg", *names):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    found = tree(tmp_path)
    assert list(found.files) == ["a.jpg"]
    assert found.ignored.counts() == {SYSTEM: 5, HIDDEN: 2}
    assert found.ignored.lines(exclude=SYSTEM) == [f"2 {HIDDEN}: .git, .hidden.jpg"]


def test_counts_of_several_processes_are_merged():
    first, second = IgnoredFiles(), IgnoredFiles()
    for i in range(5):
        first.add("files", str(i))
    second.add("files", "5")
    second.add("links", "x")
    first.merge(second)
    assert first.lines() == ["6 files: 0, 1, 2, ...", "1 links: x"]
    assert not IgnoredFiles()


@pytest.mark.skipif(os.geteuid() == 0, reason="root can read everything")
def test_a_folder_that_cannot_be_listed_is_named(tmp_path):
    (tmp_path / "closed").mkdir(mode=0)
    assert tree(tmp_path).problems == {"closed": "cannot be listed (Permission denied)"}


def test_class_folders_with_special_files_are_refused_by_name_or_skipped(folders, tmp_path):
    root = folders()
    problems = add_special_files(root / "train" / "b")
    with pytest.raises(DataError) as error:
        open_splits(str(root), "train", "val", tmp_path / "cache")
    assert "7 of 48 files in" in str(error.value)
    warnings: list[str] = []
    train, _ = open_splits(str(root), "train", "val", tmp_path / "cache", True, warnings.append)
    assert len(train) == 41
    assert warnings[0].startswith("7 of 48 training files are skipped:")
    for name in sorted(problems.keys() - {"\\xff.jpg"})[:5]:
        assert f"\n  train/b/{name}: {problems[name]}\n" in str(error.value)
        assert f"\n  train/b/{name}: {problems[name]}\n" in warnings[0]
    with Pool(1) as pool:
        report = verify(root, pool)
        assert {f.where: f.detail for f in report.errors} == {
            f"train/b/{n}": problem for n, problem in problems.items()
        }
        assert stats(root, 0, pool).splits["train"].unreadable == 7
        with pytest.raises(DataError, match="7 corrupt images in"):
            prepare(root, tmp_path / "refused", PrepareOptions(), pool)
        done = prepare(root, tmp_path / "made", PrepareOptions(), pool, skip_corrupt=True)
    assert len(done.skipped_corrupt) == 7
    assert done.manifest.splits["train"].samples == 41


def test_a_class_folder_may_be_a_link_but_not_to_another_class(folders, tmp_path):
    root = folders()
    (root / "train" / "b").rename(tmp_path / "elsewhere")
    (root / "train" / "b").symlink_to(tmp_path / "elsewhere")
    assert len(open_splits(str(root), "train", "val", tmp_path / "cache")[0]) == 41
    (root / "train" / "d").symlink_to("a")
    with pytest.raises(DataError, match=r"train/a and .*/train/d are the same folder, but would be two"):
        open_splits(str(root), "train", "val", tmp_path / "cache")
    (root / "train" / "d").unlink()
    (root / "train" / "d").symlink_to("/dev/null/gone")
    with pytest.raises(DataError, match="train/d is a broken link to /dev/null/gone. Fix or remove it"):
        open_splits(str(root), "train", "val", tmp_path / "cache")


def test_hidden_images_are_warnings_before_training_and_system_files_are_not(folders, tmp_path):
    root = folders()
    (root / "train" / "a" / ".DS_Store").write_bytes(b"x")
    (root / "val" / ".ipynb_checkpoints").mkdir()
    warnings: list[str] = []
    open_splits(str(root), "train", "val", tmp_path / "cache", warn=warnings.append)
    assert warnings == []
    (root / "train" / "a" / "it's 000.JPEG").rename(root / "train" / "a" / ".0.jpg")
    open_splits(str(root), "train", "val", tmp_path / "cache", warn=warnings.append)
    assert warnings == [f"ignored: 1 {HIDDEN}: train/a/.0.jpg"]
