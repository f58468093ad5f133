"""What an image file is, told by its content and never by its name, and what its pixels become.

The one place that says so. `to_rgb` is the conversion; `in_common` tells which files DALI decodes to the same pixels by
itself, all others are decoded here and handed to it as `netpbm`. The packaged model (`pipeline/export/pyfunc_model.py`)
has a copy of the conversion, which a test of all kinds and paths holds equal.
"""

import io
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, ImageFile
from PIL.BmpImagePlugin import BmpImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import IMAGELENGTH, IMAGEWIDTH, TILELENGTH, TILEWIDTH, TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from pipeline.config import MAX_PIXELS
from pipeline.data.formats import DECODED, not_decoded

# By their first bytes. Not `Image.open`: it refuses large images before their size is known, by a limit of its own.
_READERS: dict[bytes, type[ImageFile.ImageFile]] = {
    b"\xff\xd8": JpegImageFile,
    b"\x89PNG\r\n\x1a\n": PngImageFile,
    b"BM": BmpImageFile,
    b"II*\0": TiffImageFile,
    b"MM\0*": TiffImageFile,
    b"RIFF": WebPImageFile,
}
_JPEG, _PNG, *_, _RIFF = _READERS
FORMATS = DECODED
HEAD = 1 << 16  # bytes that nearly always reach an image's size
TAIL = 4096  # bytes that may follow a JPEG's end mark
_JPEG_MODES = {"Gray": "L", "GRAY": "L", "YCbCr": "RGB", "RGB": "RGB", "CMYK": "CMYK", "YCCK": "CMYK"}
_SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I;16N")
_CONVERTED = ("P", "PA", "LA", "La", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr")  # to RGB by PIL
_USED = ("L", "RGB", "1", *_SIXTEEN_BIT, *_CONVERTED)
_UNSUPPORTED = {
    "I": "32-bit integers",
    "F": "floating-point numbers",
    "LAB": "CIE L*a*b* colors",
    "HSV": "HSV colors",
}
_FIX = "convert it to an 8-bit JPEG or PNG"
_ORIENTATION = 0x0112
_UNTURNED = {  # what undoes an EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
_HUFFMAN = (0xC0, 0xC1, 0xC2)  # JPEG's baseline, extended and progressive frames; others are arithmetic or lossless
_TEXTS = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")  # a PNG's texts and color profiles
_TILE = 1 << 24  # pixels of a TIFF's tile that are always allowed: tiles may be larger than the image
_NO_FRAMES = (0xC4, 0xC8, 0xCC)  # tables among the codes of frames
# What PIL raises at corruption.
_CORRUPTION = (OSError, ValueError, SyntaxError, LookupError, TypeError, ArithmeticError, struct.error)
_BENIGN = "extraneous bytes"  # libjpeg's warning of bytes between two parts, both of which are whole


@dataclass(frozen=True)
class Header:
    """An image's format, size in pixels as stored (EXIF orientation not applied), and PIL's name of its colors."""

    format: str
    width: int
    height: int
    mode: str

    @property
    def plain_jpeg(self) -> bool:
        """Whether it can be used as it is: a JPEG in gray or in YCbCr/RGB."""
        return self.format == "JPEG" and self.mode in ("L", "RGB")


class NotAnImage(ValueError):
    """What is wrong with an image, in words that follow its name: `is a JPEG that is cut short`."""


class Unsupported(NotAnImage):
    """It is whole, but its pixels have no one meaning in 8 bits."""


class TooLarge(NotAnImage):
    """It has more pixels than are allowed."""


def check_size(width: int, height: int, max_pixels: int, what: str = "") -> None:
    """Raises `TooLarge` where an image has more pixels than `max_pixels`."""
    if width * height > max_pixels:
        raise TooLarge(
            f"has {what}{width:,} x {height:,} pixels, more than the limit of {max_pixels:,} (data.max_pixels in "
            f"training, --max-pixels of `densenet data`, max_pixels in a model's card)"
        )


@contextmanager
def quiet() -> Iterator[None]:
    """Without PIL's warnings of odd EXIF blocks and large images, which are no problems here.

    Python keeps one list of warning filters for all threads: enter this before threads are started, not in them.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def cut_short(start: bytes, end: bytes) -> str | None:
    """Says whether an image lacks its beginning or its end mark, from its first 16 and its last `TAIL` bytes."""
    if not start.startswith(tuple(_READERS)):
        other = not_decoded(start)
        if other is not None:
            known = ", ".join(FORMATS)
            return f"is a {other} file, which is not an image of a known format ({known}): convert it to JPEG or PNG"
        seen = f"it begins with {start[:16].decode('latin-1')!r}" if start else "it is empty"
        return f"is not an image of a known format ({', '.join(FORMATS)}); {seen}"
    if start.startswith(_JPEG) and b"\xff\xd9" not in end[-TAIL:]:
        return "is a JPEG that is cut short"
    if start.startswith(_PNG) and b"IEND" not in end[-TAIL:]:
        return "is a PNG that is cut short"
    return None


def header(content: bytes, end: bytes) -> Header:
    """Reads an image's head without decoding it.

    Args:
        content: the image, or its first bytes.
        end: its last `TAIL` bytes, or the whole image.

    Raises:
        NotAnImage: it is no image of a known format, it is cut short, or it is of a kind that is not used.
    """
    problem = cut_short(content[:16], end)
    if problem is not None:
        raise NotAnImage(problem)
    _, bits, _ = (content.startswith(_JPEG) and _jpeg_frame(memoryview(content))) or (0, 8, 0)
    if bits != 8:
        raise Unsupported(f"is a JPEG of {bits} bits: {_FIX}")
    try:
        height, width, colors, _ = simplejpeg.decode_jpeg_header(content)
        return Header("JPEG", width, height, _JPEG_MODES[colors])
    except (ValueError, KeyError):
        pass  # another format, or one of the JPEGs that only PIL reads, at fifteen times the cost
    try:
        with _opened(content) as image:
            width, height = _stored_size(image)
            found = Header(str(image.format), width, height, image.mode)
    except Image.DecompressionBombError as error:
        raise TooLarge(f"is larger than PIL takes in this format: {error}") from error
    except _CORRUPTION as error:
        if "unknown pixel mode" in str(error):  # of PIL's reader of TIFF
            raise Unsupported(f"is a TIFF with pixels of a kind that PIL does not know: {_FIX}") from error
        raise NotAnImage(f"has a corrupt head: {error}") from error
    _check_mode(found.mode)
    return found


def _opened(content: bytes) -> ImageFile.ImageFile:
    """PIL's image of a known format, with its head read."""
    reader = next(reader for magic, reader in _READERS.items() if content.startswith(magic))
    return reader(io.BytesIO(_without_texts(content) if reader is PngImageFile else content))


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


def _stored_size(image: ImageFile.ImageFile) -> tuple[int, int]:
    """Width and height without the orientation, which PIL applies to TIFF alone."""
    if isinstance(image, TiffImageFile):
        return image.tag_v2[IMAGEWIDTH], image.tag_v2[IMAGELENGTH]
    return image.size


def _check_sizes(image: ImageFile.ImageFile, max_pixels: int) -> None:
    """Compares an image and its tiles, of which at least one is decoded whole, with the limit."""
    check_size(*_stored_size(image), max_pixels)
    if isinstance(image, TiffImageFile) and TILEWIDTH in image.tag_v2 and TILELENGTH in image.tag_v2:
        check_size(image.tag_v2[TILEWIDTH], image.tag_v2[TILELENGTH], max(max_pixels, _TILE), "tiles of ")


def _check_mode(mode: str) -> None:
    if mode not in _USED:
        raise Unsupported(f"has pixels of PIL's mode {mode} ({_UNSUPPORTED.get(mode, 'not known here')}): {_FIX}")


def decode(content: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decodes a whole image as stored, the first one of several.

    Raises:
        NotAnImage: it cannot be decoded to the end, or a JPEG's data are corrupt or have holes, which most decoders
            pass over and fill with gray; or it has more than `max_pixels`.
    """
    problem = cut_short(content[:16], content)
    if problem is not None:
        raise NotAnImage(problem)
    try:
        image = _opened(content)
        _check_sizes(image, max_pixels)
        if image.format == "JPEG" and image.mode in ("L", "RGB"):
            try:
                return Image.fromarray(_decode_strictly(content, image.mode))
            except ValueError as error:
                if (_BENIGN not in str(error) and "orrupt" in str(error)) or "remature" in str(error):
                    raise NotAnImage(f"cannot be decoded: {error}") from error
        turned = image.getexif().get(_ORIENTATION) if isinstance(image, TiffImageFile) else None
        image.load()
        return image.transpose(_UNTURNED[turned]) if turned in _UNTURNED else image
    except NotAnImage:
        raise
    except Image.DecompressionBombError as error:
        raise TooLarge(f"is larger than PIL takes in this format: {error}") from error
    except _CORRUPTION as error:
        raise NotAnImage(f"cannot be decoded: {error}") from error


def _decode_strictly(content: bytes, mode: str) -> NDArray[np.uint8]:
    """The pixels as PIL would decode them; raises ValueError also where libjpeg only warns."""
    pixels = simplejpeg.decode_jpeg(content, "GRAY" if mode == "L" else "RGB", strict=True)
    return pixels[..., 0] if mode == "L" else pixels


def orientation(content: bytes) -> int | None:
    """The EXIF orientation, 1 being upright; None where there is none. Corrupt EXIF blocks count as none."""
    try:
        with _opened(content) as image:
            value = image.getexif().get(_ORIENTATION)
    except Exception:  # PIL raises whatever the corruption leads to; EXIF is not needed for anything
        return None
    return value if isinstance(value, int) else None


def to_rgb(image: Image.Image) -> Image.Image:
    """The image in 8 bits, gray where it is gray, else RGB.

    CMYK and YCCK, which Adobe stores inverted, are read as PIL reads them. Transparency is dropped. Of 16 bits the
    upper 8 are kept: PIL does the same to 16-bit RGB as it reads it, and cuts 16-bit gray off at 255 if left to.

    Raises:
        Unsupported: its pixels have no one meaning in 8 bits.
    """
    _check_mode(image.mode)
    if image.mode in ("L", "RGB"):
        return image
    if image.mode == "1":
        return image.convert("L")
    if image.mode in _SIXTEEN_BIT:
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    image.info.pop("transparency", None)  # PIL warns of it where it is dropped
    return image.convert("RGB")


def in_common(content: memoryview) -> bool:
    """Whether DALI's decoders give the pixels of `decode` and `to_rgb`, by all that was tried.

    These are JPEGs in gray, YCbCr or RGB with Huffman coding, PNGs of up to 8 bits per channel, WebP without frames.
    """
    start = bytes(content[:32])
    if start.startswith(_JPEG):
        kind, bits, components = _jpeg_frame(content) or (0, 0, 0)
        return kind in _HUFFMAN and bits == 8 and components in (1, 3)
    if start.startswith(_PNG):
        return start[24] <= 8
    return start.startswith(_RIFF) and not (start[12:16] == b"VP8X" and start[20] & 2)


def _jpeg_frame(content: memoryview) -> tuple[int, int, int] | None:
    """A JPEG's kind of frame (the marker's code), its bits and its number of components; None where none is found."""
    place, end = 2, len(content) - 10
    while place < end and content[place] == 0xFF:
        marker = content[place + 1]
        if marker == 0xFF:  # filling
            place += 1
        elif 0xC0 <= marker <= 0xCF and marker not in _NO_FRAMES:
            return marker, content[place + 4], content[place + 9]
        else:
            place += 2 + (content[place + 2] << 8 | content[place + 3])
    return None


def netpbm(content: bytes, width: int, height: int) -> bytes:
    """An image's pixels as `to_rgb` gives them, uncompressed: a PGM or PPM file, which DALI decodes.

    Raises:
        NotAnImage: as `decode` and `to_rgb`, or the size is not the one that is expected.
    """
    try:
        image = to_rgb(decode(content, max_pixels=width * height))
    except TooLarge as error:
        raise NotAnImage(f"has more pixels than the {width} x {height} that were indexed") from error
    if image.size != (width, height):
        raise NotAnImage(f"has {image.width} x {image.height} pixels, indexed as {width} x {height}")
    return b"P%d %d %d 255\n" % (5 if image.mode == "L" else 6, width, height) + image.tobytes()


def encode(image: Image.Image, quality: int) -> bytes:
    """A gray or RGB image as a baseline JPEG with 4:2:0 chroma, without any metadata."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality, optimize=False, exif=b"", icc_profile=None)
    return buffer.getvalue()


def shrink(image: Image.Image, shorter_side: int) -> Image.Image:
    """A gray or RGB image with its shorter side reduced to `shorter_side` pixels (Lanczos); smaller ones stay."""
    short = min(image.size)
    if short <= shorter_side:
        return image
    width, height = (max(1, round(side * shorter_side / short)) for side in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS)
