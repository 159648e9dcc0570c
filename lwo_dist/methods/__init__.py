"""Methods: what is trained, and when. Registered by name in `lwo_dist.registry.METHODS`."""

from .base import Method, Saved

__all__ = ["Method", "Saved"]
