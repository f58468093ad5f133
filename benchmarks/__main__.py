"""Runs all benchmarks, or some by name, and then writes docs/benchmarks.md with the latest results.

    python -m benchmarks [NAME...] [--images FOLDER] [--rounds N]

`make bench` runs all of them (half an hour on two cores), `make bench ONLY="loader tracking"` some.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from benchmarks import page

# Options of each benchmark in addition to --rounds.
NAMES: dict[str, tuple[str, ...]] = {
    "loader": ("--images",),
    "end_to_end": ("--images",),
    "prepare": ("--images",),
    "streaming": ("--images",),
    "plan": (),
    "index_scale": (),
    "growth": (),
    "engine": (),
    "memory_modes": (),
    "startup": (),
    "tracking": (),
    "serving": (),
}


def main() -> None:
    """Runs each benchmark in its own process, and continues after a failure."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks")
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--images", type=Path, help="folder of JPEGs; synthetic images by default")
    parser.add_argument("--rounds", type=int, help="number of timed rounds; each benchmark has a default")
    options = parser.parse_args()
    unknown = [name for name in options.names if name not in NAMES]
    if unknown:
        parser.error(f"{', '.join(unknown)} is unknown: use {', '.join(NAMES)}.")
    failed = []
    for name in options.names or NAMES:
        arguments = (
            ["--rounds", str(options.rounds)] if options.rounds and name not in ("index_scale", "growth") else []
        )
        if options.images and "--images" in NAMES[name]:
            arguments += ["--images", str(options.images)]
        if subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *arguments]).returncode:
            failed.append(name)
    page.write()
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
