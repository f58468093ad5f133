"""Labels in CSV files: accepted formats and refused lists."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.data.dataset import open_splits
from pipeline.data.tools.index_in_place import index_in_place
from pipeline.data.tools.layouts import detect_layout
from pipeline.data.tools.pool import Pool
from pipeline.data.tools.prepare import PrepareOptions, PrepareResult, prepare
from pipeline.data.tools.verify import verify
from pipeline.errors import DataError
from tests.data import synthetic

CLASSES = ("cat", "dog")


@pytest.fixture
def images(tmp_path) -> Path:
    """Writes six training and four validation images to train/images and val/images; even ones are cats."""
    for split, count in (("train", 6), ("val", 4)):
        (tmp_path / "source" / split / "images").mkdir(parents=True)
        for i in range(count):
            content = synthetic.encoded(synthetic.image(i + 10 * (split == "val"), (40, 40)))
            (tmp_path / "source" / split / "images" / f"{split}{i}.jpg").write_bytes(content)
    return tmp_path / "source"


def lines(name: str, *columns: str, separator: str = ",") -> str:
    """Returns a list of all images; `name` is a format string with the fields split, i and kind."""
    rows = [(split, i, CLASSES[i % 2]) for split, count in (("train", 6), ("val", 4)) for i in range(count)]
    head = separator.join(columns)
    return "\n".join([head, *(name.format(split=split, i=i, kind=kind) for split, i, kind in rows)]) + "\n"


def prepared(source: Path) -> PrepareResult:
    with Pool(1) as pool:
        return prepare(source, source.parent / "set", PrepareOptions(), pool)


@pytest.mark.parametrize(
    "content",
    [
        lines("{split}{i}.jpg,{kind}", "file", "label"),
        lines("{split}/images/{split}{i}.jpg,{kind}", "path", "class"),
        lines("images/{split}{i}.jpg,{kind}", "file_name", "Class Name"),
        lines("images\\{split}{i}.jpg;{kind}", "filename", "label", separator=";"),
        lines('"{split}{i}","{kind}"', "image_id", "category"),
        "\ufeff" + lines("7,{split}{i},{kind}", "row", "id", "label"),
        lines("{split}{i},{i},{kind},{split}", "id", "n", "label", "split"),
    ],
)
def test_a_list_labels_the_images(content, images):
    (images / "labels.csv").write_text(content, encoding="utf-8")
    assert detect_layout(images).name == "list"
    assert prepared(images).notes == []
    for index in open_splits(str(images.parent / "set"), "train", "val", images.parent):
        assert index.classes == CLASSES
        names = index.to_table()["name"].to_pylist()
        assert len(names) == {"train": 6, "val": 4}[names[0].split("/")[1][:-5]]
        assert all(int(name[-5]) % 2 == label for name, label in zip(names, index.labels_N, strict=True))


def test_a_list_of_each_split_and_other_names_of_splits(images):
    (images / "val").rename(images / "validation")
    text = lines("{split}{i}.jpg,{kind}", "file", "label").splitlines()
    (images / "train.csv").write_text("\n".join(text[:7]))
    (images / "validation" / "metadata.csv").write_text("\n".join([text[0], *text[7:]]))
    assert {name: split.samples for name, split in prepared(images).manifest.splits.items()} == {"train": 6, "val": 4}


def test_images_of_a_test_split_notes_and_labels_without_an_image_are_counted(images):
    content = lines("{split}/images/{split}{i}.jpg,{kind},{split}", "file", "label", "split")
    (images / "labels.csv").write_text(content + "gone.jpg,cat,train\ntest/9.jpg,cat,test\n")
    (images / "test").mkdir()
    for name in ("8.jpg", "9.jpg"):
        (images / "test" / name).write_bytes(synthetic.encoded(synthetic.image(9)))
    (images / "notes.txt").write_text("x")
    (images / "sizes.csv").write_text("a,b\n")
    assert prepared(images).notes == [
        "ignored: 1 files that are not images: notes.txt",
        "ignored: 2 images of a test split: test/8.jpg, test/9.jpg",
        "ignored: 1 labels of images that do not exist: gone.jpg (labels.csv, line 12)",
        "ignored: 1 lines of a test split: labels.csv, line 13",
        "ignored: 1 lists without a column of images and one of labels: sizes.csv",
    ]


def test_labels_that_are_numbers_keep_their_order(images):
    (images / "labels.csv").write_text(lines("{split}{i}.jpg,{i}", "file", "label").replace(".jpg,5", ".jpg,10"))
    for i in range(4, 6):
        (images / "val" / "images" / f"val{i}.jpg").write_bytes(synthetic.encoded(synthetic.image(i)))
    with (images / "labels.csv").open("a") as file:
        file.write("val4.jpg,4\nval5.jpg,10\n")
    done = prepared(images)
    assert done.manifest.classes == ("0", "1", "2", "3", "4", "10")
    assert done.notes == ["class names are numbers, but labels are positions in the sorted list: '10' has label 5"]


def test_it_is_indexed_in_place_and_prepared_as_class_folders(images):
    (images / "labels.csv").write_text(lines("{split}{i}.jpg,{kind}", "file", "label"))
    (images / "train" / "metadata.csv").write_text("a,b\n")
    with Pool(1) as pool:
        assert verify(images, pool).errors == []
        index_in_place(images, pool)
        assert verify(images, pool).errors == []
        shutil.copy(images / "val" / "images" / "val0.jpg", images / "val" / "new.jpg")
        assert [(f.kind, f.where) for f in verify(images, pool).errors] == [("unlisted", "val/new.jpg")]
        train, _ = open_splits(str(images), "train", "val", images.parent)
        assert train.labels_N.tolist() == [0, 0, 0, 1, 1, 1]
        prepare(images, images.parent / "set", PrepareOptions(to="folders"), pool)
    found = sorted(path.name for path in (images.parent / "set" / "train" / "cat").iterdir())
    assert found == ["train0.jpg", "train2.jpg", "train4.jpg"]


def test_a_flat_validation_folder_with_training_class_folders_uses_a_list(tmp_path):
    tree = synthetic.images()
    synthetic.write_folders(tmp_path / "source", tree, flat_val=True)
    rows = [f"{name},{wnid}" for wnid, files in tree["val"].items() for name in files]
    (tmp_path / "source" / "val.csv").write_text("\n".join(["file,label", *rows]))
    assert detect_layout(tmp_path / "source").name == "folders"
    prepared(tmp_path / "source")
    val = open_splits(str(tmp_path / "set"), "train", "val", tmp_path)[1]
    names = val.to_table()["name"].to_pylist()
    assert sorted(names) == sorted(f"{wnid}/{name}" for wnid, files in tree["val"].items() for name in files)


def appended(line: str) -> Callable[[Path], None]:
    def write(root: Path) -> None:
        with (root / "labels.csv").open("a") as file:
            file.write(line + "\n")

    return write


def two_columns(root: Path) -> None:
    (root / "labels.csv").write_text(lines("{split}{i}.jpg,{kind},{i}", "file", "label", "class"))


def only_train(root: Path) -> None:
    (root / "labels.csv").write_text(lines("{split}{i}.jpg,{kind}", "file", "label").split("val0")[0])


def same_names(root: Path) -> None:
    (root / "train" / "images" / "more").mkdir()
    (root / "train" / "images" / "train5.jpg").rename(root / "train" / "images" / "more" / "train0.jpg")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            appended("train1.jpg,cat"),
            "train/images/train1.jpg: labels.csv, line 12 has label cat, labels.csv, line 3 has dog",
        ),
        (appended("train1.jpg"), "labels.csv, line 12: a value is missing, or there are more values than columns"),
        (
            appended("train1.jpg,dog,1"),
            "labels.csv, line 12: a value is missing, or there are more values than columns",
        ),
        (appended("val0.jpg,eel"), "labels.csv, line 12 has label eel, labels.csv, line 8 has cat"),
        (two_columns, "has several columns of labels that differ, label, class: remove all but one"),
        (only_train, "labels.csv lists no existing image of the split val"),
        (same_names, "labels.csv, line 2: several images are named train0.jpg"),
        (lambda r: (r / "val").rename(r / "rest"), "must have folders train and val, or labels.csv a column `split`"),
        (lambda r: (r / "val" / "images" / "new.jpg").write_bytes(b"x"), "1 images have no label: val/images/new.jpg"),
        (lambda r: (r / "labels.csv").write_bytes(b"file,label\n" + b"\xff\xfe,cat\n"), "save it as CSV in UTF-8"),
        (
            lambda r: (r / "train" / "more").mkdir(),
            "matches several layouts, folders and list: choose one with --layout",
        ),
    ],
)
def test_an_invalid_list_is_refused(spoil, message, images):
    (images / "labels.csv").write_text(lines("{split}{i}.jpg,{kind}", "file", "label"))
    spoil(images)
    with pytest.raises(DataError) as error, Pool(1) as pool:
        prepare(images, images.parent / "set", PrepareOptions(), pool)
    assert message in str(error.value)


def test_a_validation_class_without_a_training_image_and_a_list_of_one_class_are_refused(images):
    (images / "labels.csv").write_text(
        lines("{split}{i}.jpg,{kind}", "file", "label").replace("val0.jpg,cat", "val0.jpg,eel")
    )
    with pytest.raises(DataError, match="the training split has no image of the classes eel"):
        prepared(images)
    (images / "labels.csv").write_text(lines("{split}{i}.jpg,cat", "file", "label"))
    with pytest.raises(DataError, match="has only one class, cat"):
        prepared(images)
