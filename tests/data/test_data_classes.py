"""Class checks before training: invalid sets of classes are errors, suspicious ones are warnings."""

import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.data.class_names import class_name_warnings
from pipeline.data.dataset import open_split, open_splits
from pipeline.data.tools.index_in_place import index_in_place
from pipeline.data.tools.layouts import detect_layout
from pipeline.data.tools.pool import Pool
from pipeline.data.tools.prepare import PrepareOptions, prepare
from pipeline.data.tools.verify import verify
from pipeline.errors import DataError
from tests.data import synthetic

NFC = "\u00e9lan"
NFD = unicodedata.normalize("NFD", NFC)


def open_warnings(root: Path, train: str = "train", val: str = "val") -> list[str]:
    """Returns the warnings that opening the splits for training gives."""
    lines: list[str] = []
    open_splits(str(root), train, val, root.parent / "cache", warn=lines.append)
    return lines


def write(root: Path, train: list[str], val: list[str]) -> Path:
    """Two images for each class folder."""
    for split, classes in (("train", train), ("val", val)):
        for i, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for j in range(2):
                content = synthetic.encoded(synthetic.image(10 * i + j + 1000 * (split == "val"), (40, 40)))
                (root / split / name / f"{j}.jpg").write_bytes(content)
    return root


def test_a_single_class_is_refused_for_training(tmp_path):
    root = write(tmp_path / "set", ["images"], ["images"])
    (root / "labels.txt").write_text("x")
    with pytest.raises(DataError, match="has only one class, images: any prediction would be correct"):
        open_warnings(root)
    (root / "labels.csv").write_text("image,what\n")
    with pytest.raises(DataError, match=r"CSV file \(labels.csv may hold them\), `densenet data prepare` creates"):
        open_warnings(root)
    with Pool(1) as pool:
        assert [f.kind for f in verify(root, pool).errors] == ["classes"]
        for make in (
            lambda: index_in_place(root, pool),
            lambda: prepare(root, tmp_path / "made", PrepareOptions(), pool),
        ):
            with pytest.raises(DataError, match="has only one class"):
                make()
    assert len(open_split(root, "val", tmp_path / "cache")) == 2  # a model that knows the class can be evaluated


def test_an_index_with_other_classes_than_its_data_set_is_refused(tmp_path):
    root = write(tmp_path / "set", ["a", "b"], ["a"])
    with Pool(1) as pool:
        index_in_place(root, pool)
    text = (root / "dataset.json").read_text()
    (root / "dataset.json").write_text(text.replace('"a",\n  "b"', '"a"'))
    with pytest.raises(DataError, match="they belong to different data sets"):
        open_warnings(root)


def test_classes_without_validation_images_are_named(tmp_path):
    root = write(tmp_path / "set", ["a", "b", "c"], ["b"])
    line = "val has no image of 2 of the 3 classes: a, c"
    assert open_warnings(root) == [line]
    with Pool(1) as pool:
        report = verify(root, pool)
        assert [(f.kind, f.detail) for f in report.findings if f.kind == "absent"] == [("absent", line)]
        assert report.errors == []
        assert prepare(root, tmp_path / "made", PrepareOptions(), pool).notes == [line]
        assert index_in_place(root, pool)[1] == [line]
    assert open_warnings(root) == [line]


def test_an_unread_label_list_is_a_warning(tmp_path):
    root = write(tmp_path / "set", ["part1", "part2"], ["part1", "part2"])
    (root / "notes.csv").write_text("a,b\n")
    assert open_warnings(root) == []
    (root / "labels.csv").write_text("file,label\n0.jpg,cat\n")
    line = f"{root}/labels.csv is ignored, labels follow from the class folders: `densenet data prepare` reads it"
    assert open_warnings(root) == [line]


def test_the_same_split_for_training_and_evaluation_is_a_warning(tmp_path):
    root = write(tmp_path / "set", ["a", "b"], ["a", "b"])
    assert open_warnings(root, "train", "train") == [
        "data.train and data.val are both 'train': the training images are evaluated"
    ]
    shutil.rmtree(root / "val")
    (root / "val").symlink_to("train")
    assert open_warnings(root) == [
        f"{root}/train and {root}/val are the same folder: the training images are evaluated"
    ]


@pytest.mark.parametrize(
    ("classes", "line"),
    [
        (
            ("Cat", "cat", "dog"),
            "classes whose names differ only in case or spaces are different classes: 'Cat' and 'cat'",
        ),
        (("a  b", "a b"), "classes whose names differ only in case or spaces are different classes: 'a  b' and 'a b'"),
        (("cat ", "dog"), "class names begin or end with spaces: 'cat '"),
        (
            ("0", "1", "10", "2"),
            "class names are numbers, but labels are positions in the sorted list: '10' has label 2, '2' has label 3",
        ),
    ],
)
def test_suspicious_class_names_are_warnings(classes, line, tmp_path):
    assert class_name_warnings(classes) == [line]
    assert open_warnings(write(tmp_path / "set", list(classes), list(classes))) == [line]


