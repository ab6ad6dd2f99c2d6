"""Numbers in words, the same on every page."""

from __future__ import annotations

NONE = "-"


def two_decimals(value: float | None) -> str:
    """A score with two decimals; a dash for none."""
    return NONE if value is None else f"{value:.2f}"


def span(interval: tuple[float, float], *, signed: bool = False) -> str:
    """An interval in words."""
    low, high = (f"{end:+.2f}" if signed else f"{end:.2f}" for end in interval)
    return f"{low} to {high}"


def short_count(count: float | None) -> str:
    """A large number with a unit, three digits or four; a dash for none."""
    if count is None:
        return NONE
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count:,.0f}"


def amount(number: float) -> str:
    """A large number with three digits and a prefix: 1.23 M, 45.6 G."""
    for prefix, unit in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= unit:
            return f"{number / unit:.3g} {prefix}"
    return f"{number:.3g}"


def duration(seconds: float) -> str:
    """Seconds as a person says them."""
    if seconds < 100:
        return f"{seconds:.3g} s"
    whole = round(seconds)
    return f"{whole // 60} min {whole % 60} s" if whole < 6000 else f"{whole // 3600} h {whole % 3600 // 60} min"


def readable(value: object) -> str:
    """A value as a person writes it: thousands separated, four digits that count."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value)
