"""Formats durations, speeds, metrics, bytes and lists of names the same way everywhere."""

import re

_BYTES = re.compile(r"(\d+(?:\.\d+)?) ?([KMGT]?B)?")
_UNITS = {None: 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def duration(seconds: float) -> str:
    """Formats seconds as `42s`, `3m07s` or `5h03m`."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 1:
        return f"{rest}s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s"


def speed(img_per_s: float) -> str:
    """Formats images per second: no decimals from 100 on, else one."""
    return f"{img_per_s:,.0f} img/s" if img_per_s >= 100 else f"{img_per_s:.1f} img/s"


def number(value: float | None) -> str:
    """Formats a number with four decimals; None as `-`."""
    return "-" if value is None else f"{value:.4f}"


def join_names(names: list[str], word: str = "or") -> str:
    """Joins names as `a, b or c`."""
    return f" {word} ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def format_bytes(count: float) -> str:
    """Formats a number of bytes: `138.2 GB`, `4.0 MB`."""
    for unit in ("bytes", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def parse_bytes(text: str) -> int:
    """Returns the bytes in a text such as `200GB`, `1.5TB` or `4000`, in decimal units as `format_bytes`.

    Raises:
        ValueError: it is not a number of bytes.
    """
    match = _BYTES.fullmatch(text)
    if match is None:
        raise ValueError(f"{text} is not a number of bytes: use for example 200GB or 1.5TB (KB, MB, GB, TB: decimal)")
    return round(float(match[1]) * _UNITS[match[2]])