def test_plain_class_names_give_no_warning():
    assert class_name_warnings(("0", "1", "2")) == class_name_warnings(("n01440764", "cat", NFC)) == []


@pytest.mark.parametrize(("train", "val"), [(NFC, NFD), (NFD, NFC), (NFD, NFD)])
def test_a_class_is_the_same_in_every_unicode_normal_form(train, val, tmp_path):
    root = write(tmp_path / "set", ["a", train], ["a", val])
    indexes = open_splits(str(root), "train", "val", tmp_path / "cache")
    for index in indexes:
        assert index.classes == ("a", NFC)
        assert index.labels_N.tolist() == [0, 0, 1, 1]
        assert len(index.read(3))
    with Pool(1) as pool:
        assert prepare(root, tmp_path / "made", PrepareOptions(to="folders"), pool).manifest.classes == ("a", NFC)
    assert {path.name for path in (tmp_path / "made" / "val").iterdir()} == {"a", NFC}


def test_duplicate_and_similar_class_folders_are_named(tmp_path):
    root = write(tmp_path / "set", ["a", NFC, NFD], ["a"])
    with pytest.raises(DataError) as error:
        open_warnings(root)
    assert "two folders that are both the class '\u00e9lan', 'e\\u0301lan' and '\\xe9lan'" in str(error.value)
    root = write(tmp_path / "other", ["Cat", "dog "], ["cat", "dog"])
    with pytest.raises(DataError, match=r"lacks: 'cat' \(similar: 'Cat'\), 'dog' \(similar: 'dog '\)"):
        open_warnings(root)


def renamed(**names: str) -> Callable[[Path], None]:
    def rename(root: Path) -> None:
        for old, new in names.items():
            (root / old).rename(root / new)

    return rename


def as_classes(root: Path) -> None:
    shutil.rmtree(root / "val")
    for folder in (root / "train").iterdir():
        folder.rename(root / folder.name)
    (root / "train").rmdir()


def compressed(root: Path) -> None:
    shutil.rmtree(root)
    root.mkdir()
    (root / "train.zip").write_bytes(b"x")


def nested(root: Path) -> None:
    (root / "train" / "a").rename(root / "train" / "aa")
    (root / "train" / "a").mkdir()
    (root / "train" / "aa").rename(root / "train" / "a" / "aa")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (renamed(val="valid"), "has no folder 'val' (in it: train, valid): set data.val=valid, or"),
        (renamed(val="validation"), "set data.val=validation"),
        (renamed(val="test"), "set data.val=test"),
        (renamed(train="Training"), "has no folder 'train' (in it: Training, val): set data.train=Training"),
        (as_classes, "if these are the classes, move them into train and a part of each one's images into val"),
        (compressed, "(in it: train.zip): unpack train.zip first"),
        (
            nested,
            "is a folder inside a class folder, which may contain only image files. If it is the class, and a a group",
        ),
    ],
)
def test_errors_for_wrong_layouts_suggest_a_fix(spoil, message, tmp_path):
    root = write(tmp_path / "set", ["a", "b"], ["a", "b"])
    spoil(root)
    with pytest.raises(DataError) as error:
        open_warnings(root)
    assert message in str(error.value)


def test_other_names_of_the_validation_split_are_found_by_the_tools(tmp_path):
    root = write(tmp_path / "set", ["a", "b"], ["a", "b"])
    (root / "val").rename(root / "valid")
    (root / "extra").mkdir()
    assert detect_layout(root).name == "folders"
    with Pool(1) as pool:
        done = prepare(root, tmp_path / "made", PrepareOptions(), pool)
        assert done.notes == ["ignored: 1 folders next to the data: extra"]
        assert list(done.manifest.splits) == ["train", "val"]
        index_in_place(root, pool)
        assert verify(root, pool).errors == []
        (root / "valid" / "a" / "new.jpg").write_bytes(b"x")
        assert [f.where for f in verify(root, pool).errors] == ["valid/a/new.jpg"]
    assert open_warnings(root) == []
    (root / "dataset.json").unlink()
    (root / "dev").mkdir()
    with pytest.raises(DataError, match="has several folders for val, dev, valid"), Pool(1) as pool:
        verify(root, pool)


@pytest.mark.parametrize(
    ("write_more", "message"),
    [
        (lambda r: (r / "images.zip").write_bytes(b"x"), "Unpack images.zip first. Supported layouts:"),
        (lambda r: (r / "x.csv").write_text("a,b\n"), "x.csv: a label list needs a column of images, `file`"),
    ],
)
def test_a_source_that_is_not_recognized_comes_with_a_hint(write_more, message, tmp_path):
    write_more(tmp_path)
    with pytest.raises(DataError) as error:
        detect_layout(tmp_path)
    assert message in str(error.value)
