"""What kind of image a file is, told by its first bytes."""

START = 16  # bytes that tell
DECODED = ("JPEG", "PNG", "BMP", "TIFF", "WEBP")
_BRANDS = {b"avif": "AVIF", b"avis": "AVIF", b"heic": "HEIC", b"heix": "HEIC", b"mif1": "HEIC", b"msf1": "HEIC"}
_MAGIC = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000"),
    (b"\xff\x4f\xff\x51", "JPEG 2000"),
    (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL"),
    (b"8BPS\0\x01", "PSD"),
)


def format_of(start: bytes, length: int) -> str | None:
    """The image format of a file of `length` bytes by its first `START` ones; None where they are no image's."""
    for magic, name in _MAGIC:
        if start.startswith(magic):
            return name
    if start[:4] == b"RIFF" and start[8:12] == b"WEBP":
        return "WEBP"
    if start[:2] == b"BM" and int.from_bytes(start[2:6], "little") in (0, length) and start[6:10] == bytes(4):
        return "BMP"  # two letters alone would take a text for an image
    if start[4:8] == b"ftyp":
        return _BRANDS.get(start[8:12])
    return None


def not_decoded(start: bytes) -> str | None:
    """The name of an image format that is known and not decoded; None for all else."""
    name = format_of(start, -1)
    return None if name in DECODED else name
