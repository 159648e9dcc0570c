"""Layer-wise optimisation (LWO): one layer of a model is trained at a time.

The training loop, whole:

    lwo = lwo_dist.attach(model, lwo_dist.LWOConfig(steps_per_layer=10))
    for batch in batches:
        lwo.backward(lwo.model(**batch).loss)
        lwo.step()
    lwo.flush()

This needs torch and pydantic only. What the command line needs besides are extras of the package:
`lwo_dist.extras`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .config import LWOConfig
from .errors import UserError

if TYPE_CHECKING:
    from .hook import LWO, StepReport, attach, prepare
    from .layers import Layer
    from .losses import causal_lm_loss

__all__ = [
    "LWO",
    "LWOConfig",
    "Layer",
    "StepReport",
    "UserError",
    "__version__",
    "attach",
    "causal_lm_loss",
    "prepare",
]
__version__ = "0.1.0"

# These bring torch with them, which `lwo-dist --help` does not wait for: imported at first use.
_LAZY = {
    "LWO": "lwo_dist.hook",
    "Layer": "lwo_dist.layers",
    "StepReport": "lwo_dist.hook",
    "attach": "lwo_dist.hook",
    "causal_lm_loss": "lwo_dist.losses",
    "prepare": "lwo_dist.hook",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
