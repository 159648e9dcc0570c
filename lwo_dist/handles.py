"""Handles of hooks, which torch returns where one is registered."""

from __future__ import annotations

from typing import Any

__all__ = ["remove"]


def remove(handles: list[Any]) -> None:
    """Take all of these hooks out, and forget them."""
    for handle in handles:
        handle.remove()
    handles.clear()
