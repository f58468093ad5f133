"""`densenet data verify`: is everything there, whole, and what it should be."""

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.config import MAX_PIXELS
from pipeline.data.class_names import class_name_warnings, missing_class_warning, require_two_classes
from pipeline.data.dataset import MANIFEST, Manifest, read_manifest
from pipeline.data.index import Shard, rows_of
from pipeline.data.listing import Tree, tree
from pipeline.data.names import SPLIT_WORDS
from pipeline.data.tools.inspect import KINDS, Finding, Looked, chunks, look, where
from pipeline.data.tools.layouts import recognize
from pipeline.data.tools.pool import Pool
from pipeline.data.tools.samples import IMAGE_ENDINGS
from pipeline.data.tools.scan import Scan
from pipeline.data.tools.tars import members
from pipeline.errors import DataError

IMAGENET = {"classes": 1000, "train": 1_281_167, "val": 50_000}
_BLOCK = 1 << 20


@dataclass(frozen=True)
class SplitReport:
    """A split in numbers: sides in pixels; `per_class` is the least, the median and the most images of a class."""

    samples: int
    classes: int
    per_class: tuple[int, float, int]
    bytes: int
    formats: dict[str, int]
    modes: dict[str, int]
    shorter_side: tuple[int, float, int]


@dataclass(frozen=True)
class Report:
    """What was found: `findings` of `pipeline.data.tools.inspect.KINDS`, and in `ignored` what was not looked at."""

    root: str
    layout: str
    splits: dict[str, SplitReport]
    findings: list[Finding]
    ignored: list[str] = field(default_factory=list)

    @property
    def corruption(self) -> list[Finding]:
        """The findings that stop a training."""
        return [finding for finding in self.findings if finding.is_corruption]

    def counts(self) -> dict[str, int]:
        """How many findings there are of each kind, in the order of `KINDS`."""
        counted = Counter(finding.kind for finding in self.findings)
        return {kind: counted[kind] for kind in KINDS if counted[kind]}

    def to_json(self) -> dict[str, Any]:
        """The whole report for machines."""
        return {"corrupt": bool(self.corruption), "counts": self.counts()} | asdict(self)


def verify(
    root: Path, pool: Pool, layout: str | None = None, any_counts: bool = False, max_pixels: int = MAX_PIXELS
) -> Report:
    """Reads and decodes every image of a data set or a source, and compares with the index where there is one.

    A set of 1,000 WordNet ids is taken for ImageNet and must have its numbers of images, unless `any_counts`.

    Raises:
        DataError: it cannot be read as any layout, or an archive is corrupt.
    """
    root = root.absolute()
    found = recognize(root, layout)
    scan = found.scan(root, None, pool)
    manifest = read_manifest(root) if found.name == "prepared" else None
    findings: list[Finding] = []
    if manifest is not None:
        findings += _unlisted(root, manifest, scan.splits)
        findings += _shards(root, manifest, scan.splits, pool)
    splits, digests = {}, {}
    for split, table in scan.splits.items():
        tasks = list(chunks(scan.root, split, table, decoded=True, max_pixels=max_pixels))
        weights = [pc.sum(task.table["length"]).as_py() for task in tasks]
        parts = pool.map(look, tasks, f"verifying {split}", weights)
        findings += [
            Finding("unreadable", split, path, problem) for path, problem in scan.problems.get(split, {}).items()
        ]
        findings += [finding for part in parts for finding in part.findings]
        splits[split] = _split_report(table, parts, len(scan.classes))
        digests[split] = np.concatenate([part.digests_N for part in parts])
    findings += _duplicates(scan.splits, digests)
    findings += _classes(scan)
    if not any_counts:
        findings += _counts(scan.classes, splits)
    findings = list(dict.fromkeys(findings))  # a shard that is gone is missed more than once
    order = list(KINDS)
    findings.sort(key=lambda f: (order.index(f.kind), f.split, f.where))
    return Report(str(root), found.name, splits, findings, scan.ignored.lines())


def _split_report(table: pa.Table, parts: list[Looked], num_classes: int) -> SplitReport:
    per_class = np.bincount(table["label"].to_numpy(), minlength=num_classes)
    sides = np.concatenate([np.minimum(part.widths_N, part.heights_N) for part in parts])
    sides = sides[sides > 0] if (sides > 0).any() else np.zeros(1, np.int32)
    return SplitReport(
        samples=len(table),
        classes=int((per_class > 0).sum()),
        per_class=(int(per_class.min()), float(np.median(per_class)), int(per_class.max())),
        bytes=pc.sum(table["length"]).as_py(),
        formats=dict(sum((part.formats for part in parts), Counter())),
        modes=dict(sum((part.modes for part in parts), Counter())),
        shorter_side=(int(sides.min()), float(np.median(sides)), int(sides.max())),
    )


def _unlisted(root: Path, manifest: Manifest, splits: dict[str, pa.Table]) -> Iterator[Finding]:
    """Files in the split folders that the index does not know; beside lists of labels, only images count."""
    endings = IMAGE_ENDINGS if manifest.made.get("from") == "list" and manifest.made.get("to") == "index" else None
    for split, table in splits.items():
        known = set(pc.unique(table["path"]).to_pylist())
        for name in SPLIT_WORDS.get(split, {split}):
            found = tree(root / name) if (root / name).is_dir() else Tree()
            for path in (f"{name}/{path}" for path in (*found.files, *found.problems)):
                if path not in known and (endings is None or path.lower().rpartition(".")[2] in endings):
                    yield Finding("unlisted", split, path, f"not in {MANIFEST}'s index")


