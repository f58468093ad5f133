"""Members of WebDataset shards: each is an image, a label, or counted as ignored."""

from pathlib import Path

import pytest

from pipeline.data.dataset import open_splits
from pipeline.data.ignored import IgnoredFiles
from pipeline.data.listing import SYSTEM
from pipeline.data.tools.index_in_place import index_in_place
from pipeline.data.tools.pool import Pool
from pipeline.data.tools.prepare import PrepareOptions, prepare
from pipeline.data.tools.shard_samples import read_samples
from pipeline.data.tools.tars import Member
from pipeline.data.tools.verify import verify
from pipeline.errors import DataError
from tests.data import synthetic

JPEG = synthetic.encoded(synthetic.image(1, (40, 40)))
PNG = synthetic.encoded(synthetic.image(2, (40, 40)), "PNG")
GIF = synthetic.encoded(synthetic.image(3, (40, 40), "P"), "GIF")


def parse_shard(files: dict[str, bytes]) -> tuple[dict[str, int], dict[str, int]]:
    """Returns labels by image and counts of ignored members, of a shard with these files."""
    content, members, ignored = b"", [], IgnoredFiles()
    for name, part in files.items():
        members.append(Member(name, len(content), len(part)))
        content += part
    found = read_samples(members, lambda offset, length: content[offset : offset + length], "x.tar", ignored)
    return {member.name: label for label, member in found}, ignored.counts()


@pytest.mark.parametrize(
    ("files", "labels"),
    [
        ({"a.jpg": JPEG, "a.cls": b"3"}, {"a.jpg": 3}),
        ({"a.5.jpg": JPEG, "a.5.cls": b"1", "a.6.jpg": JPEG, "a.6.cls": b"2"}, {"a.5.jpg": 1, "a.6.jpg": 2}),
        ({"a.jpg": JPEG, "a.cls": b"0", "a.b.jpg": JPEG, "a.b.cls": b"1"}, {"a.jpg": 0, "a.b.jpg": 1}),
        ({"a.image.jpg": JPEG, "a.cls": b"4"}, {"a.image.jpg": 4}),  # as WebDataset cuts it
        (
            {"x.y/a.jpg": JPEG, "x.y/a.cls": b"1", "x.z/a.jpg": JPEG, "x.z/a.cls": b"2"},
            {"x.y/a.jpg": 1, "x.z/a.jpg": 2},
        ),
        ({"a.JPG": JPEG, "a.CLS": b"1", "b.jfif": JPEG, "b.cls": b"0"}, {"a.JPG": 1, "b.jfif": 0}),
        ({"c.jpe": JPEG, "c.cls": b"1", "d.jpg": JPEG, "d.jpg.cls": b"0"}, {"c.jpe": 1, "d.jpg": 0}),
        ({"a.img": JPEG, "a.cls": b"1", "b.bin": PNG, "b.cls": b"0"}, {"a.img": 1, "b.bin": 0}),
        ({"c": PNG, "c.cls": b"1", "d.5": PNG, "d.5.cls": b"0"}, {"c": 1, "d.5": 0}),
        ({"a.gif": GIF, "a.cls": b"1"}, {"a.gif": 1}),  # refused by name when the image is read
        ({"a.jpg": b"<html>", "a.cls": b"1"}, {"a.jpg": 1}),
        ({"a.cls": b"1\n", "a.jpg": JPEG}, {"a.jpg": 1}),
        ({"a.jpg": JPEG, "a.json": b'{"label": 2.0, "w": 40}'}, {"a.jpg": 2}),
    ],
)
def test_each_image_gets_the_label_of_its_longest_name(files, labels):
    found, ignored = parse_shard(files)
    assert found == labels
    assert len(found) == len(files) // 2
    assert ignored == {}


