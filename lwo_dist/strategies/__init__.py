"""How a layer is distributed across ranks. Builders: `lwo_dist.registry.STRATEGIES`."""

from .base import MOMENTS, Moments, Strategy, StrategyBuilder, Update

__all__ = ["MOMENTS", "Moments", "Strategy", "StrategyBuilder", "Update"]
