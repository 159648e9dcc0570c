"""How a layer is distributed across ranks. Builders: `lwo_dist.registry.STRATEGIES`."""

from .base import Moments, Strategy, StrategyBuilder, Update

__all__ = ["Moments", "Strategy", "StrategyBuilder", "Update"]
