"""`densenet export`: a model as ONNX, torch.export, a timm folder, or quantised to int8."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from launch.run.progress import speed
from launch.run.start import model_folder
from pipeline.data.dali import Loader
from pipeline.data.dataset import open_split
from pipeline.data.index import DatasetIndex
from pipeline.data.plan import EvalPlan, eval_share
from pipeline.errors import UserError
from pipeline.evaluation.labels import labels_of
from pipeline.evaluation.probabilities import Transform, probabilities
from pipeline.evaluation.scores import best_class
from pipeline.export.formats import OPSET, TOLERANCE, OnnxModel, to_int8, to_onnx, to_timm, to_torch
from pipeline.model.sources import read_card
from pipeline.tracking.registry import attach_to_version, check_attachable
from pipeline.tracking.stores import Stores

FORMATS = ("onnx", "torch", "timm", "int8")
_BATCH = 32


def export_command(
    console: Console,
    model: str,
    to: str,
    out: Path,
    data: Path | None,
    split: str,
    calibrate: str,
    images: int,
    attach: bool,
    stores: Stores,
) -> None:
    """Writes the model to the folder `out`; int8 is calibrated and measured on `data`.

    Raises:
        UserError: bad input.
        TrainingError: the exported model does not give torch's logits.
    """
    if to not in FORMATS:
        raise UserError(f"--to={to} is not known: use {', '.join(FORMATS)}.")
    if to == "int8" and data is None:
        raise UserError("--to int8 needs --data, a data set to calibrate and measure with.")
    if attach and not model.startswith("models:/"):
        raise UserError(f"--attach adds files to a model version: give models:/NAME@ALIAS, not {model}.")
    if attach:
        check_attachable(model, stores)
    folder = model_folder(model, stores)
    try:
        out.mkdir(parents=True, exist_ok=True)
        if to == "int8":
            file = _int8(console, folder, out, Path(str(data)), split, calibrate, images)
        else:
            file = {"onnx": to_onnx, "torch": to_torch, "timm": to_timm}[to](folder, out)
            about = f", opset {OPSET}" if to == "onnx" else ""
            console.print(f"{file}{about}: logits equal torch's to {TOLERANCE:g}", soft_wrap=True)
    except OSError as error:
        raise UserError(f"--out={out} cannot be written: {error.strerror or error}.") from error
    if attach:
        place = attach_to_version(model, to, file, stores)
        console.print(f"attached to {model} as {place}", soft_wrap=True)


def _int8(console: Console, folder: Path, out: Path, data: Path, split: str, calibrate: str, images: int) -> Path:
    card, cache = read_card(folder), Path("outputs").absolute() / "index"
    calibration, index = (open_split(data, name, cache, card["max_pixels"]) for name in (calibrate, split))
    labels_N = labels_of(index, card["classes"])
    plain = to_onnx(folder, out)
    file = to_int8(plain, out, _calibration(calibration, card, images))
    found: dict[str, tuple[int, float]] = {}
    for name, of in (("fp32", plain), ("int8", file)):
        started = time.perf_counter()
        given_NK, _ = probabilities(
            OnnxModel(of),
            index,
            Transform(**card["transform"]),
            views=None,
            device="cpu",
            channels=card["architecture"].get("in_chans", 3),
            threads=1,
            batch_size=_BATCH,
        )
        hits = int((best_class(given_NK) == labels_N).sum())
        found[name] = hits, len(index) / (time.perf_counter() - started)
        share = f"{hits}/{len(index)} = {100 * hits / len(index):.2f} %"
        console.print(f"{name}: top-1 {share}, {speed(found[name][1])}, {of.stat().st_size / 1e6:.1f} MB")
    lost = 100 * (found["fp32"][0] - found["int8"][0]) / len(index)
    ratio = found["int8"][1] / found["fp32"][1]
    console.print(f"{file}: {lost:.2f} points of top-1 lost, {ratio:.2f} times the speed", soft_wrap=True)
    return file


def _calibration(index: DatasetIndex, card: dict, images: int) -> Callable[[], Iterator[NDArray[np.float32]]]:
    """Batches of evenly spread images after the card's evaluation transform."""
    rows_N = np.unique(np.linspace(0, len(index) - 1, min(images, len(index))).astype(np.int64))
    subset = index.subset(rows_N)
    transform = Transform(**card["transform"])

    def batches() -> Iterator[NDArray[np.float32]]:
        with Loader(
            subset,
            device="cpu",
            device_id=None,
            threads=1,
            max_batch_size=_BATCH,
            interpolation=transform.interpolation,
            mean=transform.mean,
            std=transform.std,
            channels=1 if card["architecture"].get("in_chans", 3) == 1 else 3,
        ) as loader:
            plan = EvalPlan(subset.widths_N, subset.heights_N, transform.resize, transform.crop)
            for batch in loader.run(plan.batch(ids_B) for ids_B in eval_share(len(subset), 0, 1, _BATCH)):
                yield batch.images_NCHW.numpy()

    return batches
