"""What `densenet data` shows: progress, and what has come of it."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn

from launch.cli.common.tables import print_table
from pipeline.data.dataset import Manifest
from pipeline.data.space import format_bytes
from pipeline.data.tools.inspect import KINDS
from pipeline.data.tools.pool import Pool
from pipeline.data.tools.prepare import PreparedSet
from pipeline.data.tools.stats import Stats
from pipeline.data.tools.verify import Report
from pipeline.errors import UserError
from pipeline.files import write_text
from pipeline.formatting import duration

_SHOWN = 5  # findings of each kind; the JSON report has them all
_LINE_S = 10  # between progress lines where there is no terminal


def print_prepared(console: Console, target: Path, share: tuple[int, int], done: PreparedSet, seconds: float) -> None:
    """Says what was made of a data set, or of a share of it."""
    print_notes(console, done.notes)
    if done.manifest is None:
        console.print(
            f"{target}: share {share[0]}/{share[1]} is written, {done.parts} parts in {duration(seconds)}; "
            f"{done.waiting} parts of other shares are not there yet, the last one completes the data set",
            soft_wrap=True,
        )
        return
    made = done.manifest.made
    if not done.parts:
        console.print(f"{target} is complete already", soft_wrap=True)
    else:
        found = f", {done.parts_found} of them by an earlier start" if done.parts_found else ""
        console.print(
            f"{target}: {done.parts} parts written{found} in {duration(seconds)} from {made['from']}", soft_wrap=True
        )
    for name, split in done.manifest.splits.items():
        shards = f" in {len(split.shards)} shards" if split.shards else ""
        console.print(f"{name:6}{split.samples:,} images, {format_bytes(split.bytes)}{shards}")
    console.print(f"{len(done.manifest.classes):,} classes; {made['converted']:,} images encoded anew")
    if done.ignored:
        console.print(
            f"{len(done.ignored)} corrupt images left out, named in {target / 'dataset.json'}", style="yellow"
        )


def print_indexed(console: Console, root: Path, manifest: Manifest, notes: list[str]) -> None:
    """Says what data that lie where they are hold."""
    print_notes(console, notes)
    for name, split in manifest.splits.items():
        console.print(f"{name:6}{split.samples:,} images, {format_bytes(split.bytes)}")
    console.print(f"{root} can be trained on: data.root={root}", soft_wrap=True)


def write_json(file: Path, content: object) -> None:
    """Writes a report."""
    try:
        write_text(file, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    except OSError as error:
        raise UserError(f"--json={file} cannot be written: {error.strerror or error}.") from error


@contextmanager
def pool(console: Console, workers: int) -> Iterator[Pool]:
    """Processes whose progress is shown: a bar with the time left on a terminal, a line now and then elsewhere.

    Ctrl-C ends them and the command, with exit code 130.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]}"),
    )
    bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    tasks: dict[str, tuple[TaskID, float]] = {}
    told = time.monotonic()

    def on_progress(what: str, done: int, total: int) -> None:
        nonlocal told
        now = time.monotonic()
        if what not in tasks:
            tasks[what] = (bar.add_task(what, total=total, left=""), now)
        task, started = tasks[what]
        left = f"ETA {duration((now - started) * (total - done) / done)}" if now > started and done else ""
        bar.update(task, completed=done, left=left)
        if not console.is_terminal and now - told > _LINE_S:
            told = now
            console.print(f"{what} {done / total:.0%}  {left}")

    try:
        with bar, Pool(workers, on_progress) as processes:
            yield processes
    except KeyboardInterrupt:
        console.print("interrupted: what is finished is kept; the same command goes on from there", style="yellow")
        raise SystemExit(130) from None


def print_verified(console: Console, report: Report) -> None:
    """Prints what was found in a data set, corruption by its kinds."""
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
        is_corruption, meaning = KINDS[kind]
        console.print(f"{kind}: {count:,}  ({meaning})", style="red" if is_corruption else "yellow", soft_wrap=True)
        of_kind = [finding for finding in report.findings if finding.kind == kind]
        for finding in of_kind[:_SHOWN]:
            console.print(f"  {finding.where}: {finding.detail}", markup=False, soft_wrap=True)
        if count > _SHOWN:
            console.print(f"  and {count - _SHOWN:,} more; --json FILE has them all")
    print_notes(console, [f"left out: {line}" for line in report.ignored])
    if report.corruption:
        console.print(f"corrupt: {len(report.corruption):,} findings", style="red")
    else:
        console.print("no corruption", style="green")


def print_notes(console: Console, notes: list[str]) -> None:
    """Prints what the user may not expect."""
    for line in notes:
        console.print(line, style="yellow", markup=False, soft_wrap=True)


def print_stats(console: Console, result: Stats) -> None:
    """Prints the numbers of each split: images, sizes, bytes, channels."""
    console.print(f"{result.root} ({result.layout}), {len(result.classes):,} classes", soft_wrap=True)
    print_notes(console, result.notes)
    tree = result.to_json()
    for name, split in result.splits.items():
        unreadable = f", {split.unreadable} unreadable" if split.unreadable else ""
        least, most = min(split.per_class), max(split.per_class)
        console.print(f"{name}: {split.samples:,} images, {format_bytes(split.bytes)}, {least:,} to {most:,} per class")
        console.print(f"  of {split.decoded:,} decoded{unreadable}:")
        for key, unit in (("widths", "pixels"), ("heights", "pixels"), ("lengths", "bytes")):
            quantiles = tree["splits"][name][key]
            numbers = ", ".join(f"{quantiles[q]:,.0f}" for q in ("p0", "p5", "p50", "p95", "p100"))
            console.print(f"  {key:8} {numbers} {unit} (least, 5 %, median, 95 %, most)")
        for key, values in (("mean", split.mean), ("std", split.std)):
            console.print(f"  {key:8} {', '.join(f'{value:.4f}' for value in values)} (red, green, blue of 1)")


def _range(values: tuple[int, float, int]) -> str:
    least, median, most = values
    return f"{least:,}" if least == most else f"{least:,} - {most:,}, median {median:g}"


def _counted(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in sorted(counts.items(), key=lambda pair: -pair[1]))
