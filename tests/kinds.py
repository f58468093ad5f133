"""Image files of every format that PIL and DALI decode, with the expected pixels, and unsupported ones."""

import io
import struct
import zlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms

from tests.data.synthetic import ycck

WIDTH, HEIGHT = 61, 50
_RNG = np.random.default_rng(0)
_NOISE = _RNG.integers(0, 256, (6, 6, 3), np.uint8)
RGB = Image.fromarray(_NOISE).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
GRAY = RGB.convert("L")
OTHER = RGB.transpose(Image.Transpose.ROTATE_180)
GRAY_16 = _RNG.integers(0, 65536, (HEIGHT, WIDTH)).astype(np.uint16)
RGB_16 = _RNG.integers(0, 65536, (HEIGHT, WIDTH, 3)).astype(np.uint16)
ALPHA = Image.fromarray(_RNG.integers(0, 256, (HEIGHT, WIDTH), np.uint8))
TURNED = Image.Exif()
TURNED[0x0112] = 6


@dataclass(frozen=True)
class Kind:
    """An image file and its expected pixels [H, W, 3]: PIL's conversion, with some exceptions."""

    content: bytes
    pixels_HWC: NDArray[np.uint8]


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.copy().save(buffer, kind, **options)  # a copy: saving stores settings in the image
    return buffer.getvalue()


def with_alpha(mode: str) -> Image.Image:
    image = RGB.convert(mode)
    image.putalpha(ALPHA)
    return image


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(depth: int, color: int, values: NDArray[np.integer], before: bytes = b"") -> bytes:
    """A PNG of `depth` bits per sample and a color type, with other chunks `before` its data; values [H, W, ...]."""
    if depth < 8:
        bits = (values[..., None] >> np.arange(depth - 1, -1, -1) & 1).astype(np.uint8)
        rows = list(np.packbits(bits.reshape(HEIGHT, -1), axis=1))
    else:
        rows = list(values.astype(">u2" if depth == 16 else np.uint8).reshape(HEIGHT, -1))
    data = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    head = struct.pack(">IIBBBBB", WIDTH, HEIGHT, depth, color, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + before + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def tiff(values: NDArray[np.generic], meaning: int, sample_format: int = 1, order: str = "<") -> bytes:
    """An uncompressed TIFF of one strip; `meaning` is the tag PhotometricInterpretation."""
    data = values.astype(values.dtype.newbyteorder(order)).tobytes()
    samples = values.shape[2] if values.ndim == 3 else 1
    tags = {
        256: [WIDTH],
        257: [HEIGHT],
        258: [values.dtype.itemsize * 8] * samples,
        259: [1],
        262: [meaning],
        273: [8],
        277: [samples],
        278: [HEIGHT],
        279: [len(data)],
        339: [sample_format] * samples,
    }
    offset = 8 + len(data) + 2 + 12 * len(tags) + 4
    entries, beyond = b"", b""
    for tag, numbers in tags.items():
        kind, letter = (4, "I") if tag in (273, 279) else (3, "H")
        value = struct.pack(order + letter * len(numbers), *numbers)
        if len(value) > 4:
            value, beyond = struct.pack(order + "I", offset + len(beyond)), beyond + value
        entries += struct.pack(order + "HHI", tag, kind, len(numbers)) + value.ljust(4, b"\0")
    directory = struct.pack(order + "H", len(tags)) + entries + bytes(4) + beyond
    magic = b"II*\0" if order == "<" else b"MM\0*"
    return magic + struct.pack(order + "I", 8 + len(data)) + data + directory


def _three(gray_HW: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.repeat(gray_HW[..., None], 3, axis=2)


def _files() -> dict[str, bytes]:
    levels = {depth: _RNG.integers(0, 2**depth, (HEIGHT, WIDTH)) for depth in (1, 2, 4, 8)}
    palettes = {depth: chunk(b"PLTE", _RNG.integers(0, 256, 3 * 2**depth, np.uint8).tobytes()) for depth in levels}
    pixels = np.asarray(RGB)
    found = {
        f"{kind} {image.mode}": encoded(image, kind)
        for kind in ("JPEG", "PNG", "WEBP", "TIFF", "BMP")
        for image in (RGB, GRAY)
    }
    found |= {f"JPEG, subsampling {s}": encoded(RGB, "JPEG", subsampling=s) for s in (0, 1, 2, "4:1:1")}
    found |= {
        "JPEG, progressive": encoded(RGB, "JPEG", progressive=True),
        "JPEG, stored as RGB": encoded(RGB, "JPEG", keep_rgb=True),
        "JPEG, restart marks": encoded(RGB, "JPEG", restart_marker_blocks=2),
        "JPEG CMYK": encoded(RGB.convert("CMYK"), "JPEG"),
        "JPEG YCCK": ycck(RGB),
        "JPEG, turned by EXIF": encoded(RGB, "JPEG", exif=TURNED),
        "MPO of two": encoded(RGB, "MPO", save_all=True, append_images=[OTHER.copy()]),
    }
    found |= {f"PNG gray {depth} bits": png(depth, 0, levels[depth]) for depth in levels}
    found |= {f"PNG palette {depth} bits": png(depth, 3, levels[depth], palettes[depth]) for depth in levels}
    found |= {
        "PNG palette, transparent": png(8, 3, levels[8], palettes[8] + chunk(b"tRNS", bytes(range(256)))),
        "PNG gray, one transparent": png(8, 0, levels[8], chunk(b"tRNS", b"\0\x10")),
        "PNG RGB, one transparent": png(8, 2, pixels, chunk(b"tRNS", b"\0\x10\0\x10\0\x10")),
        "PNG RGB, gamma": png(8, 2, pixels, chunk(b"gAMA", struct.pack(">I", 100_000))),
        "PNG RGB, a long text": png(8, 2, pixels, chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(3_000_000)))),
        "PNG RGB, a long profile": png(8, 2, pixels, chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(3_000_000)))),
        "PNG LA": encoded(with_alpha("L"), "PNG"),
        "PNG RGBA": encoded(with_alpha("RGB"), "PNG"),
        "PNG gray 16 bits": png(16, 0, GRAY_16),
        "PNG LA 16 bits": png(16, 4, RGB_16[..., :2]),
        "PNG RGB 16 bits": png(16, 2, RGB_16),
        "PNG RGBA 16 bits": png(16, 6, RGB_16[..., [0, 1, 2, 0]]),
        "PNG of two": encoded(RGB, "PNG", save_all=True, append_images=[OTHER.copy()]),
        "WEBP RGBA": encoded(with_alpha("RGB"), "WEBP"),
        "WEBP RGBA, lossless": encoded(with_alpha("RGB"), "WEBP", lossless=True, exact=True),
        "WEBP of two": encoded(RGB, "WEBP", save_all=True, append_images=[OTHER.copy()]),
        "BMP 1": encoded(RGB.convert("1"), "BMP"),
        "BMP palette": encoded(RGB.convert("P"), "BMP"),
        "BMP RGBA": encoded(with_alpha("RGB"), "BMP"),
    }
    found |= {f"TIFF {mode}": encoded(RGB.convert(mode), "TIFF") for mode in ("1", "P", "CMYK", "YCbCr")}
    found |= {f"TIFF {mode}": encoded(with_alpha(mode[:-1] or mode), "TIFF") for mode in ("LA", "RGBA")}
    found |= {
        f"TIFF, {how}": encoded(RGB.convert("1") if "group" in how else RGB, "TIFF", compression=how)
        for how in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg", "group3", "group4", "lzma", "zstd")
    }
    found |= {f"TIFF gray 16 bits {order}": tiff(GRAY_16, 1, order=order) for order in "<>"}
    found |= {f"TIFF RGB 16 bits {order}": tiff(RGB_16, 2, order=order) for order in "<>"}
    return found | {
        "TIFF, white is 0": tiff(np.asarray(GRAY), 0),
        "TIFF of two": encoded(RGB, "TIFF", save_all=True, append_images=[OTHER.copy()]),
        "TIFF, turned by EXIF": encoded(RGB, "TIFF", exif=TURNED),
    }


