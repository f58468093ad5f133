"""Writes docs/benchmarks.md and its plot from the latest result of each benchmark.

    python -m benchmarks.page [FILE...]

Each FILE is a results.csv of another machine, whose rows are added to this project's first.
"""

import csv
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from benchmarks.common import RESULTS
from pipeline.files import atomic_file, write_text

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"
PLOT = PAGE.with_name("benchmarks.png")
_HIGHER_IS_BETTER = ("img/s", "samples/s")  # for all other units, lower is better

HEAD = """# Benchmarks

`make bench` writes this page from `benchmarks/results.csv`, to which every run appends its rows with commit, versions
and machine. A benchmark runs this project and its peer in interleaved rounds on the same machine and discards the first
round; the ratio is the median over the rounds, with minimum and maximum. `make bench ONLY="loader engine"` runs some
benchmarks, `make bench IMAGES=FOLDER` uses your JPEGs instead of synthetic images. GPU figures come from `make gpu` and
`make gpu-day` ([gpu.md](gpu.md)).

![Ratios to the peers](benchmarks.png)

## Comparisons
"""

GROWTH = "growth with "
GROWTH_HEAD = """## How cost grows

`make bench ONLY=growth`: synthetic indexes, one rank's plan and the event channel at simulated numbers of ranks, and
the journal of a run that logs 100 steps per epoch.
"""

SLOWER = """## Where this project is slower, and why

- **Startup** does more than a plain script: Ray's processes, MLflow's store (the first start creates its tables) and
  Ray Train's controller. The imports of all workers are made once, while the driver prepares the run. The line `time`
  at a run's end has the seconds.
- **Two ranks** share the memory bandwidth: two runs that exchange nothing are the limit on this machine.
- **Re-encoding** decodes and encodes like Pillow, and in addition writes and hashes shards on the same cores.
- **A served image** costs HTTP, JSON and base64; several images per request share this overhead. The memory format
  NHWC makes up for it.
- **Memory modes** (activation checkpointing) trade time for memory by design.
- **ZeRO 1** keeps the host busy with partitions; `auto` is stage 0.
- **Training from JPEGs on a GPU** shares the GPU with the decoder's kernels and the interpreter with the reading
  threads; which of the two causes the loss of a quarter is not known yet. DenseNet-264 and -169 are host-bound, as is
  the plain loop.
"""


@dataclass(frozen=True)
class Row:
    """One row of the results."""

    date: str
    commit: str
    machine: str
    benchmark: str
    case: str
    value: float
    unit: str
    ratio: tuple[float, float, float] | None  # median, minimum, maximum of ours to this case
    ours: str
    rounds: int

    @property
    def times_better(self) -> tuple[float, float, float]:
        """How many times better ours is than this case: median, minimum, maximum."""
        assert self.ratio is not None
        if self.unit in _HIGHER_IS_BETTER:
            return self.ratio
        median, low, high = self.ratio
        return 1 / median, 1 / high, 1 / low


def latest(file: Path = RESULTS) -> list[Row]:
    """Returns the latest row of each case, in the order of their first appearance."""
    rows: dict[tuple[str, str, str], Row] = {}
    with file.open(newline="", encoding="utf-8") as lines:
        for line in csv.DictReader(lines):
            ratio = None
            if line["ratio"]:
                ratio = (float(line["ratio"]), float(line["ratio_low"]), float(line["ratio_high"]))
            row = Row(
                line["date"],
                line["commit"],
                line["machine"],
                line["benchmark"],
                line["case"],
                float(line["value"]),
                line["unit"],
                ratio,
                line["ours"],
                int(line["rounds"]),
            )
            rows[row.machine, row.benchmark, row.case] = row
    return list(rows.values())


def text(rows: list[Row]) -> str:
    """Returns the page's Markdown."""
    growth = [row for row in rows if row.benchmark.startswith(GROWTH)]
    single = [row for row in rows if row not in growth]
    others = ["## Other measurements", "", *_others(single)]
    return "\n".join([HEAD, *_comparisons(single), "", *others, "", GROWTH_HEAD, *_growth(growth), "", SLOWER])


