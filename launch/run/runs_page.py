"""Report of runs as one self-contained HTML page."""

import base64
import datetime
import io
import json
from pathlib import Path

import jinja2
from matplotlib.figure import Figure

from pipeline.errors import UserError
from pipeline.evaluation.tables import read_confusion
from pipeline.files import write_text
from pipeline.tracking.plots import confusion_image, curves
from pipeline.tracking.queries import TrackedRunInfo, differences, find_run, metric_history, read_artifact
from pipeline.tracking.stores import redacted

_MAX_POINTS = 1500
_CURVES = {
    "training loss": ("train/loss",),
    "evaluation loss": ("val/loss", "val_ema/loss"),
    "top-1 %": ("val/top1", "val_ema/top1"),
    "learning rate": ("train/lr",),
    "gradient norm": ("train/grad_norm",),
    "images/s": ("train/img_per_s",),
}


def write_page(names: list[str], out: Path, uri: str, experiment: str) -> int:
    """Writes a page with results, curves, differences, checkpoints and sample predictions of runs.

    Returns:
        Its length in characters.

    Raises:
        UserError: A run does not exist, or the page cannot be written.
    """
    runs = [find_run(uri, experiment, name) for name in names]
    if len({run.id for run in runs}) < len(runs):
        raise UserError(f"the same run is named twice: {', '.join(run.id for run in runs)}.")
    text = _page(runs, uri)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_text(out, text)
    except OSError as error:
        raise UserError(f"--out={out} cannot be written: {error.strerror}.") from error
    return len(text)


def _page(runs: list[TrackedRunInfo], uri: str) -> str:
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters["number"] = lambda value: f"{value:.4g}"
    template = environment.from_string(Path(__file__).with_suffix(".html").read_text(encoding="utf-8"))
    names = ", ".join(run.name for run in runs)
    return template.render(
        title=f"Training of {names}",
        store=redacted(uri),
        created=f"{datetime.datetime.now():%Y-%m-%d %H:%M}",
        runs=runs,
        curves=_curves(runs, uri),
        differences=differences(runs),
        restarts={run.id: [run.tags[key] for key in sorted(run.tags) if key.startswith("restart.")] for run in runs},
        checkpoints={run.id: json.loads(read_artifact(uri, run.id, "checkpoints.json") or "[]") for run in runs},
        samples={run.id: json.loads(read_artifact(uri, run.id, "samples.json") or "[]") for run in runs},
        matrices={run.id: _matrix(read_artifact(uri, run.id, "confusion.csv")) for run in runs},
    )


def _curves(runs: list[TrackedRunInfo], uri: str) -> list[tuple[str, str]]:
    """Returns each plot's label and SVG in base64, over samples seen; omits plots without values."""
    keys = {key for metrics in _CURVES.values() for key in metrics}
    histories = {run.id: metric_history(uri, run.id, keys) for run in runs}
    longest = max((p[-1][0] for history in histories.values() for p in history.values()), default=0)
    unit, size = ("millions", 1e6) if longest >= 1e6 else ("thousands", 1e3)
    images = []
    for label, metrics in _CURVES.items():
        lines = {}
        for run in runs:
            for key in metrics:
                points = histories[run.id].get(key, [])
                stride = 1 + len(points) // _MAX_POINTS
                if points:
                    suffix = " (EMA)" if key.startswith("val_ema") else ""
                    lines[f"{run.name}{suffix}"] = [(seen / size, value) for seen, value in points[::stride]]
        if lines:
            images.append((label, _svg(curves(lines, f"samples seen, {unit}", label))))
    return images


def _matrix(text: str | None) -> str:
    return "" if text is None else _svg(confusion_image(*read_confusion(text)))


def _svg(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg")
    return base64.b64encode(buffer.getvalue()).decode()
