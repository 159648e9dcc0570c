"""Amounts as Kubernetes writes them."""

from __future__ import annotations

import re
from decimal import Decimal

__all__ = ["quantity"]

_UNITS = {
    "": 1,
    "k": 10**3,
    "M": 10**6,
    "G": 10**9,
    "T": 10**12,
    "Ki": 2**10,
    "Mi": 2**20,
    "Gi": 2**30,
    "Ti": 2**40,
}


def quantity(text: str | int) -> Decimal:
    """500m is 0.5, 2Gi is 2147483648."""
    match = re.fullmatch(r"([0-9.]+)(m|[kMGT]i?|)", str(text))
    if match is None:
        raise ValueError(f"{text!r} is no quantity")
    return Decimal(match[1]) / 1000 if match[2] == "m" else Decimal(match[1]) * _UNITS[match[2]]
