"""Predictions: a served model's latency and throughput, a folder by DALI, ONNX and int8, each beside plain PyTorch.

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

from benchmarks.common import in_turns, report, seconds, write_images
from benchmarks.tracking import write_model
from launch.cluster.ports import free_port
from pipeline.config import RunConfig
from pipeline.export.formats import OnnxModel, to_int8, to_onnx
from pipeline.export.open import open_model
from pipeline.export.package import register
from pipeline.model.card import ModelCard
from pipeline.model.weights import load_model
from pipeline.tracking.run import Tracker

_WAIT_S = 120
_BATCH = 16


def main() -> None:
    """Runs the comparisons one after the other."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="densenet121")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--images", type=int, default=256)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    model = write_model(folder / "checkpoint", options.model)
    images = write_images(folder / "images", options.images)
    served(folder, model, options.model, images, options.rounds)
    folders(model, options.model, images, max(3, options.rounds // 2))
    forms(folder, model, options.model, options.rounds)


class Plain:
    """A timm model after torchvision's transforms: what a short script does."""

    def __init__(self, model: Path, name: str) -> None:
        self.network = timm.create_model(name, num_classes=1000).eval()
        self.network.load_state_dict(load_model(model).state_dict())
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
            return self.network(torch.stack(images)).softmax(dim=1)


def served(folder: Path, model: Path, name: str, images: list[Path], rounds: int) -> None:
    """One image, and sixteen in a request, by `mlflow models serve` on loopback beside plain timm in this process."""
    tree = {"run": {"output": str(folder)}, "tracking": {"uri": f"sqlite:///{folder}/mlflow.db"}}
    with Tracker(RunConfig.model_validate(tree), folder / "run", "benchmark", print) as tracker:
        names = {"name": name, "alias": "candidate", "data_fingerprint": "f00d"}
        registered = register(model, stores=tracker.stores, run_id=str(tracker.run_id), **names)
    port, program = free_port(), Path(sys.executable).parent
    command = [program / "mlflow", "models", "serve", "-m", registered.uri, "--env-manager", "local"]
    server = subprocess.Popen(
        [*command, "--host", "127.0.0.1", "--port", str(port), "--workers", "1"],
        env=os.environ | {"MLFLOW_TRACKING_URI": tracker.uri, "PATH": f"{program}{os.pathsep}{os.environ['PATH']}"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    address, plain = f"http://127.0.0.1:{port}", Plain(model, name)
    try:
        wait(f"{address}/ping")
        for count in (1, _BATCH):
            rows = [[base64.b64encode(file.read_bytes()).decode()] for file in images[:count]]
            asked = {"dataframe_split": {"columns": ["image"], "data": rows}}

            def ask(asked: dict = asked) -> None:
                requests.post(f"{address}/invocations", json=asked, timeout=_WAIT_S).raise_for_status()

            cases = {
                "served": lambda ask=ask, count=count: seconds(ask) / count,  # type: ignore[misc]
                "plain timm": lambda count=count: seconds(lambda: plain(images[:count])) / count,  # type: ignore[misc]
            }
            values = {case: [1000 * value for value in of] for case, of in in_turns(cases, rounds).items()}
            report(f"an image, {count} in a request, {name}", values, "ms", "served")
    finally:
        os.killpg(server.pid, 9)
        server.wait()


def wait(address: str) -> None:
    """Waits until a server answers."""
    deadline = time.monotonic() + _WAIT_S
    while True:
        try:
            if requests.get(address, timeout=5).ok:
                return
        except requests.ConnectionError:
            if time.monotonic() > deadline:
                raise
        time.sleep(0.2)


def folders(model: Path, name: str, images: list[Path], rounds: int) -> None:
    """All images of a folder into a table, beside plain timm with images decoded one after the other."""
    plain, out = Plain(model, name), model / "answers.parquet"

    def ours() -> float:
        return open_model(model).predict_folder(images[0].parent, out, batch_size=_BATCH).img_per_s

    def theirs() -> float:
        started = time.perf_counter()
        for start in range(0, len(images), _BATCH):
            plain(images[start : start + _BATCH])
        return len(images) / (time.perf_counter() - started)

    values = in_turns({"predict --batch": ours, "plain timm": theirs}, rounds)
    report(f"a folder of {len(images)} images, {name}", values, "img/s", "predict --batch")


def forms(folder: Path, model: Path, name: str, rounds: int) -> None:
    """The forward pass alone: ONNX and int8 by onnxruntime beside torch."""
    rng = np.random.default_rng(0)
    images_NCHW = torch.from_numpy(rng.standard_normal((_BATCH, 3, 224, 224), np.float32))
    network = load_model(model)
    onnx_file = to_onnx(network, ModelCard.read(model), folder)
    exported = OnnxModel(onnx_file)
    quantized = OnnxModel(to_int8(onnx_file, folder, lambda: iter([images_NCHW.numpy()])))

    def speed(forward: torch.nn.Module) -> float:
        with torch.inference_mode():
            return _BATCH / seconds(lambda: forward(images_NCHW))

    cases = {"torch": lambda: speed(network), "ONNX": lambda: speed(exported), "int8": lambda: speed(quantized)}
    values = in_turns(cases, rounds)
    for ours in ("ONNX", "int8"):
        pair = {ours: values[ours], "torch": values["torch"]}
        report(f"forward pass, batch {_BATCH}, {name}, {ours}", pair, "img/s", ours)


if __name__ == "__main__":
    main()
