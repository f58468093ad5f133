"""Image files: header checks, decoding, conversion to 8-bit gray or RGB. Formats follow from content, not from names.

`to_rgb` defines the conversion of pixels for training, evaluation, `prepare`, `stats` and `predict`. DALI decodes the
files for which `dali_matches_pil` is true; PIL decodes all others, and DALI gets them as `to_netpbm`. The packaged
model (`pipeline/export/pyfunc_model.py`) has a copy of the conversion; a test over all formats and code paths checks
that both are equal.
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

from pipeline.config_data import MAX_PIXELS
from pipeline.data.formats import SUPPORTED_FORMATS, unsupported_format

# By magic number. Not `Image.open`: it rejects large images by its own limit before their size is known.
_READERS: dict[bytes, type[ImageFile.ImageFile]] = {
    b"\xff\xd8": JpegImageFile,
    b"\x89PNG\r\n\x1a\n": PngImageFile,
    b"BM": BmpImageFile,
    b"II*\0": TiffImageFile,
    b"MM\0*": TiffImageFile,
    b"RIFF": WebPImageFile,
}
_JPEG, _PNG, *_, _RIFF = _READERS
HEAD = 1 << 16  # bytes that nearly always include an image's size
TAIL = 4096  # maximum number of bytes after a JPEG's end marker
_JPEG_MODES = {"Gray": "L", "GRAY": "L", "YCbCr": "RGB", "RGB": "RGB", "CMYK": "CMYK", "YCCK": "CMYK"}
_SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I;16N")
_CONVERTED_BY_PIL = ("P", "PA", "LA", "La", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr")  # to RGB
_SUPPORTED_MODES = ("L", "RGB", "1", *_SIXTEEN_BIT, *_CONVERTED_BY_PIL)
_UNSUPPORTED = {
    "I": "32-bit integers",
    "F": "floating-point numbers",
    "LAB": "CIE L*a*b* colors",
    "HSV": "HSV colors",
}
_FIX = "convert it to an 8-bit JPEG or PNG"
_ORIENTATION = 0x0112
_UNDO_ORIENTATION = {  # inverse of each EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
_HUFFMAN_FRAMES = (0xC0, 0xC1, 0xC2)  # baseline, extended and progressive JPEG; other frames are arithmetic or lossless
_TEXT_CHUNKS = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")  # PNG chunks of texts and color profiles
_MAX_TILE_PIXELS = 1 << 24  # of a TIFF, allowed whatever the limit: tiles may be larger than the image
_NOT_FRAMES = (0xC4, 0xC8, 0xCC)  # markers of tables in the range of frame markers
# What PIL raises for corrupt files.
_CORRUPTION = (OSError, ValueError, SyntaxError, LookupError, TypeError, ArithmeticError, struct.error)
_HARMLESS_WARNING = "extraneous bytes"  # libjpeg's warning about bytes between two complete segments


@dataclass(frozen=True)
class Header:
    """An image's format, size in pixels as stored (EXIF orientation not applied), and PIL mode."""

    format: str
    width: int
    height: int
    mode: str

    @property
    def plain_jpeg(self) -> bool:
        """Whether the file needs no conversion: a JPEG in gray, YCbCr or RGB."""
        return self.format == "JPEG" and self.mode in ("L", "RGB")


class NotAnImage(ValueError):
    """An image cannot be used; the message follows its name: `is a truncated JPEG`."""


class Unsupported(NotAnImage):
    """The image is complete, but its pixels have no unique conversion to 8 bits."""


class TooLarge(NotAnImage):
    """The image has more pixels than the limit."""


def check_size(width: int, height: int, max_pixels: int, what: str = "") -> None:
    """Raises `TooLarge` if an image has more pixels than `max_pixels`."""
    if width * height > max_pixels:
        raise TooLarge(
            f"has {what}{width:,} x {height:,} pixels, more than the limit of {max_pixels:,} (data.max_pixels in "
            f"training, --max-pixels of `densenet data`, max_pixels in a model's card)"
        )


