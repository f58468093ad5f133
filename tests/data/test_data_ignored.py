"""Files next to the images in sources of each layout: counted and reported as ignored, or refused."""

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.data.tools.index_in_place import index_in_place
from pipeline.data.tools.pool import Pool
from pipeline.data.tools.prepare import PrepareOptions, PrepareResult, prepare
from pipeline.data.tools.stats import stats
from pipeline.data.tools.verify import verify
from pipeline.errors import DataError
from tests.data import synthetic

CLUTTER = {"._a.JPEG": b"x", ".DS_Store": b"x", "__MACOSX/n.JPEG": b"x"}


def made(source: Path) -> PrepareResult:
    with Pool(1) as pool:
        return prepare(source, source.parent / "set", PrepareOptions(), pool)


def test_hidden_members_of_imagenets_archives_and_labels_without_an_image_are_counted(tmp_path):
    tree = synthetic.images()
    synthetic.write_ilsvrc(tmp_path / "source", tree)
    tree["train"]["n01440764"] |= CLUTTER
    del tree["val"]["n04557648"]["ILSVRC2012_val_00000001.JPEG"]
    synthetic.write_ilsvrc(tmp_path / "other", tree)
    for name in ("ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"):
        (tmp_path / "other" / name).rename(tmp_path / "source" / name)
    (tmp_path / "source" / "ILSVRC2012_img_test.tar").write_bytes(b"x")
    (tmp_path / "source" / "bounding boxes").mkdir()
    done = made(tmp_path / "source")
    assert {name: split.samples for name, split in done.manifest.splits.items()} == {"train": 32, "val": 8}
    assert done.notes == [
        "ignored: 3 files and folders of file managers and tools: n01440764.tar, ._a.JPEG, n01440764.tar, .DS_Store, "
        "n01440764.tar, __MACOSX/n.JPEG",
        "ignored: 1 files next to the data: ILSVRC2012_img_test.tar",
        "ignored: 1 folders next to the data: bounding boxes",
        "ignored: 1 labels of validation images that do not exist: ILSVRC2012_val_00000001",
    ]


def test_members_that_are_not_images_are_named_as_corrupt(tmp_path):
    tree = synthetic.images()
    tree["train"]["n01440764"]["readme.txt"] = b"about the images"
    synthetic.write_ilsvrc(tmp_path / "source", tree)
    with pytest.raises(DataError, match=r"readme.txt in .*: is not an image of a known format"):
        made(tmp_path / "source")


def test_other_files_in_kaggles_folder_are_counted(tmp_path):
    synthetic.write_kaggle(tmp_path / "source", synthetic.images())
    (tmp_path / "source" / "ILSVRC" / "Data" / "CLS-LOC" / "test").mkdir()
    (tmp_path / "source" / "LOC_train_solution.csv").write_text("x")
    with Pool(1) as pool:
        expected = [
            "1 files next to the data: LOC_train_solution.csv",
            "1 folders next to the data: ILSVRC/Data/CLS-LOC/test",
        ]
        assert verify(tmp_path / "source", pool).ignored == expected
        lines = [f"ignored: {line}" for line in expected]
        assert stats(tmp_path / "source", 0, pool).notes == lines
        manifest, notes = index_in_place(tmp_path / "source", pool)
        assert notes == lines
        assert manifest.made["not_taken"] == expected


def rewrite(change: Callable[[pa.Table], pa.Table]) -> Callable[[Path], None]:
    def write(root: Path) -> None:
        file = next((root / "data").glob("train-00001*"))
        pq.write_table(change(pq.read_table(file)), file)

    return write


def other_names(table: pa.Table) -> pa.Table:
    features = {"info": {"features": {"label": {"names": ["b", "a", "c"]}}}}
    return table.replace_schema_metadata({"huggingface": json.dumps(features)})


def test_parquet_columns_and_files_that_are_not_used_are_counted(tmp_path):
    synthetic.write_parquet(tmp_path / "source", synthetic.images(), synthetic.CLASSES)
    rewrite(lambda t: t.append_column("coarse_label", t["label"]))(tmp_path / "source")
    pq.write_table(pa.table({"x": [1]}), tmp_path / "source" / "data" / "test-00000-of-00001.parquet")
    assert made(tmp_path / "source").notes == [
        "ignored: 1 columns named coarse_label: data/train-00001-of-00002.parquet",
        "ignored: 1 files of a test split: data/test-00000-of-00001.parquet",
    ]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            rewrite(lambda t: t.append_column("labels", t["label"])),
            "and one integer column with the label, named label or",
        ),
        (rewrite(lambda t: t.append_column("more", t["image"])), "must have one struct column with the field `bytes`"),
        (rewrite(lambda t: t.set_column(1, "label", pa.nulls(len(t), pa.int64()))), "row 0: the label is missing"),
        (
            rewrite(lambda t: t.set_column(0, "image", pa.nulls(len(t), t["image"].type))),
            "row 0: the image's bytes are",
        ),
        (rewrite(other_names), "differ in their label column (label, label) or in its class names"),
        (lambda r: (r / "data" / "rest.parquet").write_bytes(b"x"), "split unclear: data/rest.parquet. Rename them."),
    ],
)
def test_invalid_parquet_files_are_named(spoil, message, tmp_path):
    synthetic.write_parquet(tmp_path / "source", synthetic.images(), synthetic.CLASSES)
    spoil(tmp_path / "source")
    with pytest.raises(DataError) as error:
        made(tmp_path / "source")
    assert message in str(error.value)
