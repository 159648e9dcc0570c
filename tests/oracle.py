"""What every strategy must equal: layer-wise training in one process, in plain torch, from the
definition.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import Qwen2Config, Qwen2ForCausalLM


@dataclass(frozen=True)
class Recipe:
    steps: int = 25
    steps_per_layer: int = 4
    lr: float = 3e-4
    eps: float = 1e-6
    max_grad_norm: float = 0.0
    accumulation: int = 1


def train(
    model: nn.Module,
    layers: list[tuple[str, ...]],
    recipe: Recipe,
    *,
    keep: bool = False,
    rate: Callable[[int], float] | None = None,
    batch: Callable[[int], int] = lambda step: step,
) -> list[float]:
    """Train in place; returns the loss of each step.

    Args:
        keep: a layer goes on with the optimizer of its last visit, instead of a fresh one.
        rate: the learning rate of each step, instead of `recipe.lr`.
        batch: which batch each step trains on.
    """
    parameters, losses = dict(model.named_parameters()), []
    optimizers: dict[tuple[str, ...], torch.optim.Optimizer] = {}
    for step in range(recipe.steps):
        if step % recipe.steps_per_layer == 0:
            active = layers[step // recipe.steps_per_layer % len(layers)]
            for name, parameter in parameters.items():
                parameter.requires_grad_(name in active)
                parameter.grad = None
            mine = [parameters[name] for name in active]
            if not keep or active not in optimizers:
                optimizers[active] = torch.optim.AdamW(
                    mine, lr=recipe.lr, eps=recipe.eps, weight_decay=0.01
                )
            optimizer = optimizers[active]
        if rate is not None:
            optimizer.param_groups[0]["lr"] = rate(step)
        tokens, labels = global_batch(batch(step))
        loss = loss_sum(model, tokens, labels) / (labels[:, 1:] != -100).sum()
        loss.backward()
        if recipe.max_grad_norm:
            nn.utils.clip_grad_norm_(mine, recipe.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def loss_sum(model: nn.Module, tokens: Tensor, labels: Tensor) -> Tensor:
    logits = model(input_ids=tokens).logits[:, :-1]
    return cross_entropy(
        logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum"
    )


def global_batch(
    step: int, size: int = 8, length: int = 12, vocabulary: int = 61
) -> tuple[Tensor, Tensor]:
    """Tokens and labels; each sequence has its own number of unlabelled positions, so ranks' shares
    differ.
    """
    tokens = torch.randint(
        vocabulary, (size, length), generator=torch.Generator().manual_seed(step)
    )
    labels = tokens.clone()
    for i in range(size):
        labels[i, : 1 + i] = -100
    return tokens, labels


def tiny_model(
    *, tied: bool, dtype: torch.dtype = torch.float32, num_layers: int = 4, seed: int = 0
) -> nn.Module:
    """A Qwen2 whose sizes no world size divides: vocabulary 61, hidden 24, intermediate 50."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=61,
        hidden_size=24,
        intermediate_size=50,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        max_position_embeddings=64,
        initializer_range=0.1,
    )
    return Qwen2ForCausalLM(config).to(dtype)
