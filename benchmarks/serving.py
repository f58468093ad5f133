"""Inference speed compared with plain PyTorch: a served model's latency, batch prediction by DALI, ONNX and int8.

python -m benchmarks.serving [--model densenet121] [--rounds 7] [--images 256]
"""

import argparse
import base64
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import requests
import timm
import torch
import torchvision.transforms.v2 as transforms
from torchvision.io import decode_image

from benchmarks.common import interleaved, report, seconds, write_images
from benchmarks.tracking import write_model
from launch.cluster.ports import free_port
from pipeline.config import RunConfig
from pipeline.export.formats import OnnxModel, to_int8, to_onnx
from pipeline.export.open import open_model
from pipeline.export.package import register
from pipeline.model.card import ModelCard
from pipeline.model.weights import load_model
from pipeline.tracking.run import Tracker

_TIMEOUT_S = 120
_BATCH = 16


def main() -> None:
    """Runs all comparisons."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="densenet121")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--images", type=int, default=256)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    model = write_model(folder / "checkpoint", options.model)
    images = write_images(folder / "images", options.images)
    serving_latency(folder, model, options.model, images, options.rounds)
    batch_prediction(model, options.model, images, max(3, options.rounds // 2))
    export_formats(folder, model, options.model, options.rounds)


class PlainTimm:
    """A short script's inference: torchvision's transforms and a timm model."""

    def __init__(self, model: Path, name: str) -> None:
        self.model = timm.create_model(name, num_classes=1000).eval()
        self.model.load_state_dict(load_model(model).state_dict())
        self.transform = transforms.Compose(
            [
                transforms.Resize(256),
                transforms.CenterCrop(224),
                transforms.ToDtype(torch.float32, scale=True),
                transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
            ]
        )

    def __call__(self, files: list[Path]) -> torch.Tensor:
        with torch.inference_mode():
            images = [self.transform(decode_image(str(file), mode="RGB")) for file in files]
            return self.model(torch.stack(images)).softmax(dim=1)


def serving_latency(folder: Path, model: Path, name: str, images: list[Path], rounds: int) -> None:
    """Compares requests of 1 and 16 images to `mlflow models serve` on loopback with plain timm in this process."""
    tree = {"run": {"output": str(folder)}, "tracking": {"uri": f"sqlite:///{folder}/mlflow.db"}}
    with Tracker(RunConfig.model_validate(tree), folder / "run", "benchmark", print) as tracker:
        names = {"name": name, "alias": "candidate", "data_fingerprint": "f00d"}
        registered = register(model, stores=tracker.stores, run_id=str(tracker.run_id), **names)
    port, bin_dir = free_port(), Path(sys.executable).parent
    command = [bin_dir / "mlflow", "models", "serve", "-m", registered.uri, "--env-manager", "local"]
    server = subprocess.Popen(
        [*command, "--host", "127.0.0.1", "--port", str(port), "--workers", "1"],
        env=os.environ | {"MLFLOW_TRACKING_URI": tracker.uri, "PATH": f"{bin_dir}{os.pathsep}{os.environ['PATH']}"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    uri, plain = f"http://127.0.0.1:{port}", PlainTimm(model, name)
    try:
        wait_for_server(f"{uri}/ping")
        for count in (1, _BATCH):
            rows = [[base64.b64encode(file.read_bytes()).decode()] for file in images[:count]]
            request = {"dataframe_split": {"columns": ["image"], "data": rows}}

            def send(request: dict = request) -> None:
                requests.post(f"{uri}/invocations", json=request, timeout=_TIMEOUT_S).raise_for_status()

            cases = {
                "served": lambda send=send, count=count: seconds(send) / count,  # type: ignore[misc]
                "plain timm": lambda count=count: seconds(lambda: plain(images[:count])) / count,  # type: ignore[misc]
            }
            values = {case: [1000 * s for s in case_s] for case, case_s in interleaved(cases, rounds).items()}
            report(f"latency per image, {count} per request, {name}", values, "ms", "served")
    finally:
        os.killpg(server.pid, 9)
        server.wait()


def wait_for_server(uri: str) -> None:
    """Waits until a server is reachable and healthy."""
    deadline = time.monotonic() + _TIMEOUT_S
    while True:
        try:
            if requests.get(uri, timeout=5).ok:
                return
        except requests.ConnectionError:
            if time.monotonic() > deadline:
                raise
        time.sleep(0.2)


def batch_prediction(model: Path, name: str, images: list[Path], rounds: int) -> None:
    """Compares prediction of a folder of images into a table with plain timm, which decodes images sequentially."""
    plain, out = PlainTimm(model, name), model / "predictions.parquet"

    def ours() -> float:
        return open_model(model).predict_folder(images[0].parent, out, batch_size=_BATCH).img_per_s

    def plain_timm() -> float:
        started = time.perf_counter()
        for start in range(0, len(images), _BATCH):
            plain(images[start : start + _BATCH])
        return len(images) / (time.perf_counter() - started)

    values = interleaved({"predict --batch": ours, "plain timm": plain_timm}, rounds)
    report(f"folder of {len(images)} images, {name}", values, "img/s", "predict --batch")


def export_formats(folder: Path, model: Path, name: str, rounds: int) -> None:
    """Compares the forward pass of ONNX and int8 in onnxruntime with torch."""
    rng = np.random.default_rng(0)
    images_NCHW = torch.from_numpy(rng.standard_normal((_BATCH, 3, 224, 224), np.float32))
    torch_model = load_model(model)
    onnx_file = to_onnx(torch_model, ModelCard.read(model), folder)
    exported = OnnxModel(onnx_file)
    quantized = OnnxModel(to_int8(onnx_file, folder, lambda: iter([images_NCHW.numpy()])))

    def throughput(forward: torch.nn.Module) -> float:
        with torch.inference_mode():
            return _BATCH / seconds(lambda: forward(images_NCHW))

    cases = {
        "torch": lambda: throughput(torch_model),
        "ONNX": lambda: throughput(exported),
        "int8": lambda: throughput(quantized),
    }
    values = interleaved(cases, rounds)
    for ours in ("ONNX", "int8"):
        pair = {ours: values[ours], "torch": values["torch"]}
        report(f"forward pass, batch {_BATCH}, {name}, {ours}", pair, "img/s", ours)


if __name__ == "__main__":
    main()
