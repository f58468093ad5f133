"""Checkpoints: folders that either verify in full or are passed over.

A checkpoint named `samples-000123456` holds `model.safetensors` (the whole model in fp32, timm's names),
`optimizer.safetensors` (its whole state, under the same names), `ema.safetensors` where an average is kept,
`model.json` (what is needed to use it), `state.json` (clock, best result, tracking run), `config.yaml` and, written
last, `manifest.json` with every other file's size and SHA-256. It is written to `NAME.partial` and renamed.
"""

import hashlib
import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
FORMAT = 4
PREFIX = "samples-"
_PARTIAL = ".partial"


def folder_name(samples_seen: int) -> str:
    return f"{PREFIX}{samples_seen:012d}"


def samples_of(folder: Path) -> int:
    return int(folder.name.removeprefix(PREFIX))


def partial(folder: Path) -> Path:
    """Where a checkpoint's files are written before it is complete."""
    return folder.with_name(folder.name + _PARTIAL)


def write_json(file: Path, content: Any) -> None:
    """Writes JSON to a temporary name and renames it."""
    temporary = file.with_name(file.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    temporary.replace(file)


def seal(folder: Path) -> None:
    """Completes a checkpoint whose files all ranks have written to `partial(folder)`: manifest, then rename."""
    source = partial(folder)
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


def entries(folder: Path) -> dict[str, Any]:
    """Size and hash of each file of a checkpoint but the manifest.

    Raises:
        OSError, ValueError, KeyError, TypeError: the manifest is missing, damaged or of another version.
    """
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    if manifest["format"] != FORMAT:
        raise ValueError(f"its format is {manifest['format']}, this version reads {FORMAT}")
    return manifest["files"]


def fault(folder: Path) -> str | None:
    """Says what is wrong with a checkpoint, or None when every file has its recorded size and hash."""
    try:
        written = entries(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"its {MANIFEST} cannot be read ({error})"
    for name, entry in written.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != entry["bytes"]:
            return f"{name} has {file.stat().st_size} bytes, {entry['bytes']} were written"
        if _sha256(file) != entry["sha256"]:
            return f"{name} has changed since it was written"
    return None


def newest_valid(root: Path, warn: Callable[[str], None]) -> Path | None:
    """The newest checkpoint below `root` that verifies; each newer one that does not is named through `warn`."""
    for folder in reversed(checkpoints(root)):
        reason = fault(folder)
        if reason is None:
            return folder
        warn(f"checkpoint {folder} is skipped: {reason}")
    return None


def checkpoints(root: Path) -> list[Path]:
    """The sealed checkpoints below `root`, oldest first."""
    found = [p for p in root.glob(f"{PREFIX}*") if p.is_dir() and p.name.removeprefix(PREFIX).isdigit()]
    return sorted(found, key=samples_of)


def prune(root: Path, keep: Callable[[list[Path]], list[Path]]) -> None:
    """Removes what `keep` does not choose of all, oldest first, and what a crash left half-written."""
    there = checkpoints(root)
    kept = keep(there)
    for folder in there:
        if folder not in kept:
            shutil.rmtree(folder)
    for leftover in root.glob(f"{PREFIX}*{_PARTIAL}"):
        shutil.rmtree(leftover)


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
