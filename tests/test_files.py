"""Atomic writes of files and folders."""

import pytest

from pipeline.files import atomic_file, atomic_folder, write_text


def test_a_failed_write_keeps_the_old_file_and_leaves_no_temporary_file(tmp_path):
    file = tmp_path / "table.csv"
    write_text(file, "old")
    with pytest.raises(OSError, match="disk full"), atomic_file(file) as temporary:
        assert (temporary.suffix, temporary.parent) == (".csv", tmp_path)
        temporary.write_text("half")
        raise OSError("disk full")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("table.csv", "old")]
    write_text(file, "new ä")
    assert file.read_text(encoding="utf-8") == "new ä"


def test_a_folder_appears_complete_and_the_first_writer_wins(tmp_path):
    folder = tmp_path / "set"
    with pytest.raises(ZeroDivisionError), atomic_folder(folder) as temporary:
        (temporary / "part").touch()
        1 / 0  # noqa: B018
    assert list(tmp_path.iterdir()) == []
    with atomic_folder(folder) as second:
        (second / "part").write_text("second")
        folder.mkdir()
        (folder / "part").write_text("first")
    assert [(p.name, p.read_text()) for p in tmp_path.glob("*/*")] == [("part", "first")]
    assert list(tmp_path.iterdir()) == [folder]
