"""Whether a model keeps the examples of a packed sequence apart."""

from __future__ import annotations

from typing import Any

import torch

from lwo_dist.errors import UserError
from lwo_dist.hook import LWO

__all__ = ["check_packing"]

_TOKENS = 4
# Relative. Masked tokens add exactly nothing; but of experts, other tokens may change the rounding.
_CARRIED = {"fp32": 1e-5, "bf16": 5e-3}
# Elsewhere in a sequence kernels may sum in another order.
_MOVED = {"fp32": 1e-3, "bf16": 5e-2}


@torch.no_grad()
def check_packing(lwo: LWO, device: torch.device, *, precision: str) -> None:
    """Refuse a model whose logits for an example depend on what precedes it in a packed sequence.

    One forward of three short sequences: A B, C B and B A. An example at the start of a sequence
    sees nothing else, so its logits there are those of the example alone. A collective where a
    forward is one.

    Args:
        precision: the model computes in this, "fp32" or "bf16".

    Raises:
        UserError: on all ranks. The model takes no position ids, or attends across examples, or
            carries a state over.
    """
    model: Any = lwo.module
    rows = model.get_input_embeddings().num_embeddings
    draw = torch.Generator().manual_seed(0)
    a, b, c = torch.randint(rows, (3, _TOKENS), generator=draw)
    input_ids = torch.stack([torch.cat(pair) for pair in ((a, b), (c, b), (b, a))]).to(device)
    position_ids = torch.arange(_TOKENS, device=device).repeat(3, 2)
    training = model.training
    model.eval()
    try:
        logits = model(input_ids=input_ids, position_ids=position_ids).logits.double()
    except TypeError as error:
        if "position_ids" not in str(error):
            raise
        raise _refusal(model, "takes no position_ids") from None
    finally:
        model.train(training)
    b_after_a, b_after_c, b_alone = logits[0, _TOKENS:], logits[1, _TOKENS:], logits[2, :_TOKENS]
    spread = (b_alone - b_alone.mean(dim=0)).norm(dim=-1).mean()
    carried = ((b_after_a - b_after_c).norm(dim=-1).max() / spread).item()
    moved = ((b_after_a - b_alone).norm(dim=-1).max() / spread).item()
    if not (carried <= _CARRIED[precision] and moved <= _MOVED[precision]):
        raise _refusal(
            model,
            "does not keep the examples of a sequence apart: the logits of one differ by"
            f" {max(carried, moved):.2g} (relative) from those of the example alone",
        )


def _refusal(model: Any, why: str) -> UserError:
    return UserError(
        f"train.packing: {type(model).__name__} {why}; set train.packing: false for this model"
    )
