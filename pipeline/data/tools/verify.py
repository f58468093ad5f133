"""`densenet data verify`: checks that a data set is complete, readable and equal to its index."""

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.config_data import MAX_PIXELS
from pipeline.data.class_names import class_name_warnings, missing_class_warning, require_two_classes
from pipeline.data.dataset import MANIFEST, Manifest, read_manifest
from pipeline.data.index import Shard
from pipeline.data.listing import Tree, tree
from pipeline.data.names import SPLIT_WORDS
from pipeline.data.tables import class_counts, rows_of
from pipeline.data.tools.image_checks import (
    FINDING_KINDS,
    Finding,
    ImageChecks,
    check_images,
    describe_location,
    iter_chunks,
)
from pipeline.data.tools.layouts import detect_layout
from pipeline.data.tools.pool import Pool
from pipeline.data.tools.scan import Scan
from pipeline.data.tools.shard_samples import IMAGE_EXTENSIONS
from pipeline.data.tools.tars import read_members
from pipeline.errors import DataError

IMAGENET = {"classes": 1000, "train": 1_281_167, "val": 50_000}
_READ_BYTES = 1 << 20


@dataclass(frozen=True)
class SplitReport:
    """Statistics of a split; `per_class` and `shorter_side` (pixels) are the minimum, median and maximum."""

    samples: int
    classes: int
    per_class: tuple[int, float, int]
    bytes: int
    formats: dict[str, int]
    modes: dict[str, int]
    shorter_side: tuple[int, float, int]


@dataclass(frozen=True)
class Report:
    """The result of a verification: `findings` by `FINDING_KINDS`, and the files that were not checked (`ignored`)."""

    root: str
    layout: str
    splits: dict[str, SplitReport]
    findings: list[Finding]
    ignored: list[str] = field(default_factory=list)

    @property
    def errors(self) -> list[Finding]:
        """The findings that are errors."""
        return [finding for finding in self.findings if finding.is_error]

    def counts(self) -> dict[str, int]:
        """Returns the number of findings of each kind, in the order of `FINDING_KINDS`."""
        counted = Counter(finding.kind for finding in self.findings)
        return {kind: counted[kind] for kind in FINDING_KINDS if counted[kind]}

    def to_json(self) -> dict[str, Any]:
        """Returns the complete report as a JSON object."""
        return {"corrupt": bool(self.errors), "counts": self.counts()} | asdict(self)


def verify(
    root: Path, pool: Pool, layout: str | None = None, any_counts: bool = False, max_pixels: int = MAX_PIXELS
) -> Report:
    """Reads and decodes every image of a data set or source, and compares it with the index if there is one.

    A set with 1,000 WordNet ids as classes must have ImageNet's numbers of images, unless `any_counts` is set.

    Raises:
        DataError: the layout is unknown, or an archive is corrupt.
    """
    root = root.absolute()
    source_layout = detect_layout(root, layout)
    scan = source_layout.scan(root, None, pool)
    manifest = read_manifest(root) if source_layout.name == "prepared" else None
    findings: list[Finding] = []
    if manifest is not None:
        findings += _unlisted_files(root, manifest, scan.splits)
        findings += _check_shards(root, manifest, scan.splits, pool)
    splits, digests = {}, {}
    for split, table in scan.splits.items():
        tasks = list(iter_chunks(scan.root, split, table, decode=True, max_pixels=max_pixels))
        task_bytes = [task.rows.bytes for task in tasks]
        checks = pool.map(check_images, tasks, f"verifying {split}", task_bytes)
        findings += [
            Finding("unreadable", split, path, problem) for path, problem in scan.problems.get(split, {}).items()
        ]
        findings += [finding for check in checks for finding in check.findings]
        splits[split] = _split_report(table, checks, len(scan.classes))
        digests[split] = np.concatenate([check.digests_N for check in checks])
    findings += _duplicates(scan.splits, digests)
    findings += _check_classes(scan)
    if not any_counts:
        findings += _check_counts(scan.classes, splits)
    findings = list(dict.fromkeys(findings))  # several checks report a missing shard
    order = list(FINDING_KINDS)
    findings.sort(key=lambda f: (order.index(f.kind), f.split, f.where))
    return Report(str(root), source_layout.name, splits, findings, scan.ignored.lines())


