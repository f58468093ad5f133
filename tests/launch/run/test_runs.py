"""Complete training runs on an embedded Ray."""

import hashlib
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from mlflow.tracking import MlflowClient
from PIL import Image

from pipeline.config import RunConfig
from pipeline.data.batches import train_plan
from pipeline.data.dataset import open_splits
from pipeline.data.staging import stage

pytestmark = pytest.mark.slow


def test_the_demo_from_training_to_prediction(shell, forked_densenet, tmp_path):
    """Three epochs of the demo: every line of the summary is correct, and README's commands on its model work."""
    done = shell("densenet", "train", "configs/demo.yaml", "train.epochs=3", f"run.output={tmp_path}")
    assert done.returncode == 0, done.stdout
    out = done.stdout

    assert re.search(
        r"epoch 0\.45/3  step 10/68  loss \d\.\d{4}  lr 0\.04454  [\d,.]+ img/s \([\d,.]+ img/s per worker\)  data",
        out,
    )
    assert "ETA" in out
    for noise in (
        "(RayTrainWorker",
        "(TrainController",
        "INFO",
        "WARNING",
        "Traceback",
        "Token authentication",
        "\x1b[",
    ):
        assert noise not in out
    (run_dir,) = tmp_path.glob("demo-*")
    assert {p.name for p in (run_dir / "logs").iterdir()} == {"rank0.log", "rank1.log", "ray.log"}
    assert "Started a local Ray instance" in (run_dir / "logs" / "ray.log").read_text()

    summary = dict(line.split(maxsplit=1) for line in out.split("done")[1].splitlines()[1:])
    top1, top5 = re.findall(r"top-\d (\d+)/360", summary["best"])
    assert 340 <= int(top1) <= int(top5) <= 360
    assert f"top-1 {top1}/360 = {100 * int(top1) / 360:.2f} %" in summary["best"]
    assert re.fullmatch(r"[\d,.]+ img/s in training", summary["speed"])
    for phase in ("prepare", "Ray start", "worker start", "first step", "training", "registration"):
        assert phase in summary["time"]
    checkpoint = Path(summary["checkpoint"])
    assert json.loads((checkpoint / "model.json").read_text())["metrics"]["top1_correct"] == int(top1)

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    client = MlflowClient(uri, uri)
    version = client.get_model_version_by_alias("densenet_tiny", "candidate")
    run = client.get_run(version.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.metrics["val/top1"] > 94
    assert len(client.get_metric_history(version.run_id, "train/loss")) == 7

    artifacts = {file.path for file in client.list_artifacts(version.run_id)}
    images = {"learning_rate.png", "loss.png", "accuracy.png", "confusion.png"}
    tables = {"config.yaml", "deepspeed.json", "packages.txt", "metrics.csv", "confusion.csv", "checkpoints.json"}
    assert images | tables | {"samples.json"} <= artifacts
    assert sorted(read.dataset.name for read in run.inputs.dataset_inputs) == ["digits/train", "digits/val"]
    assert f"- **best**: {summary['best']}" in run.data.tags["mlflow.note.content"]
    assert run.data.tags["checkpoint.best"] == summary["checkpoint"]
    assert run.data.metrics["train/grad_norm"] > 0
    records = json.loads(Path(client.download_artifacts(version.run_id, "checkpoints.json", str(tmp_path))).read_text())
    (best,) = [record for record in records if record["best"]]
    assert best["sha256"] == hashlib.sha256((checkpoint / "manifest.json").read_bytes()).hexdigest()
    assert best["top1"] == pytest.approx(100 * int(top1) / 360)

    data = tmp_path / "data" / "digits"
    evaluated = forked_densenet("eval", "models:/densenet_tiny@candidate", "--data", str(data), "--uri", uri)
    assert evaluated.returncode == 0, evaluated.stdout
    assert f"plain     top-1 {top1}/360 = " in evaluated.stdout, "the count of the training run"

    version_uri = "models:/densenet_tiny@candidate"
    gate = ["densenet_tiny@candidate", "--data", str(data), "--uri", uri]
    promoted = forked_densenet("models", "promote", *gate)
    assert promoted.returncode == 0, promoted.stdout
    assert f"version 1: top-1 {top1}/360 = " in promoted.stdout
    assert "densenet_tiny@champion is version 1 now" in promoted.stdout
    exported = forked_densenet("export", version_uri, "--to", "onnx", "--out", str(tmp_path / "onnx"), "--uri", uri)
    assert exported.returncode == 0, exported.stdout
    page = forked_densenet("report", run_dir.name, "--out", str(tmp_path / "report.html"), "--uri", uri)
    assert page.returncode == 0, page.stdout
    assert run_dir.name in (tmp_path / "report.html").read_text()
    listed = forked_densenet("models", "list", "--uri", uri)
    assert re.search(r"^densenet_tiny +1 +@candidate, @champion +\d+/360 = ", listed.stdout, re.MULTILINE)
    (known,) = json.loads(forked_densenet("models", "list", "--json", "--uri", uri).stdout)["densenet_tiny"]
    shown = json.loads(forked_densenet("models", "show", "densenet_tiny@champion", "--json", "--uri", uri).stdout)
    assert shown == {"name": "densenet_tiny"} | known
    assert (known["version"], known["aliases"]) == ("1", ["candidate", "champion"])
    listed = forked_densenet("runs", "list", "--uri", uri, env={"COLUMNS": "200"})
    assert re.search(rf"^{run_dir.name} +FINISHED .* densenet_tiny ", listed.stdout, re.MULTILINE), listed.stdout

    program, *arguments = shlex.split(out.splitlines()[-1].removeprefix("predict"))
    predicted = shell(program, *arguments)
    assert predicted.returncode == 0, predicted.stdout
    label = Path(arguments[2]).parent.name
    assert re.search(rf"\d\d\.\d\d%  {label}$", predicted.stdout.splitlines()[1]), predicted.stdout
    (prediction,) = json.loads(forked_densenet(*arguments, "--json").stdout)
    assert (prediction["image"], next(iter(prediction["classes"]))) == (arguments[2], label)


def test_densenet121_on_real_imagenet_images(shell, tmp_path, imagenet_samples):
    """The paper's model and recipe at 224 pixels for a few steps, from staged shards of which one is corrupt."""
    for split in ("train", "val"):
        for image in imagenet_samples.iterdir():
            folder = tmp_path / "imagenet" / split / image.name.split("_")[0]
            folder.mkdir(parents=True)
            (folder / image.name).symlink_to(image)
    root, fast = tmp_path / "shards", tmp_path / "fast"
    done = shell("densenet", "data", "prepare", str(tmp_path / "imagenet"), str(root), "--shard-size", "1")
    assert done.returncode == 0, done.stdout
    index, _ = open_splits(str(root), "train", "val", tmp_path)
    plan = train_plan(RunConfig.model_validate({"data": {"shuffle": "windowed", "window": 2}}), index)
    third = int(plan.locate(np.array([2]))[1][0])
    staged = stage(index, str(root), fast)
    with staged.path(third).open("r+b") as file:
        file.seek(index.to_table()["offset"][third].as_py() + 900)
        file.write(b"rot")
    done = shell(
        "densenet",
        "train",
        "configs/densenet121.yaml",
        f"data.root={root}",
        f"data.stage={fast}",
        "data.shuffle=windowed",
        "data.window=2",
        "data.on_corrupt=skip",
        f"run.output={tmp_path / 'out'}",
        "train.epochs=0.4",
        "schedule.milestones=[]",
        "train.global_batch_size=8",
        "train.log_every_steps=1",
    )
    assert done.returncode == 0, done.stdout
    assert "densenet121, 6,994,856 parameters, 40 classes" in done.stdout
    assert re.search(r"epoch 0\.40/0\.4  step 2/2  loss \d+\.\d+  lr 0\.1 ", done.stdout)
    assert re.search(r"top-1 \d+/40 = .* top-5 \d+/40", done.stdout)
    assert "resize 256 bilinear antialias, center crop 224, no EXIF rotation" in done.stdout
    assert f"warning: replaced {staged.describe(third)} does not have the checksum" in done.stdout
    assert "warning: 1 corrupt training images were replaced by others" in done.stdout


def test_an_image_that_fails_to_decode_in_training_is_named(shell, tmp_path):
    """Corruption that only decoding finds: start and end are valid, so the index accepts the file."""
    for split in ("train", "val"):
        for i in range(8):
            file = tmp_path / "set" / split / "ab"[i % 2] / f"{i}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (40, 40), (30 * i, 0, 0)).save(file)
    victim = tmp_path / "set" / "train" / "a" / "4.jpg"
    content = bytearray(victim.read_bytes())
    content[200:-2] = b"\x55" * (len(content) - 202)
    victim.write_bytes(content)
    done = shell(
        "densenet",
        "train",
        "configs/demo.yaml",
        f"data.root={tmp_path / 'set'}",
        f"run.output={tmp_path / 'out'}",
        "train.global_batch_size=4",
    )
    assert done.returncode == 2, done.stdout
    assert f"{victim}: " in done.stdout
    assert "Replace or remove them" in done.stdout
    assert "Traceback" not in done.stdout
