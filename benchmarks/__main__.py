"""All benchmarks, or some by name, and then the page that shows the newest results.

    python -m benchmarks [NAME...] [--images FOLDER] [--rounds N]

`make bench` runs them all (half an hour on two cores), `make bench ONLY="loader tracking"` some.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from benchmarks import page

# What each takes besides --rounds.
NAMES: dict[str, tuple[str, ...]] = {
    "loader": ("--images",),
    "end_to_end": ("--images",),
    "prepare": ("--images",),
    "plan": (),
    "index_scale": (),
    "engine": (),
    "memory_modes": (),
    "startup": (),
    "tracking": (),
    "serving": (),
}


def main() -> None:
    """Runs each in a process of its own, and goes on after one that fails."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks")
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--images", type=Path, help="a folder of JPEGs; made-up ones without it")
    parser.add_argument("--rounds", type=int)
    options = parser.parse_args()
    unknown = [name for name in options.names if name not in NAMES]
    if unknown:
        parser.error(f"{', '.join(unknown)} is not known: use {', '.join(NAMES)}.")
    failed = []
    for name in options.names or NAMES:
        arguments = ["--rounds", str(options.rounds)] if options.rounds and name != "index_scale" else []
        if options.images and "--images" in NAMES[name]:
            arguments += ["--images", str(options.images)]
        if subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *arguments]).returncode:
            failed.append(name)
    page.write()
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
