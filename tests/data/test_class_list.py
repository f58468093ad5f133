"""Class lists: columns, separators, comments, and errors that name the line."""

from pathlib import Path

import pytest

from pipeline.data.class_list import read_class_list, relabel
from pipeline.errors import DataError

KNOWN = ("n01440764", "n01443537", "n02105855", "n04557648", "golden retriever", "\u00e9t\u00e9")


def write(folder: Path, text: str, name: str = "classes.txt") -> Path:
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("n01440764\nn02105855\n", {"n01440764": "n01440764", "n02105855": "n02105855"}),
        (
            "\ufeff# ids\n\n n01440764  # tench\nn01440764\nn02105855 dog\n",
            {"n01440764": "n01440764", "n02105855": "dog"},
        ),
        ("n01440764 fish\nn01443537 fish\nn02105855 dog\n", dict(zip(KNOWN, ("fish", "fish", "dog"), strict=False))),
        ("golden retriever,dog\nn01440764,fish\n", {"golden retriever": "dog", "n01440764": "fish"}),
        ('golden retriever\n"n01440764", "fish, salt water"\n', {KNOWN[4]: KNOWN[4], KNOWN[0]: "fish, salt water"}),
        ("golden retriever\tgood dog\nn01440764\n", {"golden retriever": "good dog", "n01440764": "n01440764"}),
        ("e\u0301te\u0301 bar\nn01440764\n", {"\u00e9t\u00e9": "bar", "n01440764": "n01440764"}),
    ],
)
def test_a_list_chooses_and_merges_classes(text, expected, tmp_path):
    assert read_class_list(write(tmp_path, text), KNOWN) == expected


def test_a_csv_file_with_one_column_has_names_with_spaces(tmp_path):
    file = write(tmp_path, "golden retriever\nn01440764\n", "classes.csv")
    assert set(read_class_list(file, KNOWN)) == {"golden retriever", "n01440764"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("n01440765\nn02105855\nn9\n", r"2 classes that do not exist: 'n01440765' \(similar: 'n01440764'\), 'n9'\."),
        ("n01440764 a\nn01440764 b\n", "line 2: class n01440764 becomes b, and a in an earlier line"),
        ("n01440764 tench fish\n", "line 1: 'n01440764 tench fish' has 3 columns or an empty one"),
        ("n01440764,\nn02105855,x\n", "line 1: 'n01440764 ' has 2 columns or an empty one"),
        ("# nothing\n", "leaves no class: list at least two classes"),
        ("n01440764 fish\nn01443537 fish\n", "leaves only the class fish: list at least two classes"),
    ],
)
def test_a_wrong_list_is_an_error_that_names_the_line(text, message, tmp_path):
    with pytest.raises(DataError, match=message):
        read_class_list(write(tmp_path, text), KNOWN)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(DataError, match=r"gone.txt cannot be read as a list of classes"):
        read_class_list(tmp_path / "gone.txt", KNOWN)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="save it as text in UTF-8"):
        read_class_list(tmp_path / "binary", KNOWN)


def test_labels_follow_the_order_of_the_classes():
    known = ("zebra", "ant", "cow")
    classes, labels_K = relabel({"cow": "cow", "zebra": "zebra"}, known)
    assert (classes, labels_K.tolist()) == (("zebra", "cow"), [0, -1, 1])
    classes, labels_K = relabel({"cow": "mammal", "zebra": "mammal", "ant": "insect"}, known)
    assert (classes, labels_K.tolist()) == (("insect", "mammal"), [1, 0, 1])
