"""What `lwo.suffix_backward` must equal: layer-wise training in one process that drops sublayers by
the definition, in plain torch. Written for the Qwen2 of `oracle.tiny_model`.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from tests import oracle

INCREMENT = 1e-4
LARGEST = 0.9


def forward(
    model: nn.Module,
    tokens: Tensor,
    dropped: Collection[int],
    see: Callable[[int, Tensor], None] = lambda place, tensor: None,
) -> Tensor:
    """Logits, with the gradient of the `dropped` sublayers stopped: 2 i is the attention of layer
    i, 2 i + 1 its MLP. `see` gets each sublayer's output, and the input of the first layer as the
    last place.
    """
    qwen = model.model
    hidden = qwen.embed_tokens(tokens)
    positions = torch.arange(tokens.shape[1])[None]
    rotary = qwen.rotary_emb(hidden, positions)
    see(2 * len(qwen.layers), hidden)
    for i, layer in enumerate(qwen.layers):
        branches = (
            lambda x, layer=layer: layer.self_attn(
                layer.input_layernorm(x), position_embeddings=rotary, attention_mask=None
            )[0],
            lambda x, layer=layer: layer.mlp(layer.post_attention_layernorm(x)),
        )
        for place, branch in zip((2 * i, 2 * i + 1), branches, strict=True):
            added = branch(hidden)
            see(place, added)
            hidden = hidden + (added.detach() if place in dropped else added)
    logits: Tensor = model.lm_head(qwen.norm(hidden))
    return logits


def loss_sum(model: nn.Module, tokens: Tensor, labels: Tensor, *rest: object) -> Tensor:
    logits = forward(model, tokens, *rest)[:, :-1]  # type: ignore[arg-type]
    return cross_entropy(
        logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum"
    )


def changes(
    model: nn.Module, tokens: Tensor, labels: Tensor, candidates: Sequence[int]
) -> dict[int, list[float]]:
    """Of each candidate, the squared change of the gradients' norms when it alone is dropped."""

    def norms(dropped: Collection[int]) -> list[float]:
        seen: dict[int, Tensor] = {}

        def see(place: int, tensor: Tensor) -> None:
            if tensor.requires_grad:
                tensor.retain_grad()
                seen[place] = tensor

        loss_sum(model, tokens, labels, dropped, see).backward()
        model.zero_grad()
        return [
            float(seen[place].grad.norm()) if place in seen and seen[place].grad is not None else 0
            for place in range(2 * len(model.model.layers) + 1)
        ]

    whole = norms(())
    return {i: [(a - b) ** 2 for a, b in zip(whole, norms((i,)), strict=True)] for i in candidates}


def allot(costs: Mapping[int, float], flops: Sequence[float], share: float) -> dict[int, float]:
    """DropBP's greedy allotment: always raise the rate that is cheapest to raise."""
    rates = dict.fromkeys(costs, 0.0)
    if not any(costs.values()):
        return dict.fromkeys(costs, 1.0 - share)
    largest = max(LARGEST, 1.0 - share)
    to_drop = (1.0 - share) * sum(flops[i] for i in costs)
    while to_drop > 1e-9:  # or rounding asks for more than there is
        able = [i for i in rates if rates[i] + INCREMENT <= largest + 1e-9]
        cheapest = min(able, key=lambda i: costs[i] * (rates[i] + INCREMENT))
        rates[cheapest] += INCREMENT
        to_drop -= INCREMENT * flops[cheapest]
    return rates


@dataclass(frozen=True)
class Rule:
    share: float
    seed: int = 0
    drops_trained: bool = False


def train(
    model: nn.Module, layers: list[tuple[str, ...]], recipe: oracle.Recipe, rule: Rule
) -> tuple[list[float], list[set[int]]]:
    """Train in place, in ascending order; returns the losses and what each step dropped."""
    parameters = dict(model.named_parameters())
    depth = len(model.model.layers)
    own = [_names(model, place) for place in range(2 * depth)]
    flops = _flops(model)
    measured: dict[int, list[float]] | None = None
    losses, choices = [], []
    for step in range(recipe.steps):
        if step % recipe.steps_per_layer == 0:
            active = set(layers[step // recipe.steps_per_layer % len(layers)])
            for name, parameter in parameters.items():
                parameter.requires_grad_(name in active)
                parameter.grad = None
            mine = [parameters[name] for name in parameters if name in active]
            optimizer = torch.optim.AdamW(mine, lr=recipe.lr, eps=recipe.eps, weight_decay=0.01)
        lowest = min(_depth(name, depth) for name in active)
        suffix = [
            place
            for place in range(2 * depth)
            if rule.drops_trained or (place // 2 + 1 > lowest and not own[place] & active)
        ]
        tokens, labels = oracle.global_batch(step)
        dropped: set[int] = set()
        if measured is None:
            measured = changes(model, tokens, labels, suffix)
        else:
            reached = [place for place in range(2 * depth) if own[place] & active]
            reached += [2 * depth] if lowest == 0 else []
            costs = {i: math.fsum(measured[i][j] for j in reached) for i in suffix}
            rates = allot(costs, flops, rule.share)
            numbers = random.Random(f"{rule.seed}/suffix/{step}")
            draws = [numbers.random() for _ in range(2 * depth)]
            dropped = {i for i in suffix if draws[i] < rates[i]}
        loss = loss_sum(model, tokens, labels, dropped) / (labels[:, 1:] != -100).sum()
        loss.backward()
        for parameter in mine:  # in a dropped sublayer
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if recipe.max_grad_norm:
            nn.utils.clip_grad_norm_(mine, recipe.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        choices.append(dropped)
    return losses, choices


def _names(model: nn.Module, place: int) -> set[str]:
    part = f"model.layers.{place // 2}.{('self_attn', 'mlp')[place % 2]}."
    return {name for name, _ in model.named_parameters() if name.startswith(part)}


def _depth(name: str, depth: int) -> int:
    parts = name.split(".")
    if parts[1] == "layers":
        return int(parts[2]) + 1
    return 0 if "embed" in name else depth + 1


def _flops(model: nn.Module, tokens: int = 12) -> list[float]:
    """Of the backward pass of each sublayer, for a token: frozen matrices, and 5 products of the
    attention's scores, two of whose forward pass are 2 operations for each pair and channel.
    """
    config = model.config
    hidden, head = config.hidden_size, config.hidden_size // config.num_attention_heads
    groups = config.num_key_value_heads
    matrices = 2 * (2 * hidden * hidden + 2 * hidden * groups * head)
    scores = 5 * 2 * tokens * hidden
    mlp = 2 * 3 * hidden * config.intermediate_size
    return [float(x) for x in (matrices + scores, mlp)] * len(model.model.layers)
