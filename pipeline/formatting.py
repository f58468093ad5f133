"""Figures in words, the same wherever they are shown."""


def duration(seconds: float) -> str:
    """Seconds as `42s`, `3m07s` or `5h03m`."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 1:
        return f"{rest}s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s"


def speed(img_per_s: float) -> str:
    """Images per second: whole ones from 100 on, else with one decimal."""
    return f"{img_per_s:,.0f} img/s" if img_per_s >= 100 else f"{img_per_s:.1f} img/s"


def number(value: float | None) -> str:
    """Four decimals; `-` where there is none."""
    return "-" if value is None else f"{value:.4f}"
