"""Output of `densenet data`: progress and reports."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn

from launch.cli.common.tables import print_table
from pipeline.config_data import Data
from pipeline.data.dataset import Manifest, open_index
from pipeline.data.shuffle_quality import window_classes
from pipeline.data.tools.append import AppendResult
from pipeline.data.tools.diff import KINDS, Difference
from pipeline.data.tools.image_checks import FINDING_KINDS
from pipeline.data.tools.pool import Pool
from pipeline.data.tools.prepare import PrepareResult
from pipeline.data.tools.stats import Stats
from pipeline.data.tools.verify import Report
from pipeline.errors import UserError, listed
from pipeline.files import write_text
from pipeline.formatting import duration, format_bytes

_MAX_SHOWN = 5  # findings of each kind; the JSON report has all of them
_MAX_EXAMPLES = 10  # of each kind of difference; the JSON report has all of them
_PROGRESS_S = 10  # seconds between progress lines without a terminal


def print_prepared(
    console: Console, target: Path, share: tuple[int, int], result: PrepareResult, seconds: float
) -> None:
    """Prints the result of a preparation, or of share K of N."""
    print_notes(console, result.notes)
    if result.manifest is None:
        console.print(
            f"{target}: share {share[0]}/{share[1]} is written, {result.parts} parts in {duration(seconds)}; "
            f"{result.parts_missing} parts of other shares are missing, the last share completes the data set",
            soft_wrap=True,
        )
        return
    made = result.manifest.made
    if not result.parts:
        console.print(f"{target} is already complete", soft_wrap=True)
    else:
        reused = f", {result.parts_reused} of them by an earlier command" if result.parts_reused else ""
        console.print(
            f"{target}: {result.parts} parts written{reused} in {duration(seconds)} from {made['from']}", soft_wrap=True
        )
    for name, split in result.manifest.splits.items():
        shards = f" in {len(split.shards)} shards" if split.shards else ""
        console.print(f"{name:6}{split.samples:,} images, {format_bytes(split.bytes)}{shards}")
    console.print(f"{len(result.manifest.classes):,} classes; {made['converted']:,} images re-encoded")
    if result.skipped_corrupt:
        console.print(
            f"{len(result.skipped_corrupt)} corrupt images skipped, listed in {target / 'dataset.json'}", style="yellow"
        )


def print_indexed(console: Console, root: Path, manifest: Manifest, notes: list[str]) -> None:
    """Prints the contents of data indexed in place."""
    print_notes(console, notes)
    for name, split in manifest.splits.items():
        console.print(f"{name:6}{split.samples:,} images, {format_bytes(split.bytes)}")
    window = Data().window
    if len(manifest.splits["train"].shards) > window:
        classes = window_classes(open_index(root, manifest, "train"), window)
        console.print(f"data.shuffle=windowed: {classes}", style="yellow" if classes.is_poor else None, soft_wrap=True)
    stage = "" if manifest.address is None else " data.stage=DIR"
    console.print(f"{root} is ready for training: data.root={root}{stage}", soft_wrap=True)


def write_json(file: Path, content: object) -> None:
    """Writes a report as JSON."""
    try:
        write_text(file, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    except OSError as error:
        raise UserError(f"--json={file} cannot be written: {error.strerror or error}.") from error


@contextmanager
def process_pool(console: Console, workers: int) -> Iterator[Pool]:
    """Yields a process pool with progress: a bar with the remaining time on a terminal, else a line every 10 s.

    Ctrl-C ends the processes and the command, with exit code 130.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[eta]}"),
    )
    bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    tasks: dict[str, tuple[TaskID, float]] = {}
    last_printed = time.monotonic()

    def on_progress(description: str, done: int, total: int) -> None:
        nonlocal last_printed
        now = time.monotonic()
        if description not in tasks:
            tasks[description] = (bar.add_task(description, total=total, eta=""), now)
        task, started = tasks[description]
        eta = f"ETA {duration((now - started) * (total - done) / done)}" if now > started and done else ""
        bar.update(task, completed=done, eta=eta)
        if not console.is_terminal and now - last_printed > _PROGRESS_S:
            last_printed = now
            console.print(f"{description} {done / total:.0%}  {eta}")

    try:
        with bar, Pool(workers, on_progress) as pool:
            yield pool
    except KeyboardInterrupt:
        console.print("interrupted: completed work is kept; repeat the command to resume", style="yellow")
        raise SystemExit(130) from None


