"""Files and folders that are there whole or not at all."""

import pytest

from pipeline.files import atomic_file, atomic_folder, write_text


def test_a_file_that_fails_leaves_the_old_one_and_no_litter(tmp_path):
    file = tmp_path / "table.csv"
    write_text(file, "old")
    with pytest.raises(OSError, match="disk full"), atomic_file(file) as aside:
        assert (aside.suffix, aside.parent) == (".csv", tmp_path)
        aside.write_text("half")
        raise OSError("disk full")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("table.csv", "old")]
    write_text(file, "new ä")
    assert file.read_text(encoding="utf-8") == "new ä"


def test_a_folder_appears_whole_and_the_first_one_stays(tmp_path):
    folder = tmp_path / "set"
    with pytest.raises(ZeroDivisionError), atomic_folder(folder) as aside:
        (aside / "part").touch()
        1 / 0  # noqa: B018
    assert list(tmp_path.iterdir()) == []
    with atomic_folder(folder) as second:
        (second / "part").write_text("second")
        folder.mkdir()
        (folder / "part").write_text("first")
    assert [(p.name, p.read_text()) for p in tmp_path.glob("*/*")] == [("part", "first")]
    assert list(tmp_path.iterdir()) == [folder]
