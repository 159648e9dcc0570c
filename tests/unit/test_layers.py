"""Layers are found by structure in any Hugging Face decoder or encoder-decoder."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lwo_dist.errors import UserError
from lwo_dist.layers import (
    Layer,
    find_layers,
    find_stacks,
    parameter_depths,
    rest_names,
    separate_layers,
)
from tests.families import FAMILIES, make, make_empty


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_parameter_of_every_family_is_in_one_layer(family: str) -> None:
    model = make_empty(family)
    layers = find_layers(model)
    names = [name for layer in layers for name in layer.parameter_names]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    depths = parameter_depths(model)
    for layer in layers:
        assert layer.depth == min(depths[name] for name in layer.parameter_names)
    inner = [layer for layer in layers if not layer.name.startswith(("embed", "head"))]
    length = sum(len(stack.modules) for stack in find_stacks(model))
    if not family.startswith("zamba"):  # whose shared blocks join layers
        assert [layer.depth for layer in inner] == list(range(1, length + 1))
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert [layer.name for layer in layers if layer not in inner] == (
        ["embed_head"] if tied else ["embed", "head"]
    )
    assert rest_names(model, layers) == [
        name for name, _ in model.named_buffers() if name in model.state_dict()
    ]


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "codegen", "phi"])
def test_the_head_holds_the_final_norm(family: str) -> None:
    model = make_empty(family)
    head = find_layers(model)[-1]
    (stack,) = find_stacks(model)
    inside = {id(p) for p in stack.modules.parameters()}
    outside = {n for n, p in model.named_parameters() if id(p) not in inside}
    embedding = {n for n, p in model.named_parameters() if p is model.get_input_embeddings().weight}
    assert set(head.parameter_names) == outside - embedding and len(head.parameter_names) >= 2


def test_what_is_not_trained_is_rest() -> None:
    model = make("llama", num_hidden_layers=3)
    layers = find_layers(model, train_embeddings=False, train_head=False, layers_per_group=2)
    assert [(layer.name, layer.depth) for layer in layers] == [("layer_0-1", 1), ("layer_2", 3)]
    assert rest_names(model, layers) == [
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",
    ]


def test_half_of_a_tied_matrix_cannot_be_trained() -> None:
    with pytest.raises(UserError, match="one tied matrix; set both alike"):
        find_layers(make("llama", tie_word_embeddings=True), train_head=False)


def test_repeated_layers_are_one_layer() -> None:
    model = make("llama", num_hidden_layers=3)
    model.model.layers[2] = model.model.layers[0]
    assert [layer.name for layer in find_layers(model)] == ["embed", "layer_0-2", "layer_1", "head"]
    assert find_layers(model)[1].depth == 1
    assert separate_layers(model) == [model.model.layers[1]]


def test_layers_with_a_shared_block_are_one_layer() -> None:
    model = make_empty("zamba2")  # two blocks: of the layers 2 and 5, and of the layer 4
    names = ["embed_head", "layer_0", "layer_1", "layer_2-5", "layer_3", "layer_4"]
    assert [layer.name for layer in find_layers(model)] == names
    inner = model.model.layers
    assert separate_layers(model) == [inner[0], inner[1], inner[3], inner[4]]


def test_a_layer_that_shares_with_the_head_is_not_separate() -> None:
    model = make("llama")
    model.lm_head.weight = model.model.layers[1].mlp.up_proj.weight
    inner = model.model.layers
    assert separate_layers(model) == [inner[0], inner[2], inner[3]]


def test_names_are_padded_so_that_they_sort() -> None:
    model = make("llama")
    model.model.layers.extend(
        model.model.layers[0].__class__(model.config, i) for i in range(4, 12)
    )
    assert [layer.name for layer in find_layers(model)][1:3] == ["layer_00", "layer_01"]


def test_a_plain_module_needs_no_hugging_face() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(5, 4)
            self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
            self.out = nn.Linear(4, 5)

    assert find_layers(Plain()) == [
        Layer("embed", ("embedding.weight",), 0),
        Layer("layer_0", ("blocks.0.weight", "blocks.0.bias"), 1),
        Layer("layer_1", ("blocks.1.weight", "blocks.1.bias"), 2),
        Layer("head", ("out.weight", "out.bias"), 3),
    ]
    assert parameter_depths(Plain())["out.bias"] == 3


def test_an_encoder_decoder_is_one_chain() -> None:
    model = make("t5")
    assert [(stack.name, stack.path, stack.first) for stack in find_stacks(model)] == [
        ("encoder", "encoder.block", 1),
        ("decoder", "decoder.block", 3),
    ]
    layers = {layer.name: layer for layer in find_layers(model)}
    chain = ["embed_head", "encoder_0", "encoder_1", "decoder_0", "decoder_1", "decoder_2"]
    assert [(name, layers[name].depth) for name in layers] == list(
        zip(chain, range(6), strict=True)
    )
    # The positions that every layer of a stack uses are those of its first.
    for stack in ("encoder", "decoder"):
        first = layers[f"{stack}_0"].parameter_names
        assert sum("relative_attention_bias" in name for name in first) == 1


def test_the_stacks_of_an_encoder_decoder_are_grouped_apart() -> None:
    layers = find_layers(make("bart"), layers_per_group=2)
    names = ["embed_head", "encoder_0-1", "decoder_0-1", "decoder_2"]
    assert [layer.name for layer in layers] == names
    assert [layer.depth for layer in layers] == [0, 1, 3, 5]


def test_norms_beside_the_stacks_are_below_them() -> None:
    """BART's are registered after the layers and used before them."""
    model = make("bart", tie_word_embeddings=False)
    depths = parameter_depths(model)
    for stack in ("encoder", "decoder"):
        assert depths[f"model.{stack}.layernorm_embedding.weight"] == 0
    assert find_layers(model)[-1] == Layer("head", ("lm_head.weight",), 6)


