"""Unpacks the pieces of a kit that are present (see `benchmarks.gpu.kit`); needs only the standard library.

python -m benchmarks.gpu.unpack [KIT]
"""

import hashlib
import json
import lzma
import os
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

KIT = Path("outputs/gpu-kit")
MANIFEST = "manifest.json"
SUFFIX = ".tar.xz"
BLOCK_BYTES = 2**20


class KitError(Exception):
    """A kit that this machine cannot use at all."""


@dataclass(frozen=True)
class Part:
    """A part of a tier in a piece: tiers are `training`, `images`, `cifar`, `ray` and `mlflow`."""

    name: str
    tier: str
    piece: str
    sha256: str


@dataclass(frozen=True)
class Unpacked:
    """The tiers that are complete, with their folders; and why each other tier is not, with what to do."""

    folders: dict[str, Path]
    problems: dict[str, str]


def unpack(kit: Path) -> Unpacked:
    """Unpacks all parts that are present and not unpacked yet into `kit`/unpacked/TIER.

    Raises:
        KitError: there are no pieces, they are of different kits, or they are for another Python.
    """
    parts, target = read_manifest(kit), kit / "unpacked"
    new = [part for part in parts if not _is_done(target, part) and (kit / part.piece / part.name).is_file()]
    new.sort(key=lambda part: -(kit / part.piece / part.name).stat().st_size)  # the slowest first
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:  # decompression releases the interpreter's lock
        errors = dict(zip(new, pool.map(_unpack_part, new, [kit] * len(new), [target] * len(new)), strict=True))
    folders: dict[str, Path] = {}
    problems: dict[str, str] = {}
    for tier in dict.fromkeys(part.tier for part in parts):
        lacking = [part for part in parts if part.tier == tier and not _is_done(target, part)]
        corrupt = [error for part in lacking if (error := errors.get(part))]
        missing = sorted({part.piece for part in lacking if not errors.get(part)})
        if corrupt:
            problems[tier] = "; ".join(corrupt)
        elif missing:
            problems[tier] = f"{' and '.join(missing)} of {kit} is missing or incomplete: copy it to this machine"
        else:
            folders[tier] = (target / tier).resolve()
    return Unpacked(folders, problems)


def read_manifest(kit: Path) -> list[Part]:
    """Returns the parts of the whole kit, from the manifest that every piece has."""
    files = sorted(kit.glob(f"*/{MANIFEST}"))
    if not files:
        raise KitError(f"{kit} has no pieces: copy piece1, piece2, ... of `make gpu-kit` into it.")
    texts = {file.parent.name: file.read_text(encoding="utf-8") for file in files}
    if len(set(texts.values())) > 1:
        raise KitError(f"{', '.join(texts)} in {kit} are of different kits: copy all of them from one `make gpu-kit`.")
    manifest = json.loads(texts[files[0].parent.name])
    python = f"{sys.version_info[0]}.{sys.version_info[1]}"
    if manifest["python"] != python:
        raise KitError(f"{kit} is for Python {manifest['python']}, this is {python}: make gpu-kit TARGET={python}")
    return [Part(**part) for part in manifest["parts"]]


def _marker(target: Path, part: Part) -> Path:
    return target / ".done" / part.name


def _is_done(target: Path, part: Part) -> bool:
    marker = _marker(target, part)
    return marker.is_file() and marker.read_text(encoding="utf-8") == part.sha256


def _unpack_part(part: Part, kit: Path, target: Path) -> str | None:
    """Unpacks one part; returns its problem, if there is one."""
    file = kit / part.piece / part.name
    if hashlib.sha256(file.read_bytes()).hexdigest() != part.sha256:
        return f"{file} is corrupt, its SHA-256 is not the manifest's: copy {part.piece} again"
    with lzma.open(file) as stream, tarfile.open(fileobj=stream, mode="r|", bufsize=BLOCK_BYTES) as archive:
        archive.extractall(target / part.tier, filter="data")
    marker = _marker(target, part)
    marker.parent.mkdir(parents=True, exist_ok=True)
    marker.write_text(part.sha256, encoding="utf-8")
    return None


def main() -> None:
    """Unpacks, and prints every tier's state."""
    kit = Path(sys.argv[1]) if len(sys.argv) > 1 else KIT
    try:
        unpacked = unpack(kit)
    except KitError as error:
        sys.exit(f"error: {error}")
    for tier, folder in unpacked.folders.items():
        print(f"{tier:10} complete in {os.path.relpath(folder)}")
    for tier, problem in unpacked.problems.items():
        print(f"{tier:10} {problem}")


if __name__ == "__main__":
    main()
