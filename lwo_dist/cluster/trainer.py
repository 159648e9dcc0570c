"""Ray Train's trainer, with Ctrl-C left to us. Imports Ray at the top: import it inside a
function.
"""

from __future__ import annotations

import contextlib
from typing import Any

import ray
from ray.train.torch import TorchTrainer

__all__ = ["Trainer"]

_ABORT_S = 5


class Trainer(TorchTrainer):  # type: ignore[misc]
    """At Ctrl-C, Ray 2.60 would end the workers without asking them to save."""

    _controller: Any = None

    def abort(self) -> None:
        """End the workers at once, also while Ray waits for room and does not answer."""
        if self._controller is None:
            return
        with contextlib.suppress(Exception):
            ray.get(self._controller.abort.remote(), timeout=_ABORT_S)
        with contextlib.suppress(Exception):
            ray.kill(self._controller)

    def _register_sigint_handler(self, controller: Any) -> None:
        self._controller = controller
