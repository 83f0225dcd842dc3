"""Numbers as people read them."""

from __future__ import annotations

import math

__all__ = ["as_bytes", "as_count", "as_duration", "as_figure", "as_percent", "as_setting"]


def as_figure(value: float | None, digits: int = 4) -> str:
    """So many significant digits, without an exponent where that is readable: 0.1230, 16.13, 1,705."""
    if value is None:
        return "n/a"
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    if not 1e-4 <= abs(value) < 1e6:
        return f"{value:.{digits - 1}e}"
    magnitude = math.floor(math.log10(float(f"{abs(value):.{digits}g}")))  # of what is shown: 9.996 is shown as 10.00
    return f"{value:,.{max(digits - 1 - magnitude, 0)}f}"


def as_percent(share: float | None, digits: int = 1) -> str:
    """A fraction in per cent."""
    return "n/a" if share is None else f"{100 * share:.{digits}f}%"


def as_bytes(size: float) -> str:
    """In MB or GB, of powers of ten, as the Hub counts."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.{0 if size >= 1e8 else 1}f} MB"


def as_duration(seconds: float) -> str:
    """Such as 0.4 s, 27 s, 3 min 05 s, 2 h 10 min."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def as_count(number: float) -> str:
    """Such as 134.5 M or 8.03 B parameters."""
    for unit, size in ((" B", 1e9), (" M", 1e6), (" k", 1e3)):
        if number >= size:
            return f"{number / size:.4g}{unit}"
    return f"{number:.0f}"


def as_setting(value: object) -> str:
    """A setting's value on one line."""
    if isinstance(value, list | tuple):
        return ", ".join(as_setting(part) for part in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)