def _split_report(table: pa.Table, checks: list[ImageChecks], num_classes: int) -> SplitReport:
    per_class = np.bincount(table["label"].to_numpy(), minlength=num_classes)
    sides = np.concatenate([np.minimum(check.widths_N, check.heights_N) for check in checks])
    sides = sides[sides > 0] if (sides > 0).any() else np.zeros(1, np.int32)
    return SplitReport(
        samples=len(table),
        classes=int((per_class > 0).sum()),
        per_class=(int(per_class.min()), float(np.median(per_class)), int(per_class.max())),
        bytes=pc.sum(table["length"]).as_py(),
        formats=dict(sum((check.formats for check in checks), Counter())),
        modes=dict(sum((check.modes for check in checks), Counter())),
        shorter_side=(int(sides.min()), float(np.median(sides)), int(sides.max())),
    )


def _unlisted_files(root: Path, manifest: Manifest, splits: dict[str, pa.Table]) -> Iterator[Finding]:
    """Finds files in the split folders that are not in the index; with label lists, only images count."""
    if "selection" in manifest.made and manifest.made.get("to") == "index":
        return  # the other images of the source were not chosen
    from_list = manifest.made.get("from") == "list" and manifest.made.get("to") == "index"
    extensions = IMAGE_EXTENSIONS if from_list else None
    for split, table in splits.items():
        indexed = set(pc.unique(table["path"]).to_pylist())
        for name in SPLIT_WORDS.get(split, {split}):
            found = tree(root / name) if (root / name).is_dir() else Tree()
            for path in (f"{name}/{path}" for path in (*found.files, *found.problems)):
                if path not in indexed and (extensions is None or path.lower().rpartition(".")[2] in extensions):
                    yield Finding("unlisted", split, path, f"not in {MANIFEST}'s index")


def _check_shards(root: Path, manifest: Manifest, splits: dict[str, pa.Table], pool: Pool) -> list[Finding]:
    """Compares shards with their hashes, and the members of shards written by this project with the index."""
    tasks = []
    for split, table in splits.items():
        rows = _rows_by_path(table) if manifest.made.get("to") == "shards" else {}
        tasks += [(root, split, path, shard, rows.get(path)) for path, shard in manifest.splits[split].shards.items()]
    return [finding for findings in pool.map(_check_shard, tasks, "comparing shards") for finding in findings]


def _rows_by_path(table: pa.Table) -> dict[str, pa.Table]:
    """Returns the rows of each shard, which are contiguous in the index."""
    path = table["path"].combine_chunks()
    codes, first, count = np.unique(path.indices.to_numpy(), return_index=True, return_counts=True)
    rows = table.drop_columns("path")
    slices = zip(codes.tolist(), first.tolist(), count.tolist(), strict=True)
    return {path.dictionary[code].as_py(): rows_of(rows, start, length) for code, start, length in slices}


def _check_shard(task: tuple[Path, str, str, Shard, pa.Table | None]) -> list[Finding]:
    root, split, path, shard, rows = task
    try:
        digest = hashlib.sha256()
        with (root / path).open("rb") as file:
            while block := file.read(_READ_BYTES):
                digest.update(block)
            size = file.tell()
            if size != shard.bytes:
                return [Finding("shard", split, path, f"has {size} bytes, {shard.bytes} were written")]
            same = digest.hexdigest() == shard.sha256
            findings = [] if same else [Finding("shard", split, path, "SHA-256 differs from the one in dataset.json")]
            return findings + (_check_members(file, root, split, path, rows) if rows is not None else [])
    except OSError as error:
        return [Finding("unreadable", split, path, f"cannot be read ({error.strerror})")]
    except DataError as error:
        return [Finding("shard", split, path, str(error))]


