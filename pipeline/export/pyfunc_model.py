"""The packaged model's code, stored with it: it needs torch, timm and Pillow, and nothing of this project.

MLflow runs this file on loading ("models from code"), so that nothing is unpickled.
"""

import base64
import binascii
import importlib
import io
import json
import math
import struct
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import timm
import torch
from mlflow.exceptions import MlflowException
from mlflow.pyfunc import PythonModel, PythonModelContext
from PIL import Image, ImageFile
from PIL.BmpImagePlugin import BmpImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TILELENGTH, TILEWIDTH, TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile
from safetensors.torch import load_file

_BATCH = 32
_LUMA = (0.299, 0.587, 0.114)
_MAX_PIXELS = 178_956_970  # where the card does not say; PIL's own limit
_READERS: dict[bytes, type[ImageFile.ImageFile]] = {  # by a file's first bytes
    b"\xff\xd8": JpegImageFile,
    b"\x89PNG": PngImageFile,
    b"BM": BmpImageFile,
    b"II*\0": TiffImageFile,
    b"MM\0*": TiffImageFile,
    b"RIFF": WebPImageFile,
}
_GRAY = ("1", "L")
_SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I;16N")
_CONVERTED = ("RGB", "P", "PA", "LA", "La", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr")
_UNTURNED = {  # what undoes an EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
_FIX = "convert it to an 8-bit JPEG or PNG"
_NO_IMAGE = "is not an image"
_MEANT = (
    "give the bytes of a JPEG, PNG, BMP, TIFF or WebP file, their base64 text, an array of uint8 [H, W, 3], or a "
    "pathlib.Path"
)
_TEXTS = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")  # a PNG's texts and color profiles
_TILE = 1 << 24  # pixels of a TIFF's tile that are always allowed: tiles may be larger than the image
_CORRUPTION = (OSError, ValueError, SyntaxError, LookupError, TypeError, ArithmeticError, struct.error)
_LONG = 8  # crops: of a resized image that is longer only the crop is computed
_REACH = 4  # pixels beside the crop that the filters look at, at most, where an image is not made smaller
_FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


class InvalidImage(ValueError):
    """What is wrong with an image, in words that follow its name."""


class Classifier(PythonModel):
    """Images in, class probabilities out, by the evaluation transform that the model was measured with.

    A server answers each request in one of several threads. All of them hand it to the same one here: torch's operators
    have a team of threads for each thread that calls them, and with more teams than cores each takes twice as long.
    """

    def load_context(self, context: PythonModelContext) -> None:
        """Reads the card and the weights; MLflow calls it once, before `predict`."""
        card = json.loads(Path(context.artifacts["card"]).read_text(encoding="utf-8"))
        self.load(card, load_file(context.artifacts["weights"]))

    def load(self, card: dict[str, Any], weights: dict[str, torch.Tensor]) -> None:
        """Makes the model of a card's content and a state dict."""
        self.classes: list[str] = list(card["classes"])
        self.transform: dict[str, Any] = card["transform"]
        self.channels: int = card["architecture"].get("in_chans", 3)
        self.max_pixels: int = card.get("max_pixels", _MAX_PIXELS)
        with _one_thread():
            self.model = build_model(card["architecture"], card["num_classes"])
            self.model.load_state_dict(weights)
            self.model.eval()
        self._worker = ThreadPoolExecutor(1, "classifier")

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """Classifies the column `image`; each row is one image in any of these forms.

        - bytes of a JPEG, PNG, BMP, TIFF or WebP file, or text: the same in base64
        - an array of uint8, [H, W, 3] (RGB), [H, W] or [H, W, 1] (gray) or [H, W, 4] (RGBA, whose transparency is
          dropped), or nested lists of such numbers
        - a `pathlib.Path` of a file. Plain text is never a path, so that a server opens no file that a client names.

        Returns:
            One row per image: class_id (rank in the class list), class_name, probability, and probabilities of all
            classes in the list's order.

        Raises:
            MlflowException: a row is not an image, is of a kind that is not used, or has more pixels than the card's
                `max_pixels` (INVALID_PARAMETER_VALUE), or the model gives NaN or infinities for it (INTERNAL_ERROR);
                the message gives its number.
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
            images_NCHW = torch.cat([self._image(row, values[row]) for row in part])
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

    def _image(self, row: int, value: Any) -> torch.Tensor:
        """Decodes and transforms one image to [1, channels, crop, crop]."""
        try:
            rgb = decode_image(value, self.max_pixels)
        except InvalidImage as error:
            meant = f": {_MEANT}" if str(error).startswith(_NO_IMAGE) else ""
            raise MlflowException.invalid_parameter_value(f"row {row} of `image` {error}{meant}") from error
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


def decode_image(value: Any, max_pixels: int = _MAX_PIXELS) -> Image.Image:
    """The RGB pixels of one image in any of the forms of `Classifier.predict`, as the training side decodes them.

    Raises:
        InvalidImage: what is wrong with it.
    """
    try:
        if isinstance(value, Path):
            return _from_file(value.read_bytes(), max_pixels)
        if isinstance(value, str):
            return _from_file(base64.b64decode(value, validate=True), max_pixels)
        if isinstance(value, bytes):
            return _from_file(value, max_pixels)
        return _from_array(value, max_pixels)
    except InvalidImage:
        raise
    except Image.DecompressionBombError as error:
        raise InvalidImage(f"is larger than PIL takes in this format: {error}") from error
    except (*_CORRUPTION, binascii.Error) as error:
        if "-bit layers" in str(error) or "pixel mode" in str(error):  # PIL's, of JPEG and TIFF
            raise InvalidImage(f"has pixels of a kind that is not used ({error}): {_FIX}") from error
        raise InvalidImage(_NO_IMAGE) from error


def _without_texts(content: bytes) -> bytes:
    """A PNG without texts and color profiles: no pixel depends on them, and PIL refuses an image for long ones."""
    if not any(name in content for name in _TEXTS):
        return content
    kept, place = [content[:8]], 8
    while place < len(content):
        end = place + 12 + int.from_bytes(content[place : place + 4], "big")
        if content[place + 4 : place + 8] not in _TEXTS:
            kept.append(content[place:end])
        place = end
    return b"".join(kept)


def _check_size(width: int, height: int, max_pixels: int, what: str = "") -> None:
    if width * height > max_pixels:
        raise InvalidImage(
            f"has {what}{width:,} x {height:,} pixels, more than the limit of {max_pixels:,} "
            f"(max_pixels in the model's card)"
        )


def _from_file(content: bytes, max_pixels: int) -> Image.Image:
    """Decodes a file as stored: EXIF orientation, which PIL applies to TIFF alone, is undone; of several, the first."""
    reader = next((reader for magic, reader in _READERS.items() if content.startswith(magic)), None)
    if reader is None:
        raise InvalidImage(_NO_IMAGE)
    with reader(io.BytesIO(_without_texts(content) if reader is PngImageFile else content)) as image:
        _check_size(*image.size, max_pixels)
        if isinstance(image, TiffImageFile) and TILEWIDTH in image.tag_v2 and TILELENGTH in image.tag_v2:
            tile = image.tag_v2[TILEWIDTH], image.tag_v2[TILELENGTH]
            _check_size(*tile, max(max_pixels, _TILE), "tiles of ")
        turned = image.getexif().get(0x0112) if isinstance(image, TiffImageFile) else None
        image.load()
        return _to_rgb(image.transpose(_UNTURNED[turned]) if turned in _UNTURNED else image)


def _to_rgb(image: Image.Image) -> Image.Image:
    """8 bits per channel: of 16 the upper 8 are kept, as PIL keeps those of 16-bit RGB; transparency is dropped."""
    if image.mode in _SIXTEEN_BIT:
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode not in (*_GRAY, *_CONVERTED):
        raise InvalidImage(f"has pixels of PIL's mode {image.mode}: {_FIX}")
    image.info.pop("transparency", None)  # PIL warns of it where it is dropped
    return image.convert("RGB")


def _from_array(value: Any, max_pixels: int) -> Image.Image:
    pixels = np.asarray(value)
    if pixels.dtype not in (np.uint8, np.int64):  # int64: what lists become
        raise InvalidImage(f"{_NO_IMAGE} (numbers of type {pixels.dtype}, which must be uint8)")
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[..., 0]
    if pixels.size == 0 or not (pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] in (3, 4))):
        raise InvalidImage(f"{_NO_IMAGE} (an array of the shape {list(pixels.shape)})")
    if pixels.min() < 0 or pixels.max() > 255:
        raise InvalidImage(f"{_NO_IMAGE} (numbers from {pixels.min()} to {pixels.max()}, 0 to 255 are pixels)")
    _check_size(pixels.shape[1], pixels.shape[0], max_pixels)
    return Image.fromarray(pixels.astype(np.uint8)).convert("RGB")


def build_model(architecture: dict[str, Any], num_classes: int) -> torch.nn.Module:
    """A model of timm's registry (`timm`: its name; `module`: what registers it, if not timm), or timm's DenseNet.

    A DenseNet with the stem `cifar` begins with one 3x3 convolution and neither norm nor pooling.
    """
    options = dict(architecture)
    name, module = options.pop("timm", None), options.pop("module", None)
    if module is not None:
        importlib.import_module(module)
    if name is not None:
        return timm.create_model(name, num_classes=num_classes, **options)
    small = options.get("stem_type") == "cifar"
    if small:
        del options["stem_type"]
    model = timm.models.DenseNet(**options, num_classes=num_classes)
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
    """Shorter side to `resize`, center crop, normalized, as torchvision does it; EXIF orientation is not applied.

    One channel is the luma (ITU-R BT.601), normalized by the luma of `mean` and `std`.
    """
    short = min(rgb.size)
    size = (int(resize * rgb.width / short), int(resize * rgb.height / short))
    left, top = (round((side - crop) / 2) for side in size)
    if max(size) > _LONG * crop:
        cut = _resized_crop(rgb, size, (left, top), crop, _FILTERS[interpolation])
    else:
        cut = rgb.resize(size, _FILTERS[interpolation]).crop((left, top, left + crop, top + crop))
    image_HWC = torch.from_numpy(np.array(cut, np.float32)) / 255
    image_HWC = (image_HWC - torch.tensor(mean)) / torch.tensor(std)
    if channels == 1:
        weights_C = torch.tensor(_LUMA) * torch.tensor(std)
        image_HWC = (image_HWC @ (weights_C / weights_C.sum()))[..., None]
    return image_HWC.permute(2, 0, 1)[None]


def _resized_crop(
    rgb: Image.Image, size: tuple[int, int], origin: tuple[int, int], crop: int, kernel: Image.Resampling
) -> Image.Image:
    """The crop of a very long image at its new size, without the rest, which might take gigabytes.

    PIL's `box` is in single precision, so what the filter does not reach is cut off first.
    """
    places = []
    for stored, resized, start in zip(rgb.size, size, origin, strict=True):
        scale = stored / resized
        begin, end, reach = start * scale, (start + crop) * scale, _REACH * max(1.0, scale)
        first, last = max(0, math.floor(begin - reach)), min(stored, math.ceil(end + reach))
        places.append((first, last, begin - first, end - first))
    (x0, x1, left, right), (y0, y1, top, bottom) = places
    rows = rgb.crop((x0, y0, x1, y1)).resize((crop, y1 - y0), kernel, box=(left, 0, right, y1 - y0))
    return rows.resize((crop, crop), kernel, box=(0, top, crop, bottom))


mlflow.models.set_model(Classifier())
