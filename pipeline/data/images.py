"""What an image file is, told by its content and never by its name: format, size, colour space, and plain faults."""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, TiffImagePlugin

from pipeline.data.formats import not_decoded

FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP")  # all of these DALI decodes
HEAD = 1 << 16  # bytes that nearly always reach a picture's size
TAIL = 4096  # bytes that may follow a JPEG's end mark
_MAGIC = (b"\xff\xd8", b"\x89PNG\r\n\x1a\n", b"BM", b"II*\0", b"MM\0*", b"RIFF")
_JPEG_MODES = {"Gray": "L", "GRAY": "L", "YCbCr": "RGB", "RGB": "RGB", "CMYK": "CMYK", "YCCK": "CMYK"}
_ORIENTATION = 0x0112
_MOST_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 0)
_BENIGN = "extraneous bytes"  # libjpeg's warning of bytes between two parts, both of which are whole


@dataclass(frozen=True)
class Header:
    """A picture's format, size in pixels as stored (EXIF orientation not applied), and PIL's name of its colours."""

    format: str
    width: int
    height: int
    mode: str

    @property
    def plain_jpeg(self) -> bool:
        """Whether it can be used as it is: a JPEG in gray or in YCbCr/RGB."""
        return self.format == "JPEG" and self.mode in ("L", "RGB")


class NotAnImage(ValueError):
    """What is wrong with a picture, in words that follow its name: `is a JPEG that is cut short`."""


@contextmanager
def quiet() -> Iterator[None]:
    """Without PIL's warnings of odd EXIF blocks and large pictures, which are no faults here.

    Python keeps one list of warning filters for all threads: enter this before threads are started, not in them.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def cut_short(start: bytes, end: bytes) -> str | None:
    """Says whether a picture lacks its beginning or its end mark, from its first 16 and its last `TAIL` bytes."""
    if not start.startswith(_MAGIC):
        other = not_decoded(start)
        if other is not None:
            known = ", ".join(FORMATS)
            return f"is a {other} file, which is not an image of a known format ({known}): convert it to JPEG or PNG"
        seen = f"it begins with {start[:16].decode('latin-1')!r}" if start else "it is empty"
        return f"is not an image of a known format ({', '.join(FORMATS)}); {seen}"
    if start.startswith(_MAGIC[0]) and b"\xff\xd9" not in end[-TAIL:]:
        return "is a JPEG that is cut short"
    if start.startswith(_MAGIC[1]) and b"IEND" not in end[-TAIL:]:
        return "is a PNG that is cut short"
    return None


def header(content: bytes, end: bytes) -> Header:
    """Reads a picture's head without decoding it.

    Args:
        content: the picture, or its first bytes.
        end: its last `TAIL` bytes, or the whole picture.

    Raises:
        NotAnImage: it is no picture of a known format, or it is cut short.
    """
    fault = cut_short(content[:16], end)
    if fault is not None:
        raise NotAnImage(fault)
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(content)
        found = Header("JPEG", width, height, _JPEG_MODES[colours])
    except (ValueError, KeyError):
        pass  # another format, or one of the JPEGs that only PIL reads, at fifteen times the cost
    else:
        if width * height > _MOST_PIXELS:  # PIL refuses it too; a damaged head may tell of gigabytes
            raise NotAnImage(f"has {width} x {height} pixels by its head, more than {_MOST_PIXELS:,}")
        return found
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            width, height = image.size
            if isinstance(image, TiffImagePlugin.TiffImageFile):  # whose `size` alone is turned by the orientation
                width, height = image.tag_v2[TiffImagePlugin.IMAGEWIDTH], image.tag_v2[TiffImagePlugin.IMAGELENGTH]
            return Header(str(image.format), width, height, image.mode)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise NotAnImage(f"has a damaged head: {error}") from error


def decode(content: bytes) -> Image.Image:
    """Decodes a whole picture as stored.

    Raises:
        NotAnImage: it cannot be decoded to the end, or a JPEG's data are damaged or have holes, which most decoders
            pass over and fill with gray.
    """
    fault = cut_short(content[:16], content)
    if fault is not None:
        raise NotAnImage(fault)
    try:
        image: Image.Image = Image.open(io.BytesIO(content), formats=FORMATS)
        if image.format == "JPEG" and image.mode in ("L", "RGB"):
            try:
                return Image.fromarray(_decode_strictly(content, image.mode))
            except ValueError as error:
                if (_BENIGN not in str(error) and "orrupt" in str(error)) or "remature" in str(error):
                    raise NotAnImage(f"cannot be decoded: {error}") from error
        image.load()
        return image
    except NotAnImage:
        raise
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise NotAnImage(f"cannot be decoded: {error}") from error


def _decode_strictly(content: bytes, mode: str) -> NDArray[np.uint8]:
    """The pixels as PIL would decode them; raises ValueError also where libjpeg only warns."""
    pixels = simplejpeg.decode_jpeg(content, "GRAY" if mode == "L" else "RGB", strict=True)
    return pixels[..., 0] if mode == "L" else pixels


def orientation(content: bytes) -> int | None:
    """The EXIF orientation, 1 being upright; None where there is none. Damaged EXIF blocks count as none."""
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            value = image.getexif().get(_ORIENTATION)
    except Exception:  # PIL raises whatever the damage leads to; EXIF is not needed for anything
        return None
    return value if isinstance(value, int) else None


def to_rgb(image: Image.Image) -> Image.Image:
    """The picture in 8 bits, gray where it is gray, else RGB: what PIL, torchvision and DALI make of it too.

    CMYK and YCCK, which Adobe stores inverted, are read as PIL reads them; transparency is dropped; 16-bit gray, which
    PIL would cut off at 255, is scaled.
    """
    if image.mode in ("L", "RGB"):
        return image
    if image.mode == "1":
        return image.convert("L")
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image).astype(np.int64) // 257).clip(0, 255).astype(np.uint8))
    return image.convert("RGB")


def encode(image: Image.Image, quality: int) -> bytes:
    """A gray or RGB picture as a baseline JPEG with 4:2:0 chroma, without any metadata."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality, optimize=False, exif=b"", icc_profile=None)
    return buffer.getvalue()


def shrink(image: Image.Image, shorter_side: int) -> Image.Image:
    """A gray or RGB picture with its shorter side reduced to `shorter_side` pixels (Lanczos); smaller ones stay."""
    short = min(image.size)
    if short <= shorter_side:
        return image
    width, height = (max(1, round(side * shorter_side / short)) for side in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS)
