"""Layers are found by structure in any Hugging Face decoder."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from lwo_dist.errors import UserError
from lwo_dist.layers import Layer, find_layers, find_stack, parameter_depths, rest_names

LLAMA = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 40,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT = {
    "n_embd": 16,
    "n_layer": 3,
    "n_head": 2,
    "vocab_size": 40,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FALCON = {key: value for key, value in LLAMA.items() if key != "intermediate_size"}
NEOX = {key: value for key, value in LLAMA.items() if key != "num_key_value_heads"}
OPT = {
    "hidden_size": 16,
    "ffn_dim": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "vocab_size": 40,
    "word_embed_proj_dim": 8,
}
FAMILIES = {
    "qwen2": LLAMA,
    "qwen3": LLAMA | {"head_dim": 8},
    "llama": LLAMA,
    "mistral": LLAMA,
    "starcoder2": LLAMA,
    "gemma2": LLAMA | {"head_dim": 8},
    "phi": LLAMA,
    "falcon": FALCON,
    "gpt_neox": NEOX,
    "opt": OPT,
    "gpt2": GPT,
    "gpt_bigcode": GPT,
    "bloom": {"hidden_size": 16, "n_layer": 3, "n_head": 2, "vocab_size": 40},
    "codegen": GPT | {"rotary_dim": 4},
    "mixtral": LLAMA | {"num_local_experts": 4},
    "qwen2_moe": LLAMA
    | {"num_experts": 4, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8},
    "mamba": {"hidden_size": 16, "num_hidden_layers": 3, "vocab_size": 40},
}


def make(family: str, **more: object) -> nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(
        AutoConfig.for_model(family, **FAMILIES[family], **more)
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_of_every_family_is_in_one_layer(family: str) -> None:
    model = make(family)
    layers = find_layers(model)
    names = [name for layer in layers for name in layer.parameter_names]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    inner = [layer for layer in layers if layer.name.startswith("layer_")]
    assert [layer.name for layer in inner] == ["layer_0", "layer_1", "layer_2"]
    assert [layer.depth for layer in inner] == [1, 2, 3]
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert [layer.name for layer in layers if layer not in inner] == (
        ["embed_head"] if tied else ["embed", "head"]
    )
    assert rest_names(model, layers) == [
        name for name, _ in model.named_buffers() if name in model.state_dict()
    ]


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "codegen", "phi"])
def test_the_head_holds_the_final_norm(family: str) -> None:
    head = find_layers(make(family))[-1]
    model = make(family)
    _, stack = find_stack(model)
    outside = {
        n for n, p in model.named_parameters() if not any(p is q for q in stack.parameters())
    }
    embedding = {n for n, p in model.named_parameters() if p is model.get_input_embeddings().weight}
    assert set(head.parameter_names) == outside - embedding and len(head.parameter_names) >= 2


def test_what_is_not_trained_is_rest() -> None:
    model = make("llama", tie_word_embeddings=False)
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
    model = make("llama", tie_word_embeddings=False)
    model.model.layers[2] = model.model.layers[0]
    assert [layer.name for layer in find_layers(model)] == ["embed", "layer_0-2", "layer_1", "head"]
    assert find_layers(model)[1].depth == 1


def test_names_are_padded_so_that_they_sort() -> None:
    model = make("llama")
    model.model.layers.extend(
        model.model.layers[0].__class__(model.config, i) for i in range(3, 12)
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


def test_no_stack_and_no_decoder_are_refused() -> None:
    with pytest.raises(UserError, match="has no stack of layers"):
        find_layers(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)))
    t5 = AutoConfig.for_model(
        "t5", d_model=16, d_ff=32, num_layers=2, num_heads=2, d_kv=8, vocab_size=40
    )
    from transformers import AutoModelForSeq2SeqLM

    with pytest.raises(UserError, match="encoder-decoder"):
        find_layers(AutoModelForSeq2SeqLM.from_config(t5))
