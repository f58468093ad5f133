"""Checkpoints: folders that either verify in full or are passed over.

A checkpoint named `samples-000123456` holds `model.safetensors` (the whole model in fp32, timm's names),
`optimizer.safetensors` (its whole state, under the same names), `ema.safetensors` where an average is kept,
`model.json` (what is needed to use it), `state.json` (clock, best result, tracking run), `config.yaml` and, written
last, `manifest.json` with every other file's size and SHA-256. It is written to `NAME.partial` and renamed.
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
FORMAT = 5
PREFIX = "samples-"
_PARTIAL = ".partial"


def folder_name(samples_seen: int) -> str:
    """The name of the checkpoint after so many samples; names sort as the samples do."""
    return f"{PREFIX}{samples_seen:012d}"


def samples_of(folder: Path) -> int:
    """How many samples had been seen at a checkpoint, by its name."""
    return int(folder.name.removeprefix(PREFIX))


def checkpoint_root(run_dir: Path) -> Path:
    """The folder that holds a run's checkpoints."""
    return run_dir / "checkpoints"


def partial(folder: Path) -> Path:
    """Where a checkpoint's files are written before it is complete."""
    return folder.with_name(folder.name + _PARTIAL)


def write_json(file: Path, content: Any) -> None:
    """Writes a whole file of JSON.

    Raises:
        ValueError: the content holds NaN or infinities, which JSON does not know.
    """
    write_text(file, json.dumps(content, indent=2, allow_nan=False) + "\n")


def commit(folder: Path) -> None:
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
        OSError, ValueError: the manifest is missing or corrupt.
        CheckpointFormatError: another version of this project wrote the checkpoint.
    """
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    try:
        if manifest["format"] != FORMAT:
            raise CheckpointFormatError(
                f"checkpoint {folder} has format {manifest['format']}, and this version reads format {FORMAT}: resume it "
                f"with the version that wrote it, or start a new run under another run.name. `densenet evaluate`, `export` "
                f"and model.weights still read its weights."
            )
        found = {
            name: {"bytes": int(entry["bytes"]), "sha256": str(entry["sha256"])}
            for name, entry in manifest["files"].items()
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"it is another JSON: {error}") from error
    outside = [name for name in found if Path(name).is_absolute() or ".." in Path(name).parts]
    if outside or not found:
        raise ValueError(f"it names no files of this folder: {outside}")
    return found


def verify(folder: Path) -> str | None:
    """Returns what is wrong with a checkpoint, or None if every file has its recorded size and hash.

    Raises:
        CheckpointFormatError: another version of this project wrote it.
    """
    try:
        written = entries(folder)
    except (OSError, ValueError) as error:
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
    """Returns the newest checkpoint below `root` that verifies; `warn` gets each newer one that does not."""
    return first_valid(reversed(checkpoints(root)), verify, warn)


def first_valid(
    folders: Iterable[Path], check: Callable[[Path], str | None], warn: Callable[[str], None]
) -> Path | None:
    """Returns the first folder in which `check` finds nothing wrong, or None.

    Raises:
        CheckpointFormatError: none is valid, and another version of this project wrote some of them.
    """
    other: CheckpointFormatError | None = None
    for folder in folders:
        try:
            reason = check(folder)
        except CheckpointFormatError as error:
            reason, other = str(error), error
        if reason is None:
            return folder
        warn(f"checkpoint {folder} is skipped: {reason}")
    if other is not None:
        raise other
    return None


def checkpoints(root: Path) -> list[Path]:
    """The committed checkpoints below `root`, oldest first."""
    found = [p for p in root.glob(f"{PREFIX}*") if p.is_dir() and p.name.removeprefix(PREFIX).isdigit()]
    return sorted(found, key=samples_of)


def read_state(folder: Path) -> dict[str, Any]:
    """A checkpoint's `state.json`."""
    return json.loads((folder / "state.json").read_text(encoding="utf-8"))


def best_checkpoint(run_dir: Path) -> Path:
    """The checkpoint of the best evaluation so far, as the newest one knows it; the newest, if it could not be kept."""
    root = checkpoint_root(run_dir)
    newest = checkpoints(root)[-1]
    folder = root / best_name(newest)
    return folder if folder.is_dir() else newest


def best_name(newest: Path) -> str:
    """The name of the checkpoint of the best evaluation, as the newest one knows it."""
    best = read_state(newest)["best_at"]
    return newest.name if best is None else folder_name(best)


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
