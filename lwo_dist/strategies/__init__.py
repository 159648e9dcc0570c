"""How a layer lives on the ranks. `lwo_dist.registry.STRATEGIES` knows the builders by name."""

from .base import Moments, Strategy, StrategyBuilder, Update

__all__ = ["Moments", "Strategy", "StrategyBuilder", "Update"]
