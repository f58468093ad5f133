"""The progress display of a run's events."""

import io
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from pipeline.evaluation.counts import EvalResult
from pipeline.train.events import Evaluated, Resumed, Skipped, Step, Warned
from pipeline.train.progress import Display

STEP = Step(
    step=10,
    samples_seen=80,
    epoch=0.5,
    lr=0.1,
    loss=1.25,
    skipped_steps=0,
    img_per_s=99.0,
    img_per_s_worker=99.0,
    step_s=0.1,
    data_wait=0.1,
    eta_s=62,
)
EVALUATED = Evaluated("raw", samples_seen=160, epoch=1, img_per_s=200.0, result=EvalResult(4, 3, 4, 5, 1.0))
EVENTS = [
    Resumed(64, Path("checkpoint")),
    STEP,
    replace(STEP, loss=None, skipped_steps=3),
    EVALUATED,
    replace(EVALUATED, result=EvalResult(4, 0, 0, 5, None, non_finite=4)),
    Warned("a node is going"),
    Skipped(3, "a.jpg: no JPEG"),
]


@pytest.mark.parametrize("quiet", [False, True])
def test_quiet_prints_only_warnings(quiet):
    text = io.StringIO()
    with Display(Console(file=text, width=200), 2, 20, 1, quiet) as display:
        for event in EVENTS:
            display.on_event(event)
    lines = text.getvalue().splitlines()
    warnings = ["warning: a node is going", "warning: replaced a.jpg: no JPEG"]
    progress = [
        "resumed at 64 samples from checkpoint",
        "epoch 0.50/2  step 10/20  loss 1.2500  lr 0.1  99.0 img/s  data wait 10%  ETA 1m02s",
        "epoch 0.50/2  step 10/20  loss -  3 steps skipped  lr 0.1  99.0 img/s  data wait 10%  ETA 1m02s",
        "epoch 1.00: top-1 3/4 = 75.00 %, top-5 4/4 = 100.00 %, loss 1.0000 (200 img/s)",
        "epoch 1.00: top-1 0/4 = 0.00 %, top-5 0/4 = 0.00 %, NaN or infinities for 4 of 4, loss - (200 img/s)",
    ]
    assert lines == warnings if quiet else progress + warnings


def test_warnings_that_differ_only_in_numbers_are_printed_once_and_counted():
    text = io.StringIO()
    with Display(Console(file=text, width=200), 2, 20, 1) as display:
        for step in range(30):
            message = f"NaN loss at step {step} (epoch {step / 7:.2f}), see /o/step-{step:07d}.json"
            display.on_event(Warned(message))
        display.on_event(Warned("another at step 1"))
    lines = text.getvalue().splitlines()
    assert [line.split(" (")[0] for line in lines] == [
        "warning: NaN loss at step 0",
        "warning: another at step 1",
        "warning: 29 more like this, in the workers' logs: NaN loss at step 0",
    ]
