"""Exports a model to ONNX, torch.export, a timm folder, or an int8-quantized ONNX file for the CPU.

ONNX, torch.export and timm exports are loaded again, and their logits compared with torch's.
"""

import io
import json
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import timm
import torch
from numpy.typing import NDArray
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from safetensors.torch import save_file
from torch import nn

from pipeline.errors import TrainingError, UserError
from pipeline.files import atomic_file, write_text
from pipeline.model.card import ModelCard

OPSET = 20
TOLERANCE = 1e-4  # maximum absolute difference between the logits of an exported model and torch's
_INPUT, _OUTPUT = "images", "logits"
_CPU = ["CPUExecutionProvider"]
_CHECKED_BATCH_SIZES = (1, 3)
_DENSENET = "densenet121"  # timm's builder of this name, with other arguments, builds any model of this project


class OnnxModel(nn.Module):
    """Runs an ONNX file as a torch module: images [N, C, H, W] to logits [N, K], by onnxruntime on the CPU."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self._session = onnxruntime.InferenceSession(str(file), providers=_CPU)

    def forward(self, images_NCHW: torch.Tensor) -> torch.Tensor:
        """Returns logits [N, K], float32, of normalized images [N, C, H, W], float32."""
        return torch.from_numpy(self._session.run([_OUTPUT], {_INPUT: images_NCHW.numpy()})[0])


def to_onnx(model: nn.Module, card: ModelCard, out: Path) -> Path:
    """Writes `out/model.onnx`: opset 20, dynamic batch size, name, classes and transform as metadata.

    The model maps `images`, fp32 [N, C, crop, crop] after the card's transform, to `logits`, fp32 [N, K].

    Raises:
        TrainingError: The logits differ from torch's.
    """
    file = out / "model.onnx"
    example_NCHW = _example(card, 2)
    with _quiet():
        program = torch.onnx.export(
            model,
            (example_NCHW,),
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            input_names=[_INPUT],
            output_names=[_OUTPUT],
            opset_version=OPSET,
            verbose=False,
        )
    assert program is not None
    proto = program.model_proto
    metadata = {"name": card.name, "classes": card.classes, "transform": asdict(card.transform)}
    onnx.helper.set_model_props(proto, {key: json.dumps(value) for key, value in metadata.items()})
    out.mkdir(parents=True, exist_ok=True)
    with atomic_file(file) as temporary:
        onnx.save(proto, temporary)
        _check_logits(card, model, OnnxModel(temporary), "ONNX")
    return file


def to_torch(model: nn.Module, card: ModelCard, out: Path) -> Path:
    """Writes `out/model.pt2` for `torch.export.load`: dynamic batch size, inputs and outputs as in `to_onnx`.

    Raises:
        TrainingError: The logits differ from torch's.
    """
    file = out / "model.pt2"
    program = torch.export.export(model, (_example(card, 2),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    out.mkdir(parents=True, exist_ok=True)
    with atomic_file(file) as temporary:
        torch.export.save(program, temporary)
        _check_logits(card, model, torch.export.load(temporary).module(), "torch.export")
    return file


def to_timm(model: nn.Module, card: ModelCard, out: Path) -> Path:
    """Writes `out/timm` with `model.safetensors` and `config.json`, for `timm.create_model("local-dir:...")`.

    The folder has the layout of timm models on the Hugging Face Hub; `config.json` has label names and transform.

    Raises:
        UserError: Plain timm does not have the model.
        TrainingError: The logits differ from torch's.
    """
    folder = out / "timm"
    transform = card.transform
    if card.small_stem:
        raise UserError(f"timm has no model with the CIFAR stem of {card.name}: export it as onnx or torch.")
    arguments: dict[str, Any] = dict(card.architecture)
    name = arguments.pop("timm", _DENSENET)
    if "module" in arguments:
        raise UserError(
            f"plain timm does not have the model {name}, which {arguments['module']} registers: export it as onnx or "
            f"torch."
        )
    folder.mkdir(parents=True, exist_ok=True)
    names: Any = model.pretrained_cfg
    config = {
        "architecture": name,
        "num_classes": card.num_classes,
        "num_features": model.num_features,
        "label_names": card.classes,
        "model_args": arguments,
        "pretrained_cfg": {
            "tag": card.config_hash,
            "num_classes": card.num_classes,
            "input_size": [card.in_chans, transform.crop, transform.crop],
            "crop_pct": _crop_pct(transform.crop, transform.resize),
            "crop_mode": "center",
            "interpolation": transform.interpolation,
            "mean": transform.mean,
            "std": transform.std,
            "first_conv": names["first_conv"],
            "classifier": names["classifier"],
        },
    }
    with atomic_file(folder / "model.safetensors") as temporary:
        save_file(model.state_dict(), temporary)
    write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")
    _check_logits(card, model, timm.create_model(f"local-dir:{folder}", pretrained=True).eval(), "timm")
    return folder


def _crop_pct(crop: int, resize: int) -> float:
    """Returns timm's `crop_pct`, the ratio crop / resize, such that floor(crop / crop_pct) is exactly `resize`."""
    crop_pct = crop / resize
    while math.floor(crop / crop_pct) < resize:  # floating-point rounding, as in 224 / (224 / 400)
        crop_pct = math.nextafter(crop_pct, 0)
    return crop_pct


def to_int8(onnx_file: Path, out: Path, batches: Callable[[], Iterator[NDArray[np.float32]]]) -> Path:
    """Writes `out/model.int8.onnx`: an ONNX file with convolutions and classifier statically quantized for the CPU.

    Weights are int8 per channel, activations uint8 with min-max calibration over the images [N, C, H, W] of `batches`.
    """
    file = out / "model.int8.onnx"
    prepared = out / "prepared-model.onnx"

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self._batches = batches()

        def get_next(self) -> dict[str, NDArray[np.float32]] | None:
            images_NCHW = next(self._batches, None)
            return None if images_NCHW is None else {_INPUT: images_NCHW}

    try:
        with _quiet(), atomic_file(file) as temporary:
            quant_pre_process(str(onnx_file), str(prepared))
            quantize_static(
                str(prepared),
                str(temporary),
                Reader(),
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=["Conv", "Gemm", "MatMul"],
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
            )
    finally:
        prepared.unlink(missing_ok=True)
    return file


def _check_logits(card: ModelCard, model: nn.Module, exported: nn.Module, kind: str) -> None:
    """Raises `TrainingError` if the logits of an exported model differ from torch's by more than `TOLERANCE`."""
    for count in _CHECKED_BATCH_SIZES:
        images_NCHW = _example(card, count)
        with torch.no_grad():
            expected_NK, exported_NK = model(images_NCHW), exported(images_NCHW)
        largest = (expected_NK - exported_NK).abs().max().item()
        if not largest <= TOLERANCE:  # also true for NaN
            raise TrainingError(
                f"the logits of the {kind} export of {card.name} differ from torch's by {largest:.2g}, at most "
                f"{TOLERANCE:g} is allowed; nothing is written."
            )


def _example(card: ModelCard, count: int) -> torch.Tensor:
    """Returns deterministic noise images [count, C, crop, crop]."""
    crop = card.transform.crop
    return torch.randn((count, card.in_chans, crop, crop), generator=torch.Generator().manual_seed(count))


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppresses warnings and output of the exporters."""
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
