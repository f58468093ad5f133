"""What a user sees of a run's events."""

import io

import pytest
from rich.console import Console

from launch.run.progress import Display

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
SKIPPED = STEP | {"loss": None, "skipped_steps": 3}
NAN = EVALUATION | {"loss": None, "top1_correct": 0, "top5_correct": 0, "top5_k": 5, "total": 4, "non_finite": 4}
EVENTS = [
    {"kind": "resumed", "samples_seen": 64, "checkpoint": "there"},
    STEP,
    SKIPPED,
    EVALUATION | COUNTS,
    NAN,
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
        "epoch 0.50/2  step 10/20  loss -  3 steps skipped  lr 0.1  99.0 img/s  data wait 10%  ETA 1m02s",
        "epoch 1.00: top-1 3/4 = 75.00 %, top-5 4/4 = 100.00 %, loss 1.0000 (200 img/s)",
        "epoch 1.00: top-1 0/4 = 0.00 %, top-5 0/4 = 0.00 %, NaN or infinities for 4 of 4, loss - (200 img/s)",
    ]
    assert lines == warnings if quiet else progress + warnings


def test_warnings_that_differ_in_numbers_alone_are_shown_once_and_counted():
    text = io.StringIO()
    with Display(Console(file=text, width=200), 2, 20, 1) as display:
        for step in range(30):
            message = f"no number at step {step} (epoch {step / 7:.2f}), see /o/step-{step:07d}.json"
            display.on_event({"kind": "warning", "message": message})
        display.on_event({"kind": "warning", "message": "another at step 1"})
    lines = text.getvalue().splitlines()
    assert [line.split(" (")[0] for line in lines] == [
        "warning: no number at step 0",
        "warning: another at step 1",
        "warning: 29 more like this, in the workers' logs: no number at step 0",
    ]
