"""docs/benchmarks.md and its image, from the newest results of each benchmark.

python -m benchmarks.page
"""

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from benchmarks.common import RESULTS
from pipeline.files import atomic_file, write_text

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"
IMAGE = PAGE.with_name("benchmarks.png")
_RATES = ("img/s", "samples/s")  # more is better; of all other units, less is

HEAD = """# Benchmarks

This page is written by `make bench` from `benchmarks/results.csv`, where every run has appended its rows with commit,
versions and machine. A benchmark runs this project and its peer in turns on the same machine, the first round is not
kept; the ratio is the median over the rounds, with the least and the most of them. `make bench ONLY="loader engine"`
runs some, `make bench IMAGES=FOLDER` takes your JPEGs in the place of made-up ones. GPU figures come from `make gpu`.

![Ratios to the peers](benchmarks.png)

## Beside a peer
"""

BEHIND = """## Behind, and why

- **The start** is, beside what a plain script does: Ray with its dashboard, MLflow's store (whose tables a first start
  makes), Ray Train's controller, and more to import in each worker. The line `time` at a run's end has the seconds.
- **Re-encoding** decodes and encodes as Pillow does, and then writes and hashes shards on the same cores.
- **A served image** pays HTTP, JSON and base64; several in a request share it.
- **Memory modes** buy memory with time; that is their purpose.
- **ZeRO 1** keeps the host busy with partitions; `auto` is stage 0.
- **Training fed from JPEGs on a GPU** shares the device with the decoder's kernels and the interpreter with the reading
  threads; which of the two costs the quarter is not known yet. DenseNet-264 and -169 wait for the host, and so does
  the bare loop.
"""


@dataclass(frozen=True)
class Row:
    """One line of the results."""

    date: str
    commit: str
    machine: str
    benchmark: str
    case: str
    value: float
    unit: str
    ratio: tuple[float, float, float] | None  # median, least, most of ours to this case
    ours: str
    rounds: int

    @property
    def times_better(self) -> tuple[float, float, float]:
        """The ratio as how many times better ours is than this case."""
        assert self.ratio is not None
        if self.unit in _RATES:
            return self.ratio
        middle, low, high = self.ratio
        return 1 / middle, 1 / high, 1 / low


def newest(file: Path = RESULTS) -> list[Row]:
    """The newest row of each case, in the order of the benchmarks' first appearance."""
    found: dict[tuple[str, str, str], Row] = {}
    with file.open(newline="", encoding="utf-8") as lines:
        for row in csv.DictReader(lines):
            ratio = None
            if row["ratio"]:
                ratio = (float(row["ratio"]), float(row["ratio_low"]), float(row["ratio_high"]))
            read = Row(
                row["date"],
                row["commit"],
                row["machine"],
                row["benchmark"],
                row["case"],
                float(row["value"]),
                row["unit"],
                ratio,
                row["ours"],
                int(row["rounds"]),
            )
            found[read.machine, read.benchmark, read.case] = read
    return list(found.values())


def text(rows: list[Row]) -> str:
    """The page."""
    return "\n".join([HEAD, *_compared(rows), "", "## Alone", "", *_alone(rows), "", BEHIND])


def _compared(rows: list[Row]) -> Iterator[str]:
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


def _alone(rows: list[Row]) -> Iterator[str]:
    yield "| benchmark | what | | commit, machine |"
    yield "|---|---|---|---|"
    for row in rows:
        if row.ratio is None:
            yield f"| {row.benchmark} | {row.case} | {_amount(row)} | {row.commit}, {row.machine} |"


def _amount(row: Row) -> str:
    digits = 0 if row.value >= 100 else 1 if row.value >= 10 else 2
    return f"{row.value:,.{digits}f} {row.unit}"


def image(rows: list[Row]) -> Figure:
    """How many times better than each peer, with the spread over the rounds."""
    shown = [row for row in rows if row.ratio is not None and row.case != row.ours][::-1]
    figure = Figure(figsize=(9, 0.28 * len(shown) + 1), layout="constrained")
    axes = figure.subplots()
    for place, row in enumerate(shown):
        middle, low, high = row.times_better
        axes.barh(place, middle - 1, left=1, color="tab:green" if middle >= 1 else "tab:red", alpha=0.7)
        axes.plot([low, high], [place, place], color="black", linewidth=1)
    axes.set_yticks(range(len(shown)), [f"{row.benchmark} | {row.case}" for row in shown], fontsize=7)
    axes.set_ylim(-1, len(shown))
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel("times better than the peer; lines: over the rounds")
    return figure


def write() -> None:
    """Writes both files."""
    rows = newest()
    write_text(PAGE, text(rows))
    with atomic_file(IMAGE) as aside:
        image(rows).savefig(aside, dpi=110)


if __name__ == "__main__":
    write()