@contextmanager
def ignore_pil_warnings() -> Iterator[None]:
    """Suppresses PIL's warnings about invalid EXIF blocks and large images.

    Python has one list of warning filters for all threads: enter this before starting threads, not in them.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def format_problem(start: bytes, end: bytes) -> str | None:
    """Checks magic number and end marker, in the first 16 and the last `TAIL` bytes; returns the problem, or None."""
    if not start.startswith(tuple(_READERS)):
        unsupported = unsupported_format(start)
        if unsupported is not None:
            known = ", ".join(SUPPORTED_FORMATS)
            return (
                f"is a {unsupported} file, which is not an image of a known format ({known}): convert it to JPEG or PNG"
            )
        seen = f"it begins with {start[:16].decode('latin-1')!r}" if start else "it is empty"
        return f"is not an image of a known format ({', '.join(SUPPORTED_FORMATS)}); {seen}"
    if start.startswith(_JPEG) and b"\xff\xd9" not in end[-TAIL:]:
        return "is a truncated JPEG"
    if start.startswith(_PNG) and b"IEND" not in end[-TAIL:]:
        return "is a truncated PNG"
    return None


def header(content: bytes, end: bytes) -> Header:
    """Reads an image's header without decoding it.

    Args:
        content: the image, or its first bytes.
        end: its last `TAIL` bytes, or the whole image.

    Raises:
        NotAnImage: it is not an image of a supported format, it is truncated, or its pixel format is unsupported.
    """
    problem = format_problem(content[:16], end)
    if problem is not None:
        raise NotAnImage(problem)
    _, bits, _ = (content.startswith(_JPEG) and _jpeg_frame(memoryview(content))) or (0, 8, 0)
    if bits != 8:
        raise Unsupported(f"is a JPEG of {bits} bits: {_FIX}")
    try:
        height, width, colors, _ = simplejpeg.decode_jpeg_header(content)
        return Header("JPEG", width, height, _JPEG_MODES[colors])
    except (ValueError, KeyError):
        pass  # another format, or a JPEG that only PIL reads, at fifteen times the cost
    try:
        with _open(content) as image:
            width, height = _stored_size(image)
            found = Header(str(image.format), width, height, image.mode)
    except Image.DecompressionBombError as error:
        raise TooLarge(f"is larger than PIL takes in this format: {error}") from error
    except _CORRUPTION as error:
        if "unknown pixel mode" in str(error):  # from PIL's TIFF reader
            raise Unsupported(f"is a TIFF with pixels of a kind that PIL does not know: {_FIX}") from error
        raise NotAnImage(f"has a corrupt header: {error}") from error
    _check_mode(found.mode)
    return found


def _open(content: bytes) -> ImageFile.ImageFile:
    """Opens an image of a supported format with PIL; reads the header only."""
    reader = next(reader for magic, reader in _READERS.items() if content.startswith(magic))
    return reader(io.BytesIO(_strip_text_chunks(content) if reader is PngImageFile else content))


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


def _stored_size(image: ImageFile.ImageFile) -> tuple[int, int]:
    """Returns width and height as stored; PIL applies the orientation to TIFF only."""
    if isinstance(image, TiffImageFile):
        return image.tag_v2[IMAGEWIDTH], image.tag_v2[IMAGELENGTH]
    return image.size


def _check_sizes(image: ImageFile.ImageFile, max_pixels: int) -> None:
    """Checks the sizes of an image and of a TIFF's tiles, which are decoded whole, against the limit."""
    check_size(*_stored_size(image), max_pixels)
    if isinstance(image, TiffImageFile) and TILEWIDTH in image.tag_v2 and TILELENGTH in image.tag_v2:
        check_size(image.tag_v2[TILEWIDTH], image.tag_v2[TILELENGTH], max(max_pixels, _MAX_TILE_PIXELS), "tiles of ")


def _check_mode(mode: str) -> None:
    if mode not in _SUPPORTED_MODES:
        raise Unsupported(f"has pixels of PIL's mode {mode} ({_UNSUPPORTED.get(mode, 'unknown')}): {_FIX}")


