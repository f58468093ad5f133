"""The demo data set."""

import hashlib
import multiprocessing

import pytest

from pipeline.data.digits import write_digits
from pipeline.errors import DataError


def test_digits_are_complete_stratified_and_deterministic(tmp_path):
    for name in ("one", "two"):
        write_digits(tmp_path / name)
    files = {s: sorted((tmp_path / "one" / s).glob("*/*.jpg")) for s in ("train", "val")}
    assert (len(files["train"]), len(files["val"])) == (1437, 360)
    assert not {f.name for f in files["train"]} & {f.name for f in files["val"]}
    for digit in range(10):
        assert 34 <= sum(f.parent.name == str(digit) for f in files["val"]) <= 38

    def digest(name: str) -> str:
        content = b"".join(f.read_bytes() for f in sorted((tmp_path / name).glob("*/*/*.jpg")))
        return hashlib.sha256(content).hexdigest()

    assert digest("one") == digest("two")


def test_two_processes_at_once_write_one_set(tmp_path):
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=write_digits, args=(tmp_path / "digits",)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert [entry.name for entry in tmp_path.iterdir()] == ["digits"]


def test_another_folder_is_not_overwritten(tmp_path):
    (tmp_path / "digits").mkdir()
    (tmp_path / "digits" / "mine.txt").write_text("keep")
    with pytest.raises(DataError, match="is not the digits data set"):
        write_digits(tmp_path / "digits")
    assert (tmp_path / "digits" / "mine.txt").read_text() == "keep"


def test_a_complete_folder_is_not_written_again(tmp_path):
    write_digits(tmp_path / "digits")
    before = (tmp_path / "digits").stat().st_mtime_ns
    write_digits(tmp_path / "digits")
    assert (tmp_path / "digits").stat().st_mtime_ns == before