def _comparisons(rows: list[Row]) -> Iterator[str]:
    yield "| benchmark | this project | peer | times better | rounds, commit, machine |"
    yield "|---|---|---|---|---|"
    values = {(row.machine, row.benchmark, row.case): row for row in rows}
    for row in rows:
        ours = values.get((row.machine, row.benchmark, row.ours))
        if row.ratio is None or row.case == row.ours or ours is None:
            continue
        better = "{:.2f} ({:.2f} - {:.2f})".format(*row.times_better)
        yield (
            f"| {row.benchmark} | {ours.case}: {_amount(ours)} | {row.case}: {_amount(row)} | {better} | "
            f"{row.rounds}, {row.commit}, {row.machine} |"
        )


def _others(rows: list[Row]) -> Iterator[str]:
    yield "| benchmark | case | value | commit, machine |"
    yield "|---|---|---|---|"
    for row in rows:
        if row.ratio is None:
            yield f"| {row.benchmark} | {row.case} | {_amount(row)} | {row.commit}, {row.machine} |"


def _growth(rows: list[Row]) -> Iterator[str]:
    """Yields a table per axis (samples, ranks, epochs): a row per quantity, a column per size."""
    axes: dict[str, dict[str, dict[int, Row]]] = {}
    for row in rows:
        axis, _, quantity = row.benchmark.removeprefix(GROWTH).partition(": ")
        axes.setdefault(axis, {}).setdefault(quantity, {})[int(row.case)] = row
    for axis, quantities in axes.items():
        sizes = sorted({size for cells in quantities.values() for size in cells})
        yield f"| {axis} | " + " | ".join(f"{size:,}" for size in sizes) + " | commit, machine |"
        yield "|---|" + "---|" * (len(sizes) + 1)
        for quantity, cells in quantities.items():
            amounts = (f"{cells[size].value:,.3g} {cells[size].unit}" if size in cells else "" for size in sizes)
            newest = cells[max(cells)]
            yield f"| {quantity} | " + " | ".join(amounts) + f" | {newest.commit}, {newest.machine} |"
        yield ""


def _amount(row: Row) -> str:
    digits = 0 if row.value >= 100 else 1 if row.value >= 10 else 2
    return f"{row.value:,.{digits}f} {row.unit}"


def plot(rows: list[Row]) -> Figure:
    """Plots how many times better this project is than each peer, with the range over the rounds."""
    compared = [row for row in rows if row.ratio is not None and row.case != row.ours][::-1]
    figure = Figure(figsize=(9, 0.28 * len(compared) + 1), layout="constrained")
    axes = figure.subplots()
    for y, row in enumerate(compared):
        median, low, high = row.times_better
        axes.barh(y, median - 1, left=1, color="tab:green" if median >= 1 else "tab:red", alpha=0.7)
        axes.plot([low, high], [y, y], color="black", linewidth=1)
    axes.set_yticks(range(len(compared)), [f"{row.benchmark} | {row.case}" for row in compared], fontsize=7)
    axes.set_ylim(-1, len(compared))
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel("times better than the peer; lines: range over the rounds")
    return figure


def add(file: Path, results: Path = RESULTS) -> None:
    """Appends the rows of another results file with the same columns.

    Raises:
        ValueError: the columns differ.
    """
    columns, _, rows = file.read_text(encoding="utf-8").partition("\n")
    with results.open("r+", encoding="utf-8", newline="") as lines:
        if lines.readline().rstrip("\n") != columns:
            raise ValueError(f"{file}: the first line must have the columns of {results.name}.")
        lines.seek(0, os.SEEK_END)
        lines.write(rows)


def write() -> None:
    """Writes the page and the plot."""
    rows = latest()
    write_text(PAGE, text(rows))
    with atomic_file(PLOT) as temporary:
        plot(rows).savefig(temporary, dpi=110)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        add(Path(name))
    write()
