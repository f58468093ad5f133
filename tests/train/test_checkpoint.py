"""Checkpoint folders: manifest written last, verified in full, skipped when corrupt."""

import json
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import CheckpointFormatError
from pipeline.train import checkpoint


def committed(root: Path, samples: int) -> Path:
    folder = root / checkpoint.folder_name(samples)
    partial = checkpoint.partial_folder(folder)
    (partial / "engine").mkdir(parents=True)
    (partial / "engine" / "state.pt").write_bytes(bytes(range(256)) * 16)
    checkpoint.write_json(partial / "state.json", {"samples_seen": samples})
    checkpoint.commit(folder)
    return folder


def truncate(folder: Path) -> None:
    file = folder / "engine" / "state.pt"
    file.write_bytes(file.read_bytes()[:-1])


def flip_a_bit(folder: Path) -> None:
    file = folder / "engine" / "state.pt"
    content = bytearray(file.read_bytes())
    content[1000] ^= 1
    file.write_bytes(content)


CORRUPTIONS = {
    "truncated": (truncate, "engine/state.pt has 4095 bytes, expected 4096"),
    "flipped": (flip_a_bit, "engine/state.pt does not match its SHA-256"),
    "gone": (lambda f: (f / "state.json").unlink(), "state.json is missing"),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "manifest.json cannot be read"),
    "a truncated manifest": (lambda f: (f / "manifest.json").write_text('{"format"'), "manifest.json cannot be read"),
    "another format": (
        lambda f: (f / "manifest.json").write_text('{"format": 9, "files": {}}'),
        "has format 9, and this",
    ),
}


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_the_latest_valid_checkpoint_is_found_behind_a_corrupt_one(tmp_path, corruption):
    older, newer = committed(tmp_path, 100), committed(tmp_path, 200)
    warnings: list[str] = []
    assert checkpoint.latest_valid(tmp_path, warnings.append) == newer
    assert warnings == []
    spoil, reason = CORRUPTIONS[corruption]
    spoil(newer)
    assert checkpoint.latest_valid(tmp_path, warnings.append) == older
    assert len(warnings) == 1
    assert str(newer) in warnings[0]
    assert reason in warnings[0]


def test_a_run_whose_checkpoints_another_version_wrote_is_refused_and_keeps_them(tmp_path):
    folder = committed(tmp_path, 100)
    (folder / "manifest.json").write_text('{"format": 4, "files": {}}')
    with pytest.raises(
        CheckpointFormatError,
        match=r"has format 4, and this version reads formats \(5, 6\): resume it",
    ):
        checkpoint.latest_valid(tmp_path, lambda _: None)
    assert folder.is_dir()


def test_a_partial_checkpoint_is_ignored(tmp_path):
    folder = committed(tmp_path, 100)
    folder.rename(checkpoint.partial_folder(folder))
    assert checkpoint.checkpoints(tmp_path) == []
    assert checkpoint.latest_valid(tmp_path, pytest.fail) is None


def test_pruning_keeps_the_latest_and_the_best(tmp_path):
    folders = [committed(tmp_path, n) for n in (100, 200, 300, 400)]
    checkpoint.partial_folder(folders[0]).mkdir()
    checkpoint.prune(tmp_path, lambda existing: [existing[0], *existing[-2:]])
    assert sorted(p.name for p in tmp_path.iterdir()) == [folders[i].name for i in (0, 2, 3)]


def test_the_manifest_lists_every_file_but_itself(tmp_path):
    folder = committed(tmp_path, 100)
    files = json.loads((folder / "manifest.json").read_text())["files"]
    on_disk = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert set(files) == on_disk - {"manifest.json"}


@settings(max_examples=200)
@given(seed=st.integers(0, 2**32), kind=st.sampled_from(["flip", "cut", "zero", "more"]))
def test_any_corruption_is_detected_or_leaves_every_file_unchanged(tmp_path_factory, seed, kind):
    rng = random.Random(seed)
    folder = committed(tmp_path_factory.mktemp("checkpoints"), 100)
    before = {f: f.read_bytes() for f in folder.rglob("*") if f.is_file()}
    file = rng.choice(sorted(before))
    content = bytearray(before[file])
    at = rng.randrange(len(content))
    if kind == "flip":
        content[at] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        del content[at:]
    elif kind == "zero":
        content[at : at + 32] = bytes(min(32, len(content) - at))
    else:
        content += b"\0"
    file.write_bytes(content)
    try:
        reason = checkpoint.verify(folder)
    except CheckpointFormatError as error:
        reason = str(error)
    if reason is None:
        kept = {f: f.read_bytes() for f in before if f.name != "manifest.json"}
        assert kept == {f: b for f, b in before.items() if f in kept}


MANIFESTS = [
    "[]",
    "3",
    '{"format": 5, "files": []}',
    '{"format": 5, "files": {"a": 1}}',
    '{"format": 5, "files": {"../a": {"bytes": 1, "sha256": "0"}}}',
]


@pytest.mark.parametrize("manifest", MANIFESTS)
def test_a_manifest_with_unexpected_json_is_corrupt(tmp_path, manifest):
    folder = committed(tmp_path, 100)
    (folder / "manifest.json").write_text(manifest)
    assert "manifest.json cannot be read" in str(checkpoint.verify(folder))
