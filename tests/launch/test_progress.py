"""What a user sees of a run's events."""

import io

import pytest
from rich.console import Console

from launch.progress import Display

STEP = {
    "kind": "step",
    "epoch": 0.5,
    "step": 10,
    "loss": 1.25,
    "lr": 0.1,
    "img_per_s": 99.0,
    "data_wait": 0.1,
    "eta_s": 62,
}
EVALUATION = {"kind": "eval", "weights": "raw", "epoch": 1, "loss": 1.0, "img_per_s": 200.0}
COUNTS = {"top1_correct": 3, "top5_correct": 4, "top5_k": 5, "total": 4}
EVENTS = [
    {"kind": "resumed", "samples_seen": 64, "checkpoint": "there"},
    STEP,
    EVALUATION | COUNTS,
    {"kind": "warning", "message": "a node is going"},
    {"kind": "skipped", "sample": 3, "message": "a.jpg: no JPEG"},
]


@pytest.mark.parametrize("quiet", [False, True])
def test_quiet_leaves_warnings(quiet):
    text = io.StringIO()
    with Display(Console(file=text, width=200), 2, 20, 1, quiet) as display:
        for event in EVENTS:
            display.on_event(event)
    lines = text.getvalue().splitlines()
    warnings = ["warning: a node is going", "warning: replaced a.jpg: no JPEG"]
    progress = [
        "resumed at 64 samples from there",
        "epoch 0.50/2  step 10/20  loss 1.2500  lr 0.1  99.0 img/s  data wait 10%  ETA 1m02s",
        "epoch 1.00: top-1 3/4 = 75.00 %, top-5 4/4 = 100.00 %, loss 1.0000 (200 img/s)",
    ]
    assert lines == warnings if quiet else progress + warnings
