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
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import requests
import timm
import torch
import torchvision.transforms.v2 as transforms
from torchvision.io import decode_image

from benchmarks.common import interleaved, report, save_result, seconds, write_images
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
_ROUND_S = 10  # duration of a round with several clients


def main() -> None:
    """Runs all comparisons."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="densenet121")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--load-s", type=float, default=60, help="seconds of load by eight clients")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    model = write_model(folder / "checkpoint", options.model)
    images = write_images(folder / "images", options.images)
    with model_server(folder, model, options.model) as (server, uri):
        serving_latency(uri, PlainTimm(model, options.model), options.model, images, options.rounds)
        serving_throughput(server, uri, options.model, images, max(3, options.rounds // 2), options.load_s)
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


@contextmanager
def model_server(folder: Path, model: Path, name: str) -> Iterator[tuple[psutil.Process, str]]:
    """Serves a model with `mlflow models serve` on loopback; yields the server's process and its URI."""
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
    try:
        wait_for_server(f"http://127.0.0.1:{port}/ping")
        yield psutil.Process(server.pid), f"http://127.0.0.1:{port}"
    finally:
        os.killpg(server.pid, 9)
        server.wait()


def request_of(images: list[Path]) -> dict[str, Any]:
    rows = [[base64.b64encode(file.read_bytes()).decode()] for file in images]
    return {"dataframe_split": {"columns": ["image"], "data": rows}}


def serving_latency(uri: str, plain: PlainTimm, name: str, images: list[Path], rounds: int) -> None:
    """Compares requests of 1 and 16 images to the server with plain timm in this process."""
    for count in (1, _BATCH):
        request = request_of(images[:count])

        def send(request: dict = request) -> None:
            requests.post(f"{uri}/invocations", json=request, timeout=_TIMEOUT_S).raise_for_status()

        cases = {
            "served": lambda send=send, count=count: seconds(send) / count,  # type: ignore[misc]
            "plain timm": lambda count=count: seconds(lambda: plain(images[:count])) / count,  # type: ignore[misc]
        }
        values = {case: [1000 * s for s in case_s] for case, case_s in interleaved(cases, rounds).items()}
        report(f"latency per image, {count} per request, {name}", values, "ms", "served")


def serving_throughput(
    server: psutil.Process, uri: str, name: str, images: list[Path], rounds: int, load_s: float
) -> None:
    """Compares eight clients at once with one, each with one image per request; then checks memory under load."""
    requests_of_one = [request_of([image]) for image in images]

    def throughput(clients: int, duration_s: float) -> float:
        """Returns the images per second of this many clients."""
        counts, end = [0] * clients, time.monotonic() + duration_s

        def run(client: int) -> None:
            with requests.Session() as session:
                while time.monotonic() < end:
                    request = requests_of_one[(client + counts[client] * clients) % len(requests_of_one)]
                    session.post(f"{uri}/invocations", json=request, timeout=_TIMEOUT_S).raise_for_status()
                    counts[client] += 1

        with ThreadPoolExecutor(clients) as pool:
            elapsed = seconds(lambda: list(pool.map(run, range(clients))))
        return sum(counts) / elapsed

    cases = {f"{n} clients": lambda n=n: throughput(n, _ROUND_S) for n in (8, 1)}  # type: ignore[misc]
    report(f"served, one image per request, {name}", interleaved(cases, rounds), "img/s", "8 clients")
    benchmark = f"served for {load_s:g} s, 8 clients, {name}"
    before = memory(server)
    save_result(benchmark, "throughput", throughput(8, load_s), "img/s")
    for case, value in (("memory before", before), ("memory after", memory(server))):
        print(f"{benchmark}, {case}: {value:.0f} MB")
        save_result(benchmark, case, value, "MB")


def memory(server: psutil.Process) -> float:
    """Returns the resident memory of the server and its child processes in MB."""
    return sum(process.memory_info().rss for process in (server, *server.children(recursive=True))) / 1e6


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
