"""Layer-wise optimisation (LWO) of code models on clusters: one layer trained at a time.

lwo = lwo_dist.attach(model, lwo_dist.LWOConfig(lr=1e-5, steps_per_layer=50))
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .config import LWOConfig
from .errors import UserError

if TYPE_CHECKING:
    from .hook import LWO, StepReport, attach, prepare

__all__ = ["LWO", "LWOConfig", "StepReport", "UserError", "attach", "prepare"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # The hook brings torch with it; `lwo-dist --help` does not wait for that.
    if name in ("LWO", "StepReport", "attach", "prepare"):
        from . import hook

        return getattr(hook, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
