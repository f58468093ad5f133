"""Renders HTML pages in a real browser: Debian's Chromium, headless and offline."""

import shutil
import subprocess
from pathlib import Path

import pytest

_OPTIONS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


def rendered(page: Path, folder: Path, script: str = "") -> str:
    """Returns the DOM of a page after Chromium has loaded it and run the test's script."""
    program = shutil.which("chromium")
    if program is None:
        pytest.skip("there is no Chromium on this machine (Debian's package chromium)")
    copy = folder / "page.html"
    at_the_end = f'<script>addEventListener("load", () => {{{script}}})</script>'
    copy.write_text(page.read_text(encoding="utf-8") + at_the_end, encoding="utf-8")
    command = [program, *_OPTIONS, f"--user-data-dir={folder / 'browser'}", "--virtual-time-budget=5000"]
    done = subprocess.run(
        [*command, "--dump-dom", copy.as_uri()], capture_output=True, text=True, check=True, timeout=120
    )
    return done.stdout