def _kind(name: str, content: bytes) -> Kind:
    if "gray 16" in name:
        return Kind(content, _three((GRAY_16 >> 8).astype(np.uint8)))
    if "LA 16" in name:
        return Kind(content, _three((RGB_16[..., 0] >> 8).astype(np.uint8)))
    if "16 bits" in name:
        return Kind(content, (RGB_16 >> 8).astype(np.uint8))
    if name == "TIFF, turned by EXIF":
        return Kind(content, np.asarray(RGB))
    if "a long" in name:
        return Kind(content, np.asarray(RGB))
    with Image.open(io.BytesIO(content)) as image:
        image.info.pop("transparency", None)
        return Kind(content, np.asarray(image.convert("RGB")))


def _twelve_bits() -> bytes:
    content = bytearray(encoded(RGB, "JPEG"))
    content[content.index(b"\xff\xc0") + 4] = 12
    return bytes(content)


KINDS = {name: _kind(name, content) for name, content in _files().items()}
_LAB = ImageCms.profileToProfile(RGB, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB")
assert _LAB is not None
REFUSED = {  # with the expected error message
    "TIFF 32 bits": (tiff(GRAY_16.astype(np.uint32), 1), "PIL's mode I"),
    "TIFF 16 bits with a sign": (tiff(GRAY_16, 1, sample_format=2), "PIL's mode I"),
    "TIFF floats": (tiff((GRAY_16 / 65535).astype(np.float32), 1, sample_format=3), "PIL's mode F"),
    "TIFF RGB floats": (
        tiff((RGB_16 / 65535).astype(np.float32), 2, sample_format=3),
        "is a TIFF with pixels of a kind",
    ),
    "TIFF LAB": (encoded(_LAB, "TIFF"), "PIL's mode LAB"),
    "JPEG of 12 bits": (_twelve_bits(), "is a JPEG of 12 bits"),
}
UNKNOWN = {kind: encoded(RGB, kind) for kind in ("GIF", "PPM", "JPEG2000", "AVIF")}
