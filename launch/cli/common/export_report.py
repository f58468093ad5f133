"""Report of `densenet export`: a model as ONNX, torch.export, a timm folder, or quantized to int8."""

from pathlib import Path

from rich.console import Console

from pipeline.errors import UserError
from pipeline.export.open import FORMATS, Exported, open_model
from pipeline.formatting import speed
from pipeline.tracking.registry import attach_to_version, check_attachable
from pipeline.tracking.stores import Stores


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
        UserError: Bad input.
        TrainingError: The exported model's logits differ from torch's.
    """
    if to not in FORMATS:  # before anything is downloaded
        raise UserError(f"--to={to} is not known: use {', '.join(FORMATS)}.")
    if to == "int8" and data is None:
        raise UserError("--to int8 needs --data, a data set to calibrate and measure with.")
    if attach and not model.startswith("models:/"):
        raise UserError(f"--attach adds files to a model version: give models:/NAME@ALIAS, not {model}.")
    if attach:
        check_attachable(model, stores)
    done = open_model(model, stores=stores).export(to, out, data=data, split=split, calibrate=calibrate, images=images)
    _print(console, done)
    if attach:
        location = attach_to_version(model, to, Path(done.file), stores)
        console.print(f"attached to {model} as {location}", soft_wrap=True)


def _print(console: Console, done: Exported) -> None:
    if done.fp32 is None or done.int8 is None:
        about = "" if done.opset is None else f", opset {done.opset}"
        console.print(f"{done.file}{about}: logits equal torch's to {done.tolerance:g}", soft_wrap=True)
        return
    for name, scores in (("fp32", done.fp32), ("int8", done.int8)):
        top1 = f"{scores.top1_correct}/{scores.total} = {scores.top1:.2f} %"
        console.print(f"{name}: top-1 {top1}, {speed(scores.img_per_s)}, {scores.bytes / 1e6:.1f} MB")
    lost, ratio = done.fp32.top1 - done.int8.top1, done.int8.img_per_s / done.fp32.img_per_s
    console.print(f"{done.file}: {lost:.2f} points of top-1 lost, {ratio:.2f} times the speed", soft_wrap=True)
