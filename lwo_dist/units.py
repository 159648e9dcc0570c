"""Bytes, counts and times as people read them. Every line, page and picture formats them here."""

from __future__ import annotations

__all__ = ["byte_unit", "human_bytes", "human_count", "human_seconds"]

_BYTE_UNITS = (("B", 1), ("KB", 10**3), ("MB", 10**6), ("GB", 10**9), ("TB", 10**12))


def byte_unit(size: float) -> tuple[str, int]:
    """The largest decimal unit that `size` bytes fill, and its bytes.

    >>> byte_unit(24_000_000_000)
    ('GB', 1000000000)
    """
    fitting = [unit for unit in _BYTE_UNITS if unit[1] <= max(abs(size), 1)]
    return fitting[-1]


def human_bytes(size: float) -> str:
    """`size` bytes in decimal units, as on the label of a disk or a GPU: 1 GB = 10^9 bytes.

    >>> human_bytes(1_340_000_000)
    '1.3 GB'
    """
    name, factor = byte_unit(size)
    count = size / factor
    digits = 0 if count >= 100 or name == "B" else 1
    return f"{count:.{digits}f} {name}"


def human_count(count: float) -> str:
    """`count` with three digits and a decimal prefix.

    >>> human_count(148_000_000), human_count(1.25e15)
    ('148 M', '1.25 P')
    """
    for prefix, factor in (("P", 10**15), ("T", 10**12), ("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= factor:
            return f"{count / factor:.3g} {prefix}"
    return f"{count:.3g}"


def human_seconds(seconds: float) -> str:
    """A duration in its two largest units.

    >>> human_seconds(3725)
    '1h02m'
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02}m"
    if minutes:
        return f"{minutes}m{rest:02}s"
    return f"{rest}s"