def _check_members(file: Any, root: Path, split: str, path: str, rows: pa.Table) -> list[Finding]:
    """Compares the positions of a shard's samples and their labels with the index."""
    findings = []
    members = list(read_members(root / path))
    labels = {member.name: member for member in members if member.name.endswith(".cls")}
    images = {member.offset: member for member in members if member.name.endswith(".jpg")}
    columns = (rows[name].to_pylist() for name in ("name", "offset", "length", "label"))
    for name, offset, length, label in zip(*columns, strict=True):
        member = images.pop(offset, None)
        where = describe_location(path, name, offset)
        if member is None or member.length != length:
            findings.append(Finding("shard", split, where, "the sample is not at its indexed offset"))
            continue
        label_member = labels.get(member.name.replace(".jpg", ".cls"))
        file.seek(label_member.offset if label_member else 0)
        stored = file.read(label_member.length) if label_member else b""
        if stored != str(label).encode():
            findings.append(Finding("label", split, where, f"{stored.decode(errors='replace')!r}, indexed as {label}"))
    findings += [Finding("shard", split, path, f"contains {m.name}, which is not indexed") for m in images.values()]
    return findings


def _duplicates(splits: dict[str, pa.Table], digests: dict[str, Any]) -> Iterator[Finding]:
    """Finds images whose bytes occurred earlier, in the order of the splits."""
    names = list(splits)
    split_of_row = np.concatenate([np.full(len(splits[split]), i) for i, split in enumerate(names)])
    rows = np.concatenate([np.arange(len(splits[split])) for split in names])
    digest = np.concatenate([digests[split] for split in names])
    _, first, group = np.unique(digest, return_index=True, return_inverse=True)
    for i in np.flatnonzero(first[group] != np.arange(len(digest))):
        if not any(digest[i].tobytes()):
            continue  # unreadable
        original = first[group[i]]
        split, other = names[split_of_row[i]], names[split_of_row[original]]
        same_class = _label(splits[split], rows[i]) == _label(splits[other], rows[original])
        kind = "duplicate" if split == other else "across"
        detail = f"identical to {_location(splits[other], rows[original])}"
        yield Finding(
            kind, split, _location(splits[split], rows[i]), detail + ("" if same_class else ", in another class")
        )


def _label(table: pa.Table, row: int) -> int:
    return table["label"][int(row)].as_py()


def _location(table: pa.Table, row: int) -> str:
    return describe_location(*(table[name][int(row)].as_py() for name in ("path", "name", "offset")))


def _check_classes(scan: Scan) -> Iterator[Finding]:
    try:
        require_two_classes(scan.classes, scan.root)
    except DataError as error:
        yield Finding("classes", "", "train", str(error))
    for line in class_name_warnings(scan.classes):
        yield Finding("doubtful", "", "classes", line)
    for split, table in scan.splits.items():
        absent_classes = missing_class_warning(scan.classes, class_counts(table, len(scan.classes)), split)
        if absent_classes is not None:
            yield Finding("absent", split, split, absent_classes)


def _check_counts(classes: tuple[str, ...], splits: dict[str, SplitReport]) -> Iterator[Finding]:
    is_imagenet = len(classes) == IMAGENET["classes"] and all(c[0] == "n" and c[1:].isdigit() for c in classes)
    for split, report in splits.items():
        if is_imagenet and split in IMAGENET and report.samples != IMAGENET[split]:
            detail = f"{report.samples:,} images, ILSVRC2012 has {IMAGENET[split]:,} (--any-counts for a subset)"
            yield Finding("count", split, split, detail)
        if report.classes < len(classes) and (split == "train" or is_imagenet):
            yield Finding("count", split, split, f"{len(classes) - report.classes} classes have no image")
