"""Checks that a saved state fits this model and these layers, before anything is changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .errors import UserError
from .layers import Layer
from .names import clean_name, named_tensors
from .strategies import MOMENTS, Moments

__all__ = ["moments_by_layer", "refuse_moments", "refuse_strangers", "whole_shapes"]

_KEYS = ("step", "active_layer", "skipped_steps", "moments")


def moments_by_layer(
    state: Mapping[str, Any], layers: Sequence[Layer], module: nn.Module
) -> dict[str, Moments]:
    """The moments of `LWO.state_dict` by layer name.

    Raises:
        UserError: a key is missing, or the moments belong to other layers or another model.
    """
    missing = [key for key in _KEYS if key not in state]
    if missing:
        raise UserError(
            f"the state has no {missing[0]!r}; give what LWO.state_dict() returned: "
            f"{', '.join(_KEYS)}"
        )
    owner = {name: layer for layer in layers for name in layer.parameter_names}
    by_layer: dict[str, Moments] = {}
    moments = {clean_name(name): kinds for name, kinds in state["moments"].items()}
    for name, kinds in moments.items():
        if name not in owner:
            raise UserError(
                f"the state has moments of {name!r}, which is in none of the trained layers; "
                "resume with the model and the layers that it was saved with"
            )
        by_layer.setdefault(owner[name].name, {})[name] = kinds
    for layer in layers:
        refuse_moments(layer, by_layer.get(layer.name, {}), module)
    return by_layer


def refuse_moments(layer: Layer, moments: Moments, module: nn.Module) -> None:
    """Raise UserError unless `moments` is empty or covers exactly the parameters of the layer."""
    odd = sorted(set(moments) ^ set(layer.parameter_names)) if moments else []
    if odd:
        is_missing = odd[0] in layer.parameter_names
        raise UserError(
            f"the moments of layer {layer.name!r} do not fit: {odd[0]} is "
            f"{'missing' if is_missing else 'not in it'}; resume with the layers that the state "
            "was saved with"
        )
    for name, kinds in moments.items():
        if set(kinds) != {"step", *MOMENTS}:
            raise UserError(
                f"the moments of {name!r} are {', '.join(sorted(kinds))}; give step, "
                f"{' and '.join(MOMENTS)}, as LWO.read_moments returns them"
            )
    for kind in MOMENTS:
        shapes = {name: kinds[kind].shape for name, kinds in moments.items()}
        refuse_strangers("moments", shapes, module)


def refuse_strangers(what: str, shapes: Mapping[str, torch.Size], module: nn.Module) -> None:
    """Raise UserError for a name the module does not have, or one with a different shape."""
    own = whole_shapes(module) if shapes else {}
    for name, shape in shapes.items():
        if name not in own:
            raise UserError(
                f"the {what} name {name!r}, which this {type(module).__name__} does not have; "
                "give those of the same model"
            )
        if tuple(shape) != tuple(own[name]):
            raise UserError(
                f"the {what} of {name!r} have shape {tuple(shape)}, and the model's is "
                f"{tuple(own[name])}; give those of the same model"
            )


def whole_shapes(module: nn.Module) -> dict[str, torch.Size]:
    """Unsharded shapes of parameters and buffers; a tied tensor appears under each of its names."""
    tensors = named_tensors(module).items()
    return {name: getattr(tensor, "ds_shape", tensor.shape) for name, tensor in tensors}