def test_tied_encoder_and_decoder_layers_are_one_layer() -> None:
    model = make("t5")
    for name in ("q", "k", "v", "o"):
        a, b = (side.block[0].layer[0].SelfAttention for side in (model.encoder, model.decoder))
        getattr(b, name).weight = getattr(a, name).weight
    names = ["embed_head", "encoder_0_decoder_0", "encoder_1", "decoder_1", "decoder_2"]
    assert [layer.name for layer in find_layers(model)] == names


def test_torch_s_own_transformer_is_a_chain() -> None:
    model = nn.Transformer(8, 2, 1, 2, 16, batch_first=True)
    names = ["embed", "encoder_0", "decoder_0", "decoder_1"]
    assert [layer.name for layer in find_layers(model)] == names


class OutOfOrder(nn.Module):
    """Registers all beside its blocks after them, and uses half of it before."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 4)
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.first, self.scale, self.last = nn.LayerNorm(4), nn.Linear(4, 4), nn.LayerNorm(4)
        self.norms = nn.ModuleList(nn.LayerNorm(4) for _ in range(3))
        self.head = nn.Linear(4, 8)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.begin(self.embed(tokens))
        for block, norm in zip(self.blocks, self.norms, strict=True):
            hidden = norm(block(hidden))
        return self.end(hidden)

    def begin(self, hidden: Tensor) -> Tensor:
        return torch.as_tensor(self.scale(self.first(hidden)))

    def end(self, hidden: Tensor) -> Tensor:
        return torch.as_tensor(self.head(self.last(hidden)))


def test_what_is_used_before_the_stack_is_below_it_wherever_it_is_registered() -> None:
    depths = parameter_depths(OutOfOrder())
    below = {name.partition(".")[0] for name, depth in depths.items() if depth == 0}
    above = {name.partition(".")[0] for name, depth in depths.items() if depth == 4}
    assert below == {"embed", "first", "scale", "norms"}
    assert above == {"last", "head"}


def test_a_decoder_has_one_stack() -> None:
    """Even with another list at the same place: checkpoints name its layers."""
    model = make("llama")
    model.draft = nn.Module()
    model.draft.layers = nn.ModuleList([nn.Linear(3, 3)])
    assert [stack.path for stack in find_stacks(model)] == ["model.layers"]


def test_no_stack_and_half_an_encoder_decoder_are_refused() -> None:
    with pytest.raises(UserError, match="has no stack of layers"):
        find_layers(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)))
    model = make("t5")
    model.encoder.block = nn.Sequential(*model.encoder.block)
    with pytest.raises(UserError, match=r"encoder-decoder, but only decoder\.block was found"):
        find_layers(model)
