"""What benchmarks share: rounds that take turns, ratios with their spread, rows in a CSV file."""

import csv
import datetime
import importlib.metadata
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image

RESULTS = Path(__file__).with_name("results.csv")
_COLUMNS = (
    "date", "commit", "machine", "versions", "benchmark", "case", "value", "unit", "ratio", "ratio_low", "ratio_high",
    "ours", "rounds",
)  # fmt: skip
_PACKAGES = ("torch", "torchvision", "timm", "nvidia-dali-cuda130", "webdataset", "pillow", "numpy")


def in_turns(cases: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Runs every case once a round, so that a machine that gets slower does so for all; the first round is not kept."""
    values: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(rounds + 1):
        for name, case in cases.items():
            value = case()
            if number:
                values[name].append(value)
    return values


def seconds(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def report(benchmark: str, values: dict[str, list[float]], unit: str, ours: str) -> None:
    """Prints each case's median, and `ours` as a ratio to it (median, least, most over the rounds); keeps both."""
    print(f"\n{benchmark}: {machine()}, medians of {len(values[ours])} rounds")
    width = max(map(len, values))
    for name, of_case in values.items():
        ratios = [mine / other for mine, other in zip(values[ours], of_case, strict=True)]
        low, middle, high = min(ratios), statistics.median(ratios), max(ratios)
        median = statistics.median(of_case)
        print(f"  {name:{width}}  {median:12,.1f} {unit}   {ours} is {middle:.2f} x ({low:.2f} - {high:.2f})")
        keep(benchmark, name, median, unit, (middle, low, high), ours, len(ratios))


def keep(
    benchmark: str,
    case: str,
    value: float,
    unit: str,
    ratio: tuple[float, float, float] | None = None,
    ours: str = "",
    rounds: int = 1,
) -> None:
    """Appends one row to the results; `ratio` is (median, least, most) of `ours` to this case."""
    new = not RESULTS.exists()
    with RESULTS.open("a", newline="", encoding="utf-8") as file:
        rows = csv.writer(file, lineterminator="\n")
        if new:
            rows.writerow(_COLUMNS)
        ratios = [f"{number:.3f}" for number in ratio] if ratio else ["", "", ""]
        rows.writerow(
            [
                f"{datetime.date.today()}",
                _commit(),
                machine(),
                _versions(),
                benchmark,
                case,
                f"{value:.4g}",
                unit,
                *ratios,
                ours,
                rounds,
            ]
        )


def write_images(folder: Path, count: int) -> list[Path]:
    """JPEGs of ImageNet's usual size and weight, 500 x 375 pixels and about 110 kB."""
    folder.mkdir()
    rng, files = np.random.default_rng(0), []
    for i in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (110, 146, 3), np.uint8))
        files.append(folder / f"{i:04d}.jpg")
        coarse.resize((500, 375), Image.Resampling.BICUBIC).save(files[-1], quality=90)
    return files


def take_images(given: Path | None, folder: Path) -> list[Path]:
    """The JPEGs in the folder `given`, or made-up ones below `folder`."""
    if given is None:
        return write_images(folder / "made-up", 64)
    return sorted(file for file in given.iterdir() if file.suffix.lower() in (".jpg", ".jpeg"))


def machine() -> str:
    """The GPU, if there is one, the processor and the cores that may be used."""
    gpu = f"{torch.cuda.get_device_name()}, " if torch.cuda.is_available() else ""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{gpu}{names[0] if names else platform.machine()}, {len(os.sched_getaffinity(0))} cores"


def _versions() -> str:
    """Those packages that are installed: `benchmarks.gpu` runs where only some are."""
    found = []
    for name in _PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{name}={importlib.metadata.version(name)}")
    return " ".join(found)


def _commit() -> str:
    """The commit, marked where the tree has changes besides these results."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], capture_output=True, text=True, cwd=RESULTS.parent)
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--", ":/", ":!results.csv", ":!/docs/benchmarks.*")
    return (git("rev-parse", "--short", "HEAD") or "unknown") + ("-dirty" if changed else "")
