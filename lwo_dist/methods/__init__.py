"""Methods: what is trained, and when. `lwo_dist.registry.METHODS` knows them by name."""

from .base import Method

__all__ = ["Method"]