def print_verified(console: Console, report: Report) -> None:
    """Prints a verification report: statistics of the splits, and findings by kind."""
    console.print(f"{report.root} ({report.layout})", markup=False, soft_wrap=True)
    rows = {
        "images": [f"{split.samples:,}" for split in report.splits.values()],
        "classes": [f"{split.classes:,}" for split in report.splits.values()],
        "per class": [_range(split.per_class) for split in report.splits.values()],
        "bytes": [format_bytes(split.bytes) for split in report.splits.values()],
        "formats": [_counted(split.formats) for split in report.splits.values()],
        "colors": [_counted(split.modes) for split in report.splits.values()],
        "shorter side": [_range(split.shorter_side) for split in report.splits.values()],
    }
    print_table(console, ("", *report.splits), [(name, *cells) for name, cells in rows.items()])
    for kind, count in report.counts().items():
        is_error, meaning = FINDING_KINDS[kind]
        console.print(f"{kind}: {count:,}  ({meaning})", style="red" if is_error else "yellow", soft_wrap=True)
        kind_findings = [finding for finding in report.findings if finding.kind == kind]
        for finding in kind_findings[:_MAX_SHOWN]:
            console.print(f"  {finding.where}: {finding.detail}", markup=False, soft_wrap=True)
        if count > _MAX_SHOWN:
            console.print(f"  and {count - _MAX_SHOWN:,} more; --json FILE lists all of them")
    print_notes(console, [f"ignored: {line}" for line in report.ignored])
    if report.errors:
        console.print(f"errors: {len(report.errors):,}", style="red")
    else:
        console.print("no errors", style="green")


def print_notes(console: Console, notes: list[str]) -> None:
    """Prints notes on ignored files and doubtful classes."""
    for line in notes:
        console.print(line, style="yellow", markup=False, soft_wrap=True)


def print_difference(console: Console, result: Difference) -> None:
    """Prints what differs between two data sets: counts, and up to ten examples of each kind."""
    for name, data in (("first", result.a), ("second", result.b)):
        console.print(
            f"{name:7}{data.root}: {len(data.class_N):,} images, {len(data.classes):,} classes", soft_wrap=True
        )
    for title, names in (("added", result.classes_added), ("removed", result.classes_removed)):
        if names:
            console.print(f"classes {title}: {len(names):,}: {listed(names)}", markup=False, soft_wrap=True)
    if result.labels_changed:
        console.print(f"classes with another label: {result.labels_changed:,}")
    for kind, count in result.counts.items():
        if count:
            console.print(f"{kind}: {count:,}  ({KINDS[kind]})", style="yellow")
            for line in result.lines(kind, _MAX_EXAMPLES):
                console.print(f"  {line}", markup=False, soft_wrap=True)
            if count > _MAX_EXAMPLES:
                console.print(f"  and {count - _MAX_EXAMPLES:,} more; --json FILE lists all of them")
    console.print(f"images are identified by {result.key}", soft_wrap=True)
    if result.is_equal:
        console.print("no differences", style="green")


def print_appended(console: Console, target: Path, result: AppendResult) -> None:
    """Prints what was appended to a data set."""
    print_notes(console, result.notes)
    counts = ", ".join(f"{count:,} images of {split}" for split, count in result.images.items())
    if result.is_repeated:
        console.print(f"{target} has these already: {counts} were appended by an earlier command", soft_wrap=True)
        return
    console.print(f"{target}: {counts} appended", soft_wrap=True)
    if result.skipped_existing:
        console.print(f"{result.skipped_existing:,} images skipped that it had already", style="yellow")
    if result.skipped_corrupt:
        console.print(f"{len(result.skipped_corrupt)} corrupt images skipped, listed in {target / 'dataset.json'}")
    for name, split in result.manifest.splits.items():
        console.print(f"{name:6}{split.samples:,} images, {format_bytes(split.bytes)} in {len(split.shards)} shards")


def print_stats(console: Console, result: Stats) -> None:
    """Prints the statistics of each split: images, sizes, bytes, channels."""
    console.print(f"{result.root} ({result.layout}), {len(result.classes):,} classes", soft_wrap=True)
    print_notes(console, result.notes)
    tree = result.to_json()
    for name, split in result.splits.items():
        unreadable = f", {split.unreadable} unreadable" if split.unreadable else ""
        low, high = min(split.per_class), max(split.per_class)
        console.print(f"{name}: {split.samples:,} images, {format_bytes(split.bytes)}, {low:,} to {high:,} per class")
        console.print(f"  {split.decoded:,} decoded{unreadable}:")
        for key, unit in (("widths", "pixels"), ("heights", "pixels"), ("lengths", "bytes")):
            quantiles = tree["splits"][name][key]
            numbers = ", ".join(f"{quantiles[q]:,.0f}" for q in ("p0", "p5", "p50", "p95", "p100"))
            console.print(f"  {key:8} {numbers} {unit} (minimum, 5 %, median, 95 %, maximum)")
        for key, values in (("mean", split.mean), ("std", split.std)):
            console.print(f"  {key:8} {', '.join(f'{value:.4f}' for value in values)} (red, green, blue in [0, 1])")


def _range(values: tuple[int, float, int]) -> str:
    low, median, high = values
    return f"{low:,}" if low == high else f"{low:,} - {high:,}, median {median:g}"


def _counted(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in sorted(counts.items(), key=lambda pair: -pair[1]))
