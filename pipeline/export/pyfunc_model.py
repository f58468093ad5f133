"""The packaged model's code, stored with it: it needs torch, timm and Pillow, and nothing of this project.

MLflow runs this file on loading ("models from code"), so that nothing is unpickled.
"""

import base64
import binascii
import io
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import torch
from mlflow.exceptions import MlflowException
from mlflow.pyfunc import PythonModel, PythonModelContext
from PIL import Image
from safetensors.torch import load_file
from timm.models.densenet import DenseNet

_BATCH = 32
_LUMA = (0.299, 0.587, 0.114)
_FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


class Classifier(PythonModel):
    """Pictures in, class probabilities out, by the evaluation transform that the model was measured with.

    A server answers each request in one of several threads. All of them hand it to the same one here: torch's operators
    have a team of threads for each thread that calls them, and with more teams than cores each takes twice as long.
    """

    def load_context(self, context: PythonModelContext) -> None:
        """Reads the card and the weights; MLflow calls it once, before `predict`."""
        card = json.loads(Path(context.artifacts["card"]).read_text(encoding="utf-8"))
        self.classes: list[str] = card["classes"]
        self.transform: dict[str, Any] = card["transform"]
        self.channels: int = card["architecture"].get("in_chans", 3)
        with _one_thread():
            self.model = network(card["architecture"], card["num_classes"])
            self.model.load_state_dict(load_file(context.artifacts["weights"]))
            self.model.eval()
        self._worker = ThreadPoolExecutor(1, "classifier")

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """Classifies the column `image`; each row is one picture in any of these forms.

        - bytes of a JPEG or PNG file, or text: the same in base64
        - an array of uint8, [H, W, 3] (RGB) or [H, W] (grey), or nested lists of such numbers
        - a `pathlib.Path` of a file. Plain text is never a path, so that a server opens no file that a client names.

        Returns:
            One row per picture: class_id (rank in the class list), class_name, probability, and probabilities of all
            classes in the list's order.

        Raises:
            MlflowException: a row is not a picture (INVALID_PARAMETER_VALUE), or the model gives NaN or infinities for
                it (INTERNAL_ERROR); the message gives its number.
        """
        if "image" not in model_input:
            raise MlflowException.invalid_parameter_value("the input has no column `image`")
        values = list(model_input["image"])
        if threading.current_thread() is threading.main_thread():
            return self._classified(values)
        return self._worker.submit(self._classified, values).result()

    def _classified(self, values: list[Any]) -> pd.DataFrame:
        found_NK = np.zeros((len(values), len(self.classes)))
        for start in range(0, len(values), _BATCH):
            part = range(start, min(start + _BATCH, len(values)))
            images_NCHW = torch.cat([self._picture(row, values[row]) for row in part])
            with torch.inference_mode():
                logits_NK = self.model(images_NCHW)
            wrong = (~logits_NK.isfinite().all(dim=1)).nonzero().flatten().tolist()
            if wrong:
                raise MlflowException(f"the model gives NaN or infinities for row {part.start + wrong[0]} of `image`")
            found_NK[part.start : part.stop] = logits_NK.softmax(dim=1).numpy()
        best_N = found_NK.argmax(axis=1) if len(values) else np.zeros(0, np.int64)
        return pd.DataFrame(
            {
                "class_id": best_N,
                "class_name": [self.classes[i] for i in best_N],
                "probability": found_NK.max(axis=1, initial=0),
                "probabilities": list(found_NK),
            }
        )

    def _picture(self, row: int, value: Any) -> torch.Tensor:
        """Decodes and transforms one picture to [1, channels, crop, crop]."""
        try:
            with _opened(value) as image:
                rgb = image.convert("RGB")
        except (OSError, ValueError, TypeError, binascii.Error, Image.DecompressionBombError) as error:
            raise MlflowException.invalid_parameter_value(
                f"row {row} of `image` is not a picture: give the bytes of a JPEG or PNG file, their base64 text, an "
                f"array of uint8 [H, W, 3], or a pathlib.Path"
            ) from error
        return evaluation_transform(rgb, **self.transform, channels=self.channels)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Without a team of torch's threads for the one that loads the model."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _opened(value: Any) -> Image.Image:
    if isinstance(value, Path):
        return Image.open(value)
    if isinstance(value, str):
        return Image.open(io.BytesIO(base64.b64decode(value, validate=True)))
    if isinstance(value, bytes):
        return Image.open(io.BytesIO(value))
    pixels = np.asarray(value)
    if pixels.dtype.kind not in "iu" or pixels.min() < 0 or pixels.max() > 255:
        raise ValueError("pixels are whole numbers from 0 to 255")
    return Image.fromarray(pixels.astype(np.uint8))


def network(architecture: dict[str, Any], num_classes: int) -> DenseNet:
    """timm's DenseNet; with the stem `cifar` it begins with one 3x3 convolution and neither norm nor pooling."""
    options = dict(architecture)
    small = options.get("stem_type") == "cifar"
    if small:
        del options["stem_type"]
    model = DenseNet(**options, num_classes=num_classes)
    if small:
        channels = options.get("in_chans", 3)
        model.features.conv0 = torch.nn.Conv2d(
            channels, 2 * options["growth_rate"], kernel_size=3, padding=1, bias=False
        )
        del model.features.norm0, model.features.pool0
    return model


def evaluation_transform(
    rgb: Image.Image,
    resize: int,
    crop: int,
    interpolation: str,
    mean: list[float],
    std: list[float],
    channels: int = 3,
) -> torch.Tensor:
    """Shorter side to `resize`, centre crop, normalised, as torchvision does it; EXIF orientation is not applied.

    One channel is the luma (ITU-R BT.601), normalised by the luma of `mean` and `std`.
    """
    short = min(rgb.size)
    size = (int(resize * rgb.width / short), int(resize * rgb.height / short))
    left, top = (round((side - crop) / 2) for side in size)
    cut = rgb.resize(size, _FILTERS[interpolation]).crop((left, top, left + crop, top + crop))
    image_HWC = torch.from_numpy(np.array(cut, np.float32)) / 255
    image_HWC = (image_HWC - torch.tensor(mean)) / torch.tensor(std)
    if channels == 1:
        weights_C = torch.tensor(_LUMA) * torch.tensor(std)
        image_HWC = (image_HWC @ (weights_C / weights_C.sum()))[..., None]
    return image_HWC.permute(2, 0, 1)[None]


mlflow.models.set_model(Classifier())
