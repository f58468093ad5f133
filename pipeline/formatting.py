"""Formats durations, speeds, metrics and lists of names the same way everywhere."""


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