def test_ignored_members_are_counted_by_reason():
    labels, ignored = parse_shard(
        {
            "a.jpg": JPEG,
            "a.seg.png": PNG,
            "a.cls": b"1",
            "a.txt": b"BM is how some bitmaps begin",
            "a.json": b'{"width": 40}',
            "._a.jpg": b"x",
            "__MACOSX/a.jpg": b"x",
            "README": b"x",
        }
    )
    assert labels == {"a.jpg": 1}
    assert ignored == {
        SYSTEM: 2,
        "members with the extension ., neither images nor labels": 1,
        "members with the extension .json, neither images nor labels": 1,
        "members with the extension .txt, neither images nor labels": 1,
        "second images of samples, .seg.png": 1,
    }


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a.jpg": JPEG}, "x.tar: 1 images have no label in a .cls or .json: a.jpg"),
        ({"a.5.jpg": JPEG, "a.6.jpg": JPEG, "a.6.cls": b"1"}, "1 images have no label in a .cls or .json: a.5.jpg"),
        ({"a.jpg": JPEG, "a.cls": b"1", "b.cls": b"1"}, "x.tar: 1 labels have no image: b.cls"),
        ({"a.jpg": JPEG, "a.cls": b"1", "b.json": b'{"label": 1}'}, "1 labels have no image: b.json"),
        ({"a.jpg": JPEG, "a.5.jpg": JPEG, "a.cls": b"1"}, "a sample has two images, a.jpg and a.5.jpg"),
        ({"a.x.jpg": JPEG, "a.y.jpg": JPEG, "a.cls": b"1"}, "a sample has two images, a.x.jpg and a.y.jpg"),
        ({"a.jpg": JPEG, "a.img": PNG, "a.cls": b"1"}, "a sample has two images, a.jpg and a.img"),
        ({"a.jpg": JPEG, "a.cls": b"1.5"}, "x.tar, a.cls: the label must be an integer"),
        ({"a.jpg": JPEG, "a.json": b'{"label": 1.5}'}, "x.tar, a.json: the label must be an integer"),
        ({"a.jpg": JPEG, "a.json": b'{"label": true}'}, "x.tar, a.json: the label must be an integer"),
    ],
)
def test_ambiguous_members_are_refused_by_name(files, message):
    with pytest.raises(DataError) as error:
        parse_shard(files)
    assert message in str(error.value)


def test_two_members_of_one_name_are_refused():
    twice = [Member("a.jpg", 0, 4), Member("a.cls", 4, 1), Member("a.jpg", 0, 4)]
    with pytest.raises(DataError, match="x.tar has two members named a.jpg"):
        read_samples(twice, lambda offset, length: b"abcd1"[offset : offset + length], "x.tar", IgnoredFiles())


def write_shards(root: Path, names: list[str]) -> Path:
    """Writes a training and a validation shard with an image for each name and alternating labels 0 and 1."""
    root.mkdir()
    for split in ("train", "val"):
        files = {}
        for i, name in enumerate(names):
            image = synthetic.image(i, (40, 40))
            files[name] = synthetic.encoded(image, "GIF" if name.endswith("gif") else "JPEG")
            files[f"{name.rpartition('.')[0]}.cls"] = str(i % 2).encode()
        (root / f"x-{split}-0.tar").write_bytes(synthetic.tar(files))
    return root


def test_jfif_jpe_and_keys_with_dots_are_read_and_a_gif_is_refused(tmp_path):
    names = ["a0.jpg", "a1.jpg", "a2.jfif", "a3.jpe", "a.5.jpg", "a.6.jpg"]
    with Pool(1) as pool:
        done = prepare(write_shards(tmp_path / "valid", names), tmp_path / "set", PrepareOptions(), pool)
        assert {name: split.samples for name, split in done.manifest.splits.items()} == {"train": 6, "val": 6}
        index_in_place(tmp_path / "valid", pool)
        assert [len(index) for index in open_splits(str(tmp_path / "valid"), "train", "val", tmp_path)] == [6, 6]
        source = write_shards(tmp_path / "gif", [*names, "a4.gif"])
        message = r"x-train-0.tar: is a GIF file, which is not .*: convert it to JPEG or PNG"
        with pytest.raises(DataError, match=rf"2 corrupt images .*\n.*a4.gif in .*{message}"):
            prepare(source, tmp_path / "refused", PrepareOptions(), pool)
        with pytest.raises(DataError, match="a4.gif.*is a GIF file"):
            index_in_place(source, pool)
        report = verify(source, pool)
    assert report.splits["train"].samples == 7
    assert [(finding.kind, "a4.gif" in finding.where) for finding in report.errors] == [("unreadable", True)] * 2


def test_files_next_to_the_shards_are_counted_and_compressed_ones_are_named(tmp_path):
    source = write_shards(tmp_path / "source", ["a.jpg", "b.jpg"])
    (source / "x-test-0.tar").write_bytes(synthetic.tar({"a.jpg": JPEG}))
    (source / "README.md").write_text("x")
    (source / ".DS_Store").write_bytes(b"x")
    (source / "more").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (source / "x-train-0.tar").rename(tmp_path / "elsewhere" / "x-train-1.tar")
    (source / "more" / "linked").symlink_to(tmp_path / "elsewhere")
    with Pool(1) as pool:
        done = prepare(source, tmp_path / "set", PrepareOptions(), pool)
        assert done.manifest.splits["train"].samples == 2
        assert done.notes == [
            "ignored: 1 files and folders of file managers and tools: .DS_Store",
            "ignored: 1 files of a test split: x-test-0.tar",
            "ignored: 1 files that are not .tar files: README.md",
        ]
        assert done.manifest.made["not_taken"] == [note.removeprefix("ignored: ") for note in done.notes]
        (source / "more" / "linked").unlink()
        (source / "x-train-2.tar.gz").write_bytes(b"x")
        with pytest.raises(DataError, match=r"0 of train, 1 of val. Rename them. Unpack x-train-2.tar.gz first"):
            prepare(source, tmp_path / "other", PrepareOptions(), pool)
