"""Code of the packaged MLflow pyfunc model, stored with the model; needs torch, timm and Pillow, not this project.

MLflow runs this file when it loads the model ("models from code"), so nothing is unpickled.
"""

import base64
import binascii
import ctypes
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
_MAX_PIXELS = 178_956_970  # default for model cards without `max_pixels`: PIL's own limit
_READERS: dict[bytes, type[ImageFile.ImageFile]] = {  # by magic number
    b"\xff\xd8": JpegImageFile,
    b"\x89PNG": PngImageFile,
    b"BM": BmpImageFile,
    b"II*\0": TiffImageFile,
    b"MM\0*": TiffImageFile,
    b"RIFF": WebPImageFile,
}
_GRAY = ("1", "L")
_SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I;16N")
_CONVERTED_BY_PIL = ("RGB", "P", "PA", "LA", "La", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr")  # to RGB
_UNDO_ORIENTATION = {  # inverse of each EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
_FIX = "convert it to an 8-bit JPEG or PNG"
_NOT_AN_IMAGE = "is not an image"
_SUPPORTED_INPUTS = (
    "pass the bytes of a JPEG, PNG, BMP, TIFF or WebP file, their base64 text, a uint8 array [H, W, 3], or a "
    "pathlib.Path"
)
_TEXT_CHUNKS = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")  # PNG chunks of texts and color profiles
_MAX_TILE_PIXELS = 1 << 24  # of a TIFF, allowed whatever the limit: tiles may be larger than the image
# What PIL raises for corrupt files.
_DECODE_ERRORS = (OSError, ValueError, SyntaxError, LookupError, TypeError, ArithmeticError, struct.error)
_LONG = 8  # for a resized image longer than this many crops, only the crop is computed
_FILTER_SUPPORT = 4  # maximum filter radius in pixels around the crop, without downscaling
_FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


class InvalidImage(ValueError):
    """An image cannot be used; the message follows its name."""


class Classifier(PythonModel):
    """Maps images to class probabilities, with the evaluation transform of the model card.

    A model server handles requests in several threads. All of them run the model in one worker thread: torch keeps a
    pool of operator threads per calling thread, and oversubscribed cores double the latency.
    """

    def load_context(self, context: PythonModelContext) -> None:
        """Loads model card and weights; MLflow calls it once, before `predict`."""
        card = json.loads(Path(context.artifacts["card"]).read_text(encoding="utf-8"))
        self.load(card, load_file(context.artifacts["weights"]))

    def load(self, card: dict[str, Any], weights: dict[str, torch.Tensor]) -> None:
        """Builds the model from the content of its card and a state dict."""
        self.classes: list[str] = list(card["classes"])
        self.transform: dict[str, Any] = card["transform"]
        self.channels: int = card["architecture"].get("in_chans", 3)
        self.max_pixels: int = card.get("max_pixels", _MAX_PIXELS)
        _keep_freed_memory()
        with _single_thread():
            self.model = build_model(card["architecture"], card["num_classes"])
            self.model.load_state_dict(weights)
            self.model.eval().to(memory_format=torch.channels_last)  # faster on CPUs
        self._worker = ThreadPoolExecutor(1, "classifier")

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """Classifies the column `image`; each row is one image in one of these formats.

        - bytes of a JPEG, PNG, BMP, TIFF or WebP file, or their base64 text
        - a uint8 array [H, W, 3] (RGB), [H, W] or [H, W, 1] (gray) or [H, W, 4] (RGBA, transparency is dropped), or
          nested lists of such numbers
        - a `pathlib.Path` of a file. Text is never a path, so a server opens no file that a client names.

        Returns:
            One row per image: class_id (index into the class list), class_name, probability, and the probabilities of
            all classes in the order of the class list.

        Raises:
            MlflowException: A row is not an image, has an unsupported pixel format, or has more pixels than the card's
                `max_pixels` (INVALID_PARAMETER_VALUE); or the model outputs NaN or infinities for it (INTERNAL_ERROR).
                The message has the row number.
        """
        if "image" not in model_input:
            raise MlflowException.invalid_parameter_value("the input has no column `image`")
        values = list(model_input["image"])
        if threading.current_thread() is threading.main_thread():
            return self._classify(values)
        return self._worker.submit(self._classify, values).result()

    def _classify(self, values: list[Any]) -> pd.DataFrame:
        probabilities_NK = np.zeros((len(values), len(self.classes)))
        for start in range(0, len(values), _BATCH):
            part = range(start, min(start + _BATCH, len(values)))
            images_NCHW = torch.cat([self._image(row, values[row]) for row in part])
            with torch.inference_mode():
                logits_NK = self.model(images_NCHW)
            non_finite = (~logits_NK.isfinite().all(dim=1)).nonzero().flatten().tolist()
            if non_finite:
                row = part.start + non_finite[0]
                raise MlflowException(f"the model outputs NaN or infinities for row {row} of `image`")
            probabilities_NK[part.start : part.stop] = logits_NK.softmax(dim=1).numpy()
        best_N = probabilities_NK.argmax(axis=1) if len(values) else np.zeros(0, np.int64)
        return pd.DataFrame(
            {
                "class_id": best_N,
                "class_name": [self.classes[i] for i in best_N],
                "probability": probabilities_NK.max(axis=1, initial=0),
                "probabilities": list(probabilities_NK),
            }
        )

    def _image(self, row: int, value: Any) -> torch.Tensor:
        """Decodes and transforms one image to [1, channels, crop, crop]."""
        try:
            rgb = decode_image(value, self.max_pixels)
        except InvalidImage as error:
            hint = f": {_SUPPORTED_INPUTS}" if str(error).startswith(_NOT_AN_IMAGE) else ""
            raise MlflowException.invalid_parameter_value(f"row {row} of `image` {error}{hint}") from error
        return evaluation_transform(rgb, **self.transform, channels=self.channels)


def _keep_freed_memory() -> None:
    """Makes glibc's malloc reuse freed activations, which otherwise cost a page fault per 4 kB in each request."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for option, value in ((-3, 2**30), (-1, 2**31 - 1)):  # M_MMAP_THRESHOLD and M_TRIM_THRESHOLD of malloc.h
            mallopt(option, value)


@contextmanager
def _single_thread() -> Iterator[None]:
    """Limits torch to one thread, so that the loading thread starts no pool of operator threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def decode_image(value: Any, max_pixels: int = _MAX_PIXELS) -> Image.Image:
    """Decodes one image in any format of `Classifier.predict` to RGB, with the same pixels as in training.

    Raises:
        InvalidImage: It is not an image, has an unsupported pixel format, or is too large.
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
        raise InvalidImage(f"exceeds PIL's size limit for this format: {error}") from error
    except (*_DECODE_ERRORS, binascii.Error) as error:
        if "-bit layers" in str(error) or "pixel mode" in str(error):  # PIL's messages for JPEG and TIFF
            raise InvalidImage(f"has pixels of an unsupported format ({error}): {_FIX}") from error
        raise InvalidImage(_NOT_AN_IMAGE) from error


def _strip_text_chunks(content: bytes) -> bytes:
    """Removes texts and color profiles from a PNG: pixels do not depend on them, and PIL rejects long ones."""
    if not any(name in content for name in _TEXT_CHUNKS):
        return content
    kept, offset = [content[:8]], 8
    while offset < len(content):
        end = offset + 12 + int.from_bytes(content[offset : offset + 4], "big")
        if content[offset + 4 : offset + 8] not in _TEXT_CHUNKS:
            kept.append(content[offset:end])
        offset = end
    return b"".join(kept)


def _check_size(width: int, height: int, max_pixels: int, what: str = "") -> None:
    if width * height > max_pixels:
        raise InvalidImage(
            f"has {what}{width:,} x {height:,} pixels, more than the limit of {max_pixels:,} "
            f"(max_pixels in the model's card)"
        )


def _from_file(content: bytes, max_pixels: int) -> Image.Image:
    """Decodes the first frame of a file as stored: undoes the EXIF orientation, which PIL applies to TIFF only."""
    reader = next((reader for magic, reader in _READERS.items() if content.startswith(magic)), None)
    if reader is None:
        raise InvalidImage(_NOT_AN_IMAGE)
    with reader(io.BytesIO(_strip_text_chunks(content) if reader is PngImageFile else content)) as image:
        _check_size(*image.size, max_pixels)
        if isinstance(image, TiffImageFile) and TILEWIDTH in image.tag_v2 and TILELENGTH in image.tag_v2:
            tile = image.tag_v2[TILEWIDTH], image.tag_v2[TILELENGTH]
            _check_size(*tile, max(max_pixels, _MAX_TILE_PIXELS), "tiles of ")
        code = image.getexif().get(0x0112) if isinstance(image, TiffImageFile) else None
        image.load()
        return _to_rgb(image.transpose(_UNDO_ORIENTATION[code]) if code in _UNDO_ORIENTATION else image)


def _to_rgb(image: Image.Image) -> Image.Image:
    """Converts to 8-bit RGB: keeps the upper 8 of 16 bits, as PIL does for 16-bit RGB; drops transparency."""
    if image.mode in _SIXTEEN_BIT:
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode not in (*_GRAY, *_CONVERTED_BY_PIL):
        raise InvalidImage(f"has pixels of PIL's mode {image.mode}: {_FIX}")
    image.info.pop("transparency", None)  # otherwise PIL warns that it is dropped
    return image.convert("RGB")


def _from_array(value: Any, max_pixels: int) -> Image.Image:
    pixels = np.asarray(value)
    if pixels.dtype not in (np.uint8, np.int64):  # int64: nested lists
        raise InvalidImage(f"{_NOT_AN_IMAGE} (an array of dtype {pixels.dtype}, which must be uint8)")
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[..., 0]
    if pixels.size == 0 or not (pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] in (3, 4))):
        raise InvalidImage(f"{_NOT_AN_IMAGE} (an array of shape {list(pixels.shape)})")
    if pixels.min() < 0 or pixels.max() > 255:
        raise InvalidImage(
            f"{_NOT_AN_IMAGE} (values from {pixels.min()} to {pixels.max()}, pixels must be from 0 to 255)"
        )
    _check_size(pixels.shape[1], pixels.shape[0], max_pixels)
    return Image.fromarray(pixels.astype(np.uint8)).convert("RGB")


def build_model(architecture: dict[str, Any], num_classes: int) -> torch.nn.Module:
    """Builds a model from the `architecture` of its card.

    With the key `timm`, a model of timm's registry by name; `module` is the module that registers it, if not timm.
    Otherwise timm's `DenseNet`; with `stem_type` `cifar`, its stem is one 3x3 convolution without norm and pooling.
    """
    options = dict(architecture)
    name, module = options.pop("timm", None), options.pop("module", None)
    if module is not None:
        importlib.import_module(module)
    if name is not None:
        return timm.create_model(name, num_classes=num_classes, **options)
    cifar_stem = options.get("stem_type") == "cifar"
    if cifar_stem:
        del options["stem_type"]
    model = timm.models.DenseNet(**options, num_classes=num_classes)
    if cifar_stem:
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
    """Resizes the shorter side to `resize`, center-crops and normalizes, like torchvision; returns [1, C, crop, crop].

    Does not apply the EXIF orientation. For one channel, returns the luma (ITU-R BT.601), normalized by the luma of
    `mean` and `std`.
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
    """Computes the crop of a very long resized image without the rest, which could take gigabytes.

    First cuts off pixels outside the filter's support, since PIL's `box` has single precision.
    """
    ranges = []
    for stored, resized, start in zip(rgb.size, size, origin, strict=True):
        scale = stored / resized
        begin, end, support = start * scale, (start + crop) * scale, _FILTER_SUPPORT * max(1.0, scale)
        first, last = max(0, math.floor(begin - support)), min(stored, math.ceil(end + support))
        ranges.append((first, last, begin - first, end - first))
    (x0, x1, left, right), (y0, y1, top, bottom) = ranges
    rows = rgb.crop((x0, y0, x1, y1)).resize((crop, y1 - y0), kernel, box=(left, 0, right, y1 - y0))
    return rows.resize((crop, crop), kernel, box=(0, top, crop, bottom))


mlflow.models.set_model(Classifier())