def _shards(root: Path, manifest: Manifest, splits: dict[str, pa.Table], pool: Pool) -> list[Finding]:
    """Compares shards with their hashes, and the members of those that this project wrote with the index."""
    tasks = []
    for split, table in splits.items():
        rows = _rows_by_path(table) if manifest.made.get("to") == "shards" else {}
        tasks += [(root, split, path, shard, rows.get(path)) for path, shard in manifest.splits[split].shards.items()]
    return [finding for found in pool.map(_shard, tasks, "comparing shards") for finding in found]


def _rows_by_path(table: pa.Table) -> dict[str, pa.Table]:
    """The rows of each shard, which lie together."""
    path = table["path"].combine_chunks()
    codes, first, count = np.unique(path.indices.to_numpy(), return_index=True, return_counts=True)
    rows = table.drop_columns("path")
    slices = zip(codes.tolist(), first.tolist(), count.tolist(), strict=True)
    return {path.dictionary[code].as_py(): rows_of(rows, start, length) for code, start, length in slices}


def _shard(task: tuple[Path, str, str, Shard, pa.Table | None]) -> list[Finding]:
    root, split, path, shard, rows = task
    try:
        digest = hashlib.sha256()
        with (root / path).open("rb") as file:
            while block := file.read(_BLOCK):
                digest.update(block)
            size = file.tell()
            if size != shard.bytes:
                return [Finding("shard", split, path, f"{size} bytes, {shard.bytes} were written")]
            same = digest.hexdigest() == shard.sha256
            found = [] if same else [Finding("shard", split, path, "its SHA-256 is not the one that was written")]
            return found + (_members(file, root, split, path, rows) if rows is not None else [])
    except OSError as error:
        return [Finding("unreadable", split, path, f"cannot be read ({error.strerror})")]
    except DataError as error:
        return [Finding("shard", split, path, str(error))]


def _members(file: Any, root: Path, split: str, path: str, rows: pa.Table) -> list[Finding]:
    """Where a shard differs from the index: samples that are not at their places, and labels that are others."""
    findings = []
    there = list(members(root / path))
    labels = {member.name: member for member in there if member.name.endswith(".cls")}
    images = {member.offset: member for member in there if member.name.endswith(".jpg")}
    columns = (rows[name].to_pylist() for name in ("name", "offset", "length", "label"))
    for name, offset, length, label in zip(*columns, strict=True):
        member = images.pop(offset, None)
        at = where(path, name, offset)
        if member is None or member.length != length:
            findings.append(Finding("shard", split, at, "the sample is not at its place"))
            continue
        beside = labels.get(member.name.replace(".jpg", ".cls"))
        file.seek(beside.offset if beside else 0)
        stored = file.read(beside.length) if beside else b""
        if stored != str(label).encode():
            findings.append(Finding("label", split, at, f"{stored.decode(errors='replace')!r}, indexed as {label}"))
    findings += [Finding("shard", split, path, f"holds {m.name}, which is not indexed") for m in images.values()]
    return findings


def _duplicates(splits: dict[str, pa.Table], digests: dict[str, Any]) -> Iterator[Finding]:
    """Images whose bytes were there before, in the order of the splits."""
    names = list(splits)
    of_split = np.concatenate([np.full(len(splits[split]), i) for i, split in enumerate(names)])
    rows = np.concatenate([np.arange(len(splits[split])) for split in names])
    digest = np.concatenate([digests[split] for split in names])
    _, first, group = np.unique(digest, return_index=True, return_inverse=True)
    for i in np.flatnonzero(first[group] != np.arange(len(digest))):
        if not any(digest[i].tobytes()):
            continue  # could not be read
        original = first[group[i]]
        split, other = names[of_split[i]], names[of_split[original]]
        same_class = _label(splits[split], rows[i]) == _label(splits[other], rows[original])
        kind = "duplicate" if split == other else "across"
        detail = f"the same as {_where(splits[other], rows[original])}"
        yield Finding(
            kind, split, _where(splits[split], rows[i]), detail + ("" if same_class else ", of another class")
        )


def _label(table: pa.Table, row: int) -> int:
    return table["label"][int(row)].as_py()


def _where(table: pa.Table, row: int) -> str:
    return where(*(table[name][int(row)].as_py() for name in ("path", "name", "offset")))


def _classes(scan: Scan) -> Iterator[Finding]:
    try:
        require_two_classes(scan.classes, scan.root)
    except DataError as error:
        yield Finding("classes", "", "train", str(error))
    for line in class_name_warnings(scan.classes):
        yield Finding("doubtful", "", "classes", line)
    for split, table in scan.splits.items():
        lacking = missing_class_warning(scan.classes, table["label"].to_numpy(), split)
        if lacking is not None:
            yield Finding("absent", split, split, lacking)


def _counts(classes: tuple[str, ...], splits: dict[str, SplitReport]) -> Iterator[Finding]:
    is_imagenet = len(classes) == IMAGENET["classes"] and all(c[0] == "n" and c[1:].isdigit() for c in classes)
    for split, report in splits.items():
        if is_imagenet and split in IMAGENET and report.samples != IMAGENET[split]:
            detail = f"{report.samples:,} images, ILSVRC2012 has {IMAGENET[split]:,} (--any-counts if this is a part)"
            yield Finding("count", split, split, detail)
        if report.classes < len(classes) and (split == "train" or is_imagenet):
            yield Finding("count", split, split, f"{len(classes) - report.classes} classes have no image")
