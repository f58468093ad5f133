"""`diff`: every kind of change between real data sets, matched by name or content."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.data.tools.diff import Difference, diff
from pipeline.data.tools.index_in_place import index_in_place
from pipeline.data.tools.pool import Pool
from pipeline.data.tools.prepare import PrepareOptions, prepare
from pipeline.errors import DataError
from tests.data import synthetic
from tests.data.synthetic import CLASSES

A, B, C = CLASSES
Change = Callable[[synthetic.Images], object]


def made(tree: synthetic.Images, root: Path, to: str = "shards") -> Path:
    synthetic.write_folders(root.with_name(f"{root.name}-source"), tree)
    with Pool(1) as pool:
        prepare(root.with_name(f"{root.name}-source"), root, PrepareOptions(to=to, shard_bytes=20_000), pool)  # type: ignore[arg-type]
    return root


def compared(change: Change, folder: Path, **arguments: object) -> Difference:
    tree = synthetic.images()
    first = made(tree, folder / "first")
    change(tree)
    return diff(first, made(tree, folder / "second"), **arguments)  # type: ignore[arg-type]


def move(tree: synthetic.Images, name: str, source: tuple[str, str], target: tuple[str, str]) -> None:
    tree[target[0]][target[1]][name] = tree[source[0]][source[1]].pop(name)


NAME = f"{A}_0.JPEG"
BYTES = synthetic.encoded(synthetic.image(500))


@pytest.mark.parametrize(
    ("kind", "change", "line"),
    [
        ("added", lambda t: t["train"][B].update({"new.JPEG": BYTES}), f"train/{B}/new.JPEG"),
        ("removed", lambda t: t["train"][A].pop(NAME), f"train/{A}/{NAME}"),
        (
            "relabeled",
            lambda t: move(t, NAME, ("train", A), ("train", C)),
            f"train/{A}/{NAME} -> train/{C}/{NAME}",
        ),
        ("moved", lambda t: move(t, NAME, ("train", A), ("val", A)), f"train/{A}/{NAME} -> val/{A}/{NAME}"),
        ("reencoded", lambda t: t["train"][A].update({NAME: BYTES}), f"train/{A}/{NAME}: "),
    ],
)
def test_each_kind_of_change_is_recognized(kind, change, line, tmp_path):
    result = compared(change, tmp_path)
    assert result.key == "FILE"
    assert result.counts == {name: int(name == kind) for name in result.counts}
    assert not result.is_equal
    (found,) = result.lines(kind)
    assert found.startswith(line)
    report = json.loads(json.dumps(result.to_json()))
    assert (report[kind], report["equal"]) == ([found], False)


def test_the_same_images_in_another_order_and_form_are_equal(tmp_path):
    tree = synthetic.images()
    first = made(tree, tmp_path / "first")
    with Pool(1) as pool:
        prepare(tmp_path / "first-source", tmp_path / "seeded", PrepareOptions(seed=5, shard_bytes=9_000), pool)
        prepare(tmp_path / "first-source", tmp_path / "folders", PrepareOptions(to="folders"), pool)
        index_in_place(tmp_path / "first-source", pool)
    assert diff(first, tmp_path / "seeded").is_equal
    assert diff(first, tmp_path / "folders").counts["added"] == 0
    result = diff(tmp_path / "first-source", first)
    assert result.counts == dict.fromkeys(result.counts, 0) | {"reencoded": 3}, "the PNG, CMYK and YCCK files"


def test_changes_of_the_class_list_do_not_hide_equal_images(tmp_path):
    def change(tree: synthetic.Images) -> None:
        for split in tree:
            tree[split]["n00000001"] = {f"{split}.JPEG": BYTES}

    result = compared(change, tmp_path)
    assert (result.classes_added, result.classes_removed, result.labels_changed) == (["n00000001"], [], 3)
    assert result.counts == dict.fromkeys(result.counts, 0) | {"added": 2}, "labels are compared by class name"


def test_file_names_that_are_not_unique_are_completed_by_the_class(tmp_path):
    def renamed(tree: synthetic.Images) -> synthetic.Images:
        return {
            split: {
                name: {f"{split}{i}.JPEG": c for i, c in enumerate(files.values())} for name, files in classes.items()
            }
            for split, classes in tree.items()
        }

    tree = renamed(synthetic.images())
    first = made(tree, tmp_path / "first")
    tree["train"][A]["train0.JPEG"] = BYTES
    result = diff(first, made(tree, tmp_path / "second"))
    assert (result.key, result.counts["reencoded"], sum(result.counts.values())) == ("CLASS/FILE", 1, 1)
    one = {split: {name: {"a.JPEG": BYTES} for name in classes} for split, classes in tree.items()}
    assert diff(*(made(one, tmp_path / name) for name in ("third", "fourth"))).key == "SPLIT/CLASS/FILE"


def test_renamed_images_are_matched_by_content(tmp_path):
    def change(tree: synthetic.Images) -> None:
        tree["train"][A]["other.JPEG"] = tree["train"][A].pop(NAME)
        move(tree, f"{A}_1.JPEG", ("train", A), ("val", C))

    result = compared(change, tmp_path, match="content")
    assert result.counts == dict.fromkeys(result.counts, 0) | {"relabeled": 1, "moved": 1}


def test_equal_content_is_matched_one_to_one(tmp_path):
    result = compared(lambda t: t["train"][A].update({"x.JPEG": BYTES, "y.JPEG": BYTES}), tmp_path, match="content")
    assert result.counts == dict.fromkeys(result.counts, 0) | {"added": 2}


def test_a_folder_without_an_index_is_refused(tmp_path):
    synthetic.write_folders(tmp_path / "source", synthetic.images())
    with pytest.raises(DataError, match="has no dataset.json: create it with `densenet data prepare` or"):
        diff(tmp_path / "source", tmp_path / "source")


def test_the_command_prints_examples_and_exits_with_1_if_sets_differ(densenet, tmp_path):
    tree = synthetic.images()
    first = made(tree, tmp_path / "first")
    shutil.copytree(first, tmp_path / "copy")
    code, printed = densenet("data", "diff", first, tmp_path / "copy")
    assert (code, "no differences" in printed) == (0, True), printed
    for i in range(12):
        tree["train"][B][f"new_{i:02d}.JPEG"] = BYTES
    second = made(tree, tmp_path / "second")
    code, printed = densenet("data", "diff", first, second, "--json", tmp_path / "report.json")
    assert code == 1, printed
    assert "added: 12  (only in the second set)" in printed
    assert printed.count(f"  train/{B}/new_") == 10 and "and 2 more; --json FILE lists all of them" in printed
    assert len(json.loads((tmp_path / "report.json").read_text())["added"]) == 12
    code, printed = densenet("data", "diff", first, second, "--by", "color")
    assert (code, "--by=color is unknown: use name or content" in printed) == (2, True)


def test_append_on_the_command_line(densenet, tmp_path):
    root = made(synthetic.images(), tmp_path / "set")
    (tmp_path / "more" / "train" / A).mkdir(parents=True)
    (tmp_path / "more" / "train" / A / "new.JPEG").write_bytes(BYTES)
    code, printed = densenet("data", "append", tmp_path / "more", root, "--workers", 1)
    assert code == 0, printed
    assert f"{root}: 1 images of train appended" in printed
    code, printed = densenet("data", "append", tmp_path / "more", root, "--workers", 1)
    assert "has these already: 1 images of train were appended by an earlier command" in printed