def decode(content: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decodes an image as stored (EXIF orientation not applied); of several frames or pages, the first.

    Raises:
        NotAnImage: it cannot be decoded completely; or a JPEG's data are corrupt or incomplete, which most decoders
            ignore and fill with gray; or it has more than `max_pixels`.
    """
    problem = format_problem(content[:16], content)
    if problem is not None:
        raise NotAnImage(problem)
    try:
        image = _open(content)
        _check_sizes(image, max_pixels)
        if image.format == "JPEG" and image.mode in ("L", "RGB"):
            try:
                return Image.fromarray(_decode_strict(content, image.mode))
            except ValueError as error:
                if (_HARMLESS_WARNING not in str(error) and "orrupt" in str(error)) or "remature" in str(error):
                    raise NotAnImage(f"cannot be decoded: {error}") from error
        orientation_code = image.getexif().get(_ORIENTATION) if isinstance(image, TiffImageFile) else None
        image.load()
        return image.transpose(_UNDO_ORIENTATION[orientation_code]) if orientation_code in _UNDO_ORIENTATION else image
    except NotAnImage:
        raise
    except Image.DecompressionBombError as error:
        raise TooLarge(f"is larger than PIL takes in this format: {error}") from error
    except _CORRUPTION as error:
        raise NotAnImage(f"cannot be decoded: {error}") from error


def _decode_strict(content: bytes, mode: str) -> NDArray[np.uint8]:
    """Decodes a JPEG to PIL's pixels; raises ValueError also where libjpeg only warns."""
    pixels = simplejpeg.decode_jpeg(content, "GRAY" if mode == "L" else "RGB", strict=True)
    return pixels[..., 0] if mode == "L" else pixels


def orientation(content: bytes) -> int | None:
    """Returns the EXIF orientation (1: upright); None if there is none or the EXIF block is corrupt."""
    try:
        with _open(content) as image:
            value = image.getexif().get(_ORIENTATION)
    except Exception:  # PIL raises any exception for corrupt EXIF, and EXIF is optional
        return None
    return value if isinstance(value, int) else None


def to_rgb(image: Image.Image) -> Image.Image:
    """Converts an image to 8 bits: gray images stay gray, all others become RGB.

    CMYK and YCCK, which Adobe stores inverted, are converted as in PIL. Transparency is dropped. Of 16 bits the upper
    8 are kept: PIL does the same for 16-bit RGB, but would clip 16-bit gray at 255.

    Raises:
        Unsupported: its pixels have no unique conversion to 8 bits.
    """
    _check_mode(image.mode)
    if image.mode in ("L", "RGB"):
        return image
    if image.mode == "1":
        return image.convert("L")
    if image.mode in _SIXTEEN_BIT:
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    image.info.pop("transparency", None)  # PIL warns when it drops transparency
    return image.convert("RGB")


def dali_matches_pil(content: memoryview) -> bool:
    """Whether DALI's decoders give the same pixels as `decode` and `to_rgb`; determined by experiment.

    These are JPEGs in gray, YCbCr or RGB with Huffman coding, PNGs of up to 8 bits per channel, and WebP without
    animation.
    """
    start = bytes(content[:32])
    if start.startswith(_JPEG):
        kind, bits, components = _jpeg_frame(content) or (0, 0, 0)
        return kind in _HUFFMAN_FRAMES and bits == 8 and components in (1, 3)
    if start.startswith(_PNG):
        return start[24] <= 8
    return start.startswith(_RIFF) and not (start[12:16] == b"VP8X" and start[20] & 2)


def _jpeg_frame(content: memoryview) -> tuple[int, int, int] | None:
    """Returns a JPEG's frame marker, bits per sample and number of components; None if there is no frame header."""
    offset, end = 2, len(content) - 10
    while offset < end and content[offset] == 0xFF:
        marker = content[offset + 1]
        if marker == 0xFF:  # padding
            offset += 1
        elif 0xC0 <= marker <= 0xCF and marker not in _NOT_FRAMES:
            return marker, content[offset + 4], content[offset + 9]
        else:
            offset += 2 + (content[offset + 2] << 8 | content[offset + 3])
    return None


def to_netpbm(content: bytes, width: int, height: int) -> bytes:
    """Converts an image with `to_rgb` to an uncompressed PGM or PPM file, which DALI decodes.

    Raises:
        NotAnImage: as `decode` and `to_rgb`, or the image's size differs from `width` x `height`.
    """
    try:
        image = to_rgb(decode(content, max_pixels=width * height))
    except TooLarge as error:
        raise NotAnImage(f"has more pixels than the {width} x {height} in the index") from error
    if image.size != (width, height):
        raise NotAnImage(f"has {image.width} x {image.height} pixels, but {width} x {height} in the index")
    return b"P%d %d %d 255\n" % (5 if image.mode == "L" else 6, width, height) + image.tobytes()


def encode(image: Image.Image, quality: int) -> bytes:
    """Encodes a gray or RGB image as a baseline JPEG with 4:2:0 chroma subsampling, without metadata."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality, optimize=False, exif=b"", icc_profile=None)
    return buffer.getvalue()


def shrink(image: Image.Image, shorter_side: int) -> Image.Image:
    """Downscales a gray or RGB image to a shorter side of `shorter_side` pixels (Lanczos); never upscales."""
    short = min(image.size)
    if short <= shorter_side:
        return image
    width, height = (max(1, round(side * shorter_side / short)) for side in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS)
