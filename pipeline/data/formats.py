"""Image formats, detected by a file's first bytes (magic numbers)."""

SIGNATURE_BYTES = 16  # length of the start of a file that identifies its format
SUPPORTED_FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP")
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


def detect_format(start: bytes, length: int) -> str | None:
    """Returns the image format of a file of `length` bytes from its first `SIGNATURE_BYTES`; None: not an image."""
    for magic, name in _MAGIC:
        if start.startswith(magic):
            return name
    if start[:4] == b"RIFF" and start[8:12] == b"WEBP":
        return "WEBP"
    if start[:2] == b"BM" and int.from_bytes(start[2:6], "little") in (0, length) and start[6:10] == bytes(4):
        return "BMP"  # the two letters alone could be text
    if start[4:8] == b"ftyp":
        return _BRANDS.get(start[8:12])
    return None


def unsupported_format(start: bytes) -> str | None:
    """Returns the name of a known image format that is not supported; None for all other files."""
    name = detect_format(start, -1)
    return None if name in SUPPORTED_FORMATS else name
