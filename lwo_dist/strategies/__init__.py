"""How a layer lives on the ranks. `lwo_dist.registry.STRATEGIES` knows the builders by name."""

from .base import MOMENTS, Moments, Strategy, StrategyBuilder, Update

__all__ = ["MOMENTS", "Moments", "Strategy", "StrategyBuilder", "Update"]
