"""Checkpoint folders with a manifest of checksums: a checkpoint either verifies in full or is skipped.

A checkpoint named `samples-000123456` holds:

- `model.safetensors`: the whole model in fp32, under timm's names
- `optimizer.safetensors`: the whole optimizer state, under the same names
- `ema.safetensors`: the exponential moving average of the weights, where the run has one
- `model.json`: the model card, with all that inference needs
- `state.json`: samples seen, best and last evaluation, loss scale
- `config.yaml`: the run's config
- `manifest.json`: size and SHA-256 of every other file; written last

It is written to `NAME.partial` and renamed.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pipeline.errors import CheckpointFormatError
from pipeline.files import write_text

MANIFEST = "manifest.json"
FORMAT = 6
_READABLE = (5, FORMAT)  # 5 does not name the sample order: earlier versions must not resume a newer one in theirs
PREFIX = "samples-"
_PARTIAL = ".partial"


def folder_name(samples_seen: int) -> str:
    """Returns the name of the checkpoint at `samples_seen`; names sort by samples."""
    return f"{PREFIX}{samples_seen:012d}"


def samples_of(folder: Path) -> int:
    """Returns the samples seen at a checkpoint, from its name."""
    return int(folder.name.removeprefix(PREFIX))


def checkpoint_root(run_dir: Path) -> Path:
    """Returns the folder that holds a run's checkpoints."""
    return run_dir / "checkpoints"


def partial_folder(folder: Path) -> Path:
    """Returns the folder for a checkpoint's files until it is complete."""
    return folder.with_name(folder.name + _PARTIAL)


def write_json(file: Path, content: Any) -> None:
    """Writes a JSON file atomically.

    Raises:
        ValueError: the content holds NaN or infinities, which JSON does not support.
    """
    write_text(file, json.dumps(content, indent=2, allow_nan=False) + "\n")


def commit(folder: Path) -> None:
    """Commits a checkpoint whose files are in `partial_folder(folder)`: writes the manifest, then renames it."""
    source = partial_folder(folder)
    files = sorted(p for p in source.rglob("*") if p.is_file())
    with ThreadPoolExecutor(4) as pool:
        hashes = list(pool.map(_sha256, files))
    written = {
        p.relative_to(source).as_posix(): {"bytes": p.stat().st_size, "sha256": h}
        for p, h in zip(files, hashes, strict=True)
    }
    write_json(source / MANIFEST, {"format": FORMAT, "files": written})
    if folder.exists():
        shutil.rmtree(folder)
    source.rename(folder)


def manifest_entries(folder: Path) -> dict[str, Any]:
    """Reads the manifest: size and SHA-256 of each other file of a checkpoint.

    Raises:
        OSError, ValueError: the manifest is missing or corrupt.
        CheckpointFormatError: another version of this project wrote the checkpoint.
    """
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    try:
        if manifest["format"] not in _READABLE:
            raise CheckpointFormatError(
                f"checkpoint {folder} has format {manifest['format']}, and this version reads formats {_READABLE}: "
                f"resume it with the version that wrote it, or start a new run under another run.name. "
                f"`densenet eval`, `export` and model.weights still read its weights."
            )
        found = {
            name: {"bytes": int(entry["bytes"]), "sha256": str(entry["sha256"])}
            for name, entry in manifest["files"].items()
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"unexpected JSON content: {error}") from error
    outside = [name for name in found if Path(name).is_absolute() or ".." in Path(name).parts]
    if outside or not found:
        raise ValueError(f"no files, or files outside of the checkpoint's folder: {outside}")
    return found


def verify(folder: Path) -> str | None:
    """Returns what is wrong with a checkpoint, or None if every file has its recorded size and hash.

    Raises:
        CheckpointFormatError: another version of this project wrote it.
    """
    try:
        manifest = manifest_entries(folder)
    except (OSError, ValueError) as error:
        return f"{MANIFEST} cannot be read ({error})"
    for name, entry in manifest.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != entry["bytes"]:
            return f"{name} has {file.stat().st_size} bytes, expected {entry['bytes']}"
        if _sha256(file) != entry["sha256"]:
            return f"{name} does not match its SHA-256"
    return None


def latest_valid(root: Path, warn: Callable[[str], None]) -> Path | None:
    """Returns the latest checkpoint in `root` that verifies; warns of each later one that does not."""
    return first_valid(reversed(checkpoints(root)), verify, warn)


def first_valid(
    folders: Iterable[Path], check: Callable[[Path], str | None], warn: Callable[[str], None]
) -> Path | None:
    """Returns the first folder for which `check` returns no problem, or None; warns of each skipped folder.

    Raises:
        CheckpointFormatError: none is valid, and another version of this project wrote at least one of them.
    """
    other: CheckpointFormatError | None = None
    for folder in folders:
        try:
            reason = check(folder)
        except CheckpointFormatError as error:
            reason, other = str(error), error
        if reason is None:
            return folder
        warn(f"skipped checkpoint {folder}: {reason}")
    if other is not None:
        raise other
    return None


def checkpoints(root: Path) -> list[Path]:
    """Returns the committed checkpoints in `root`, oldest first."""
    found = [p for p in root.glob(f"{PREFIX}*") if p.is_dir() and p.name.removeprefix(PREFIX).isdigit()]
    return sorted(found, key=samples_of)


def read_state(folder: Path) -> dict[str, Any]:
    """Reads a checkpoint's `state.json`."""
    return json.loads((folder / "state.json").read_text(encoding="utf-8"))


def best_checkpoint(run_dir: Path) -> Path:
    """Returns the checkpoint of the best evaluation; the latest checkpoint where the best one does not exist."""
    root = checkpoint_root(run_dir)
    latest = checkpoints(root)[-1]
    folder = root / best_checkpoint_name(latest)
    return folder if folder.is_dir() else latest


def best_checkpoint_name(latest: Path) -> str:
    """Returns the name of the best evaluation's checkpoint, from the state of the latest checkpoint."""
    best = read_state(latest)["best_at"]
    return latest.name if best is None else folder_name(best)


def prune(root: Path, keep: Callable[[list[Path]], list[Path]]) -> None:
    """Removes partial checkpoints, and those that `keep` does not return; `keep` gets all, oldest first."""
    existing = checkpoints(root)
    kept = keep(existing)
    for folder in existing:
        if folder not in kept:
            shutil.rmtree(folder)
    for leftover in root.glob(f"{PREFIX}*{_PARTIAL}"):
        shutil.rmtree(leftover)


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
