"""`densenet report`: a self-contained page that a browser shows with all its images."""

import base64
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.evaluation.tables import write_confusion
from tests.browser import rendered
from tests.models import start_run


@pytest.fixture
def uri(tmp_path: Path) -> str:
    """Two runs: a complete one with all artifacts, and one that failed early, with HTML in a parameter."""
    buffer = io.BytesIO()
    Image.new("RGB", (20, 20), (200, 30, 60)).save(buffer, "JPEG")
    image = base64.b64encode(buffer.getvalue()).decode()
    samples = [
        {"image": image, "label": label, "predicted": [["cat", 0.9], ["dog", 0.1]]} for label in ("cat", "dog", "dog")
    ]
    record = {"address": "/runs/one/samples-64", "samples_seen": 64, "sha256": "f00d" * 16, "best": True, "top1": 95.5}
    (tmp_path / "samples.json").write_text(json.dumps(samples))
    (tmp_path / "checkpoints.json").write_text(json.dumps([record]))
    write_confusion(tmp_path / "confusion.csv", ["cat", "dog"], np.array([[1, 0], [2, 0]]))
    with start_run(tmp_path, "one") as tracker:
        tracker.log_params({"optim": {"lr": 0.1}, "model.name": "densenet121"})
        for seen in (16, 32, 64):
            tracker.log_metrics({"train/loss": 1 / seen, "val/top1": 90.0 + seen / 16, "train/lr": 0.1}, seen)
        tracker.set_tags({"restart.1": "worker 0: gone"})
        for name in ("samples.json", "checkpoints.json", "confusion.csv"):
            tracker.log_artifact(tmp_path / name)
    with pytest.raises(RuntimeError), start_run(tmp_path, "two") as tracker:
        tracker.log_params({"optim": {"lr": 0.2, "name": "<b>sgd</b>"}, "model.name": "densenet121"})
        tracker.log_metrics({"train/loss": 0.5}, 16)
        raise RuntimeError
    return tracker.uri


def test_a_browser_shows_the_whole_page(densenet, uri, tmp_path):
    code, printed = densenet("report", "one", "two", "--out", "out/report.html", "--uri", uri)
    assert code == 0, printed
    page = tmp_path / "out" / "report.html"
    assert not re.findall(r"""(?:src|href)=["'](?!data:)""", page.read_text()), "it must not need other files"
    script = """
        const count = selector => document.querySelectorAll(selector).length;
        const loaded = [...document.images].filter(image => image.complete && image.naturalWidth > 0);
        document.title = [loaded.length, count("img"), count("#runs tr"), count("figure.wrong"),
          count("#differences b")].join(" ");
    """
    document = rendered(page, tmp_path, script)
    images = 3 + 3 + 1  # curves of loss, top-1 and learning rate; samples; the confusion matrix
    assert f"<title>{images} {images} 3 2 0</title>" in document
    differences = document.split('id="differences"')[1].split("</table>")[0]
    assert "optim.lr" in differences and "model.name" not in differences
    assert "Restart: worker 0: gone" in document
    assert "f00df00df00df00d" in document


def test_bad_input_is_refused(densenet, uri):
    for arguments, message in (
        (("three",), "there is no run 'three'"),
        (("one", "one"), "the same run is named twice"),
        (("one", "--out", "/proc/x.html"), "--out=/proc/x.html cannot be written"),
    ):
        code, printed = densenet("report", *arguments, "--uri", uri)
        assert code == 2, printed
        assert message in printed
