"""A parameter's name, whatever wrappers are around the layer it is in.

`torch.compile(layer)` and torch's `checkpoint_wrapper` return a module around the layer, which is
then in the names of its parameters: `layers.0._orig_mod.mlp.weight`. Layers, saved weights and
moments use the name without it, so that a run can go on with other wrappers, or none.
"""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["clean_name", "named_parameters", "named_tensors"]

_WRAPPERS = {"_orig_mod", "_checkpoint_wrapped_module"}


def clean_name(name: str) -> str:
    """`name` without the parts that wrappers insert."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """As `model.named_parameters()`: a tied parameter appears once, under its first name."""
    return {clean_name(name): parameter for name, parameter in model.named_parameters()}


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers, themselves; a tied one under each of its names."""
    tensors = model.state_dict(keep_vars=True)
    return {clean_name(name): tensor for name, tensor in tensors.items()}
