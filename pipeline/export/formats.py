"""A model in the forms that other programs take: ONNX, torch.export, timm's folder, int8 for the CPU.

Each file is loaded again and compared before it gets its name.
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
TOLERANCE = 1e-4  # between the logits of an exported model and torch's
_INPUT, _OUTPUT = "images", "logits"
_CPU = ["CPUExecutionProvider"]
_CHECKED = (1, 3)  # batch sizes
_DENSENET = "densenet121"  # its arguments make any of this project's models


class OnnxModel(nn.Module):
    """An ONNX file as a module: images [N, C, H, W] to logits [N, K], on the CPU by onnxruntime."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self._session = onnxruntime.InferenceSession(str(file), providers=_CPU)

    def forward(self, images_NCHW: torch.Tensor) -> torch.Tensor:
        """Logits (N, classes) float32 of normalized images (N, 3, H, W) float32."""
        return torch.from_numpy(self._session.run([_OUTPUT], {_INPUT: images_NCHW.numpy()})[0])


def to_onnx(model: nn.Module, card: ModelCard, out: Path) -> Path:
    """Writes `out/model.onnx` of a model: opset 20, any batch size, the card as metadata.

    It maps `images`, fp32 [N, C, crop, crop] after the card's transform, to `logits`, fp32 [N, K].

    Raises:
        TrainingError: its logits are not those of torch.
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
    known = {"name": card.name, "classes": card.classes, "transform": asdict(card.transform)}
    onnx.helper.set_model_props(proto, {key: json.dumps(value) for key, value in known.items()})
    out.mkdir(parents=True, exist_ok=True)
    with atomic_file(file) as aside:
        onnx.save(proto, aside)
        _compare(card, model, OnnxModel(aside), "ONNX")
    return file


def to_torch(model: nn.Module, card: ModelCard, out: Path) -> Path:
    """Writes `out/model.pt2`, for `torch.export.load`: any batch size, inputs and outputs as `to_onnx`.

    Raises:
        TrainingError: its logits are not those of torch.
    """
    file = out / "model.pt2"
    program = torch.export.export(model, (_example(card, 2),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    out.mkdir(parents=True, exist_ok=True)
    with atomic_file(file) as aside:
        torch.export.save(program, aside)
        _compare(card, model, torch.export.load(aside).module(), "torch.export")
    return file


def to_timm(model: nn.Module, card: ModelCard, out: Path) -> Path:
    """Writes `out/timm` with `model.safetensors` and `config.json`, for `timm.create_model("local-dir:...")`.

    It is also what timm's models on a hub look like; the label names and the transform are in the configuration.

    Raises:
        UserError: plain timm has no such model.
        TrainingError: its logits are not those of torch.
    """
    place = out / "timm"
    transform = card.transform
    if card.small_stem:
        raise UserError(f"timm has no model with the stem of {card.name}: export it as onnx or torch.")
    arguments: dict[str, Any] = dict(card.architecture)
    name = arguments.pop("timm", _DENSENET)
    if "module" in arguments:
        raise UserError(f"timm itself has no model {name}, {arguments['module']} has: export it as onnx or torch.")
    place.mkdir(parents=True, exist_ok=True)
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
    with atomic_file(place / "model.safetensors") as aside:
        save_file(model.state_dict(), aside)
    write_text(place / "config.json", json.dumps(config, indent=2) + "\n")
    _compare(card, model, timm.create_model(f"local-dir:{place}", pretrained=True).eval(), "timm")
    return place


def _crop_pct(crop: int, resize: int) -> float:
    """The share of the resized side that the crop takes, from which timm computes `resize`: floor(crop / share)."""
    share = crop / resize
    while math.floor(crop / share) < resize:  # rounded, as 224 / (224 / 400) is
        share = math.nextafter(share, 0)
    return share


def to_int8(onnx_file: Path, out: Path, batches: Callable[[], Iterator[NDArray[np.float32]]]) -> Path:
    """Writes `out/model.int8.onnx`: convolutions and the classifier of an ONNX file quantized for the CPU.

    Signed weights by channel, unsigned activations, ranges from the minima and maxima over the images [N, C, H, W] of
    `batches`.
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
        with _quiet(), atomic_file(file) as aside:
            quant_pre_process(str(onnx_file), str(prepared))
            quantize_static(
                str(prepared),
                str(aside),
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


def _compare(card: ModelCard, model: nn.Module, exported: nn.Module, kind: str) -> None:
    for count in _CHECKED:
        images_NCHW = _example(card, count)
        with torch.no_grad():
            wanted_NK, given_NK = model(images_NCHW), exported(images_NCHW)
        largest = (wanted_NK - given_NK).abs().max().item()
        if not largest <= TOLERANCE:  # NaN is no agreement
            raise TrainingError(
                f"the {kind} export of {card.name} gives logits that differ by {largest:.2g} from torch's, "
                f"{TOLERANCE:g} is allowed; nothing is written."
            )


def _example(card: ModelCard, count: int) -> torch.Tensor:
    """Images [count, C, crop, crop] of noise, always the same."""
    crop = card.transform.crop
    return torch.randn((count, card.in_chans, crop, crop), generator=torch.Generator().manual_seed(count))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' progress and announcements, which they print."""
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
