"""Helpers of the benchmarks: interleaved rounds, ratios with their range, rows in a CSV file."""

import csv
import datetime
import functools
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
_PACKAGES = (
    "torch", "torchvision", "timm", "deepspeed", "nvidia-dali-cuda130", "webdataset", "pillow", "simplejpeg", "numpy",
    "spdl", "litdata", "mosaicml-streaming", "datasets", "ffcv",
)  # fmt: skip


def interleaved(cases: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Runs every case once per round, so that a slowdown of the machine affects all; discards the warm-up round."""
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
    """Prints and saves each case's median, and the ratio of `ours` to it (median, minimum, maximum over the rounds)."""
    print(f"\n{benchmark}: {machine()}, medians of {len(values[ours])} rounds")
    width = max(map(len, values))
    for name, case_values in values.items():
        ratios = [our_value / other for our_value, other in zip(values[ours], case_values, strict=True)]
        low, ratio, high = min(ratios), statistics.median(ratios), max(ratios)
        median = statistics.median(case_values)
        print(f"  {name:{width}}  {median:12,.1f} {unit}   {ours} is {ratio:.2f} x ({low:.2f} - {high:.2f})")
        save_result(benchmark, name, median, unit, (ratio, low, high), ours, len(ratios))


def save_result(
    benchmark: str,
    case: str,
    value: float,
    unit: str,
    ratio: tuple[float, float, float] | None = None,
    ours: str = "",
    rounds: int = 1,
) -> None:
    """Appends one row to the results; `ratio` is (median, minimum, maximum) of `ours` to this case."""
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
    """Writes synthetic JPEGs of ImageNet's typical size, 500 x 375 pixels and about 110 kB."""
    folder.mkdir()
    rng, files = np.random.default_rng(0), []
    for i in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (110, 146, 3), np.uint8))
        files.append(folder / f"{i:04d}.jpg")
        coarse.resize((500, 375), Image.Resampling.BICUBIC).save(files[-1], quality=90)
    return files


def load_images(images: Path | None, folder: Path) -> list[Path]:
    """Returns the JPEGs in the folder `images`, or synthetic images written below `folder`."""
    if images is None:
        return write_images(folder / "synthetic", 64)
    return sorted(file for file in images.iterdir() if file.suffix.lower() in (".jpg", ".jpeg"))


def machine() -> str:
    """Returns the name of the GPU, or of the CPU without one, and the number of usable cores."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else names[0] if names else platform.machine()
    return f"{name}, {len(os.sched_getaffinity(0))} cores"


@functools.cache
def _versions() -> str:
    """Returns the versions of the installed packages, and of CUDA and its driver on a GPU."""
    found = []
    for name in _PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{name}={importlib.metadata.version(name)}")
    if torch.cuda.is_available():
        query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0")
        found += [f"cuda={torch.version.cuda}", f"driver={output_of(*query) or 'unknown'}"]
    return " ".join(found)


@functools.cache
def _commit() -> str:
    """Returns the git commit, marked `-dirty` if the tree has changes other than these results.

    Without a repository, as on a machine to which only the files were copied, the variable COMMIT names it.
    """
    changed = output_of("git", "status", "--porcelain", "--", ":/", ":!/benchmarks/results.csv", ":!/docs/benchmarks.*")
    commit = output_of("git", "rev-parse", "--short", "HEAD") or os.environ.get("COMMIT") or "unknown"
    return commit + ("-dirty" if changed else "")


def output_of(*command: str) -> str:
    """Returns what a command prints, in the project's folder; an empty string if it fails or is not installed."""
    with suppress(OSError):
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
        return done.stdout.strip()
    return ""
