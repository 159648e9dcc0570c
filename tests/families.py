"""Tiny models of every family that the package is tried with, and the table of them.

All have random weights, and none a tensor of zeros or ones, which could hide a mistake.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from lwo_dist.layers import find_layers, find_stacks

__all__ = ["DECODERS", "ENCODER_DECODERS", "FAMILIES", "loss_sum", "make", "make_empty", "table"]

VOCABULARY = 67


def _without(settings: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name not in names}


TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
    **TOKENS,
}
GPT2 = {
    "n_embd": 32,
    "n_layer": 4,
    "n_head": 4,
    "vocab_size": VOCABULARY,
    "n_positions": 64,
    "initializer_range": 0.1,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MOE = {"moe_intermediate_size": 16}
DEEPSEEK = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
BART = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "init_std": 0.1,
    **TOKENS,
}
T5 = {
    "d_model": 32,
    "d_ff": 48,
    "d_kv": 8,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "num_heads": 4,
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
    "dropout_rate": 0.1,
}

DECODERS: dict[str, dict[str, Any]] = {
    "bamba": LLAMA
    | {
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_d_state": 8,
        "mamba_n_groups": 1,
        "attn_layer_indices": [1],
        "mamba_chunk_size": 8,
        "head_dim": 8,
    },
    "blenderbot-small": BART | {"tie_word_embeddings": False},
    "bloom": {"hidden_size": 32, "n_layer": 4, "n_head": 4, "vocab_size": VOCABULARY},
    "codegen": GPT2 | {"rotary_dim": 4},
    "cohere": LLAMA,
    "cohere2": LLAMA | {"sliding_window": 8},
    "dbrx": {
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 4,
        "vocab_size": VOCABULARY,
        "max_seq_len": 64,
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
    },
    "deepseek_v2": LLAMA | MOE | DEEPSEEK,
    "deepseek_v3": LLAMA | MOE | DEEPSEEK,
    "ernie": _without(LLAMA, "num_key_value_heads") | {"is_decoder": True},
    "ernie4_5": LLAMA | {"head_dim": 8},
    "ernie4_5_moe": LLAMA | MOE | {"moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1},
    "exaone4": LLAMA | {"sliding_window": 8},
    "falcon": _without(LLAMA, "intermediate_size"),
    "falcon_h1": LLAMA
    | {
        "mamba_d_ssm": 64,
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_d_state": 8,
        "mamba_n_groups": 1,
        "mamba_chunk_size": 8,
        "head_dim": 8,
    },
    "falcon_mamba": {
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "vocab_size": VOCABULARY,
        "state_size": 8,
        "pad_token_id": 0,
    },
    "gemma": LLAMA | {"head_dim": 8},
    "gemma2": LLAMA | {"head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8},
    "gemma3_text": LLAMA | {"head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8},
    "gemma3n_text": LLAMA
    | {
        "head_dim": 8,
        "sliding_window": 8,
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 8,
        "num_kv_shared_layers": 2,
        "laurel_rank": 4,
        "intermediate_size": [48] * 4,
        "activation_sparsity_pattern": [0.0] * 4,
    },
    "gemma4_text": LLAMA
    | {
        "head_dim": 8,
        "sliding_window": 8,
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 8,
        "num_kv_shared_layers": 2,
        "global_head_dim": 8,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "glm4": LLAMA | {"head_dim": 8},
    "glm4_moe": LLAMA
    | MOE
    | {
        "head_dim": 8,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
    },
    "gpt2": GPT2,
    "gpt_bigcode": GPT2,
    "gpt_neo": {
        "hidden_size": 32,
        "num_layers": 4,
        "num_heads": 4,
        "vocab_size": VOCABULARY,
        "attention_types": [[["global", "local"], 2]],
        "window_size": 8,
        "max_position_embeddings": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "gpt_neox": _without(LLAMA, "num_key_value_heads"),
    "gpt_oss": LLAMA
    | {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8},
    "gptj": GPT2 | {"rotary_dim": 4},
    "granite": LLAMA,
    "granitemoe": LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "granitemoehybrid": LLAMA
    | {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 16,
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_d_state": 8,
        "mamba_n_groups": 1,
        "layer_types": ["mamba", "attention", "mamba", "mamba"],
    },
    "hunyuan_v1_dense": LLAMA | {"head_dim": 8},
    "jamba": LLAMA
    | {
        "num_experts": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "use_mamba_kernels": False,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
    },
    "jetmoe": LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2, "kv_channels": 8},
    "lfm2": LLAMA | {"full_attn_idxs": [1], "block_multiple_of": 16},
    "llama": LLAMA,
    "llama4_text": LLAMA
    | {
        "head_dim": 8,
        "intermediate_size_mlp": 48,
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 2,
        "attention_chunk_size": 8,
        "moe_layers": [1, 3],
        "use_qk_norm": True,
    },
    "mamba": {
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "vocab_size": VOCABULARY,
        "state_size": 8,
        "pad_token_id": 0,
    },
    "mamba2": {
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "vocab_size": VOCABULARY,
        "state_size": 8,
        "num_heads": 8,
        "head_dim": 8,
        "n_groups": 1,
        "chunk_size": 8,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "minimax": LLAMA | {"num_local_experts": 4, "head_dim": 8, "block_size": 8},
    "mistral": LLAMA | {"sliding_window": 8},
    "mixtral": LLAMA | {"num_local_experts": 4},
    "mpt": {
        "d_model": 32,
        "n_layers": 4,
        "n_heads": 4,
        "vocab_size": VOCABULARY,
        "max_seq_len": 64,
    },
    "nemotron": LLAMA,
    "nemotron_h": LLAMA
    | {
        "layers_block_type": ["mamba", "attention", "moe", "mamba"],
        "ssm_state_size": 8,
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "n_groups": 1,
        "chunk_size": 8,
        "head_dim": 8,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "moe_shared_expert_intermediate_size": 16,
        "n_group": 1,
        "topk_group": 1,
    },
    "olmo2": LLAMA,
    "olmo3": LLAMA | {"sliding_window": 8},
    "olmoe": LLAMA | {"num_experts": 4, "num_experts_per_tok": 2},
    "opt": {
        "hidden_size": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "vocab_size": VOCABULARY,
        "word_embed_proj_dim": 16,
        "max_position_embeddings": 64,
        "init_std": 0.1,
        "pad_token_id": 0,
    },
    "phi": LLAMA,
    "phi3": LLAMA,
    "phimoe": LLAMA | {"num_local_experts": 4},
    "qwen2": LLAMA,
    "qwen2_moe": LLAMA
    | MOE
    | {"num_experts": 4, "num_experts_per_tok": 2, "shared_expert_intermediate_size": 16},
    "qwen3": LLAMA | {"head_dim": 8},
    "qwen3_5_text": LLAMA
    | {
        "head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "full_attention_interval": 2,
    },
    "qwen3_moe": LLAMA
    | MOE
    | {
        "head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [0],
    },
    "qwen3_next": LLAMA
    | MOE
    | {
        "head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "shared_expert_intermediate_size": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "full_attention_interval": 2,
    },
    "recurrent_gemma": LLAMA | {"lru_width": 32, "attention_window_size": 8},
    "seed_oss": LLAMA | {"head_dim": 8},
    "smollm3": LLAMA,
    "stablelm": LLAMA,
    "starcoder2": LLAMA,
    "xlm": {
        "emb_dim": 32,
        "n_layers": 3,
        "n_heads": 4,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 64,
        "causal": True,
        "tie_word_embeddings": False,
        **TOKENS,
    },
    "zamba": LLAMA
    | {
        "num_hidden_layers": 6,
        "num_key_value_heads": 4,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
        "n_mamba_heads": 2,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "use_mamba_kernels": False,
        "attention_head_dim": 16,
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid", "mamba", "hybrid"],
    },
    "zamba2": LLAMA
    | {
        "num_hidden_layers": 6,
        "num_key_value_heads": 4,
        "mamba_d_state": 8,
        "mamba_d_conv": 4,
        "n_mamba_heads": 4,
        "mamba_headdim": 16,
        "mamba_ngroups": 1,
        "num_mem_blocks": 2,
        "hybrid_layer_ids": [2, 4, 5],
        "layers_block_type": ["mamba", "mamba", "hybrid", "mamba", "hybrid", "hybrid"],
        "use_mamba_kernels": False,
        "adapter_rank": 4,
        "chunk_size": 8,
    },
}
ENCODER_DECODERS: dict[str, dict[str, Any]] = {
    "bart": BART,
    "marian": BART | {"decoder_vocab_size": VOCABULARY, "decoder_start_token_id": 0},
    "mbart": BART,
    "mt5": T5,
    "pegasus": BART,
    "plbart": BART,
    "t5": T5,
    "umt5": T5,
}
FAMILIES = DECODERS | ENCODER_DECODERS
"""`config.model_type` -> the settings of a tiny model."""


def make(family: str, dtype: torch.dtype = torch.float32, **more: Any) -> nn.Module:
    """In eval mode, and equal at every call."""
    torch.manual_seed(0)
    model = _build(family, **more)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() < 2 or parameter.std() == 0:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model.to(dtype).eval()


def make_empty(family: str) -> nn.Module:
    """On the meta device."""
    with torch.device("meta"):
        model = _build(family)
    model.tie_weights()
    return model


def _build(family: str, **more: Any) -> Any:
    config = AutoConfig.for_model(family, **(FAMILIES[family] | more))
    config.use_cache = False
    auto = AutoModelForSeq2SeqLM if family in ENCODER_DECODERS else AutoModelForCausalLM
    # The fused kernels for experts take no float64.
    return auto.from_config(config, experts_implementation="eager")


def loss_sum(model: Any, tokens: Tensor) -> Tensor:
    """Summed cross-entropy of [sequences, length] tokens, each from those before it.

    An encoder-decoder has them reversed as its input.
    """
    if getattr(model, "module", model).config.is_encoder_decoder:
        logits = model(input_ids=tokens.flip(1), decoder_input_ids=tokens).logits
    else:
        logits = model(input_ids=tokens).logits
    predicted = logits[:, :-1].flatten(0, 1)
    return cross_entropy(predicted, tokens[:, 1:].flatten(), reduction="sum")


def table() -> str:
    """A row for each family."""
    rows = [
        "| `model_type` | layers are in | embedding and head | share parameters |",
        "|---|---|---|---|",
    ]
    for family in sorted(FAMILIES):
        model = make_empty(family)
        names = [layer.name for layer in find_layers(model)]
        stacks = ", ".join(f"`{stack.path}`" for stack in find_stacks(model))
        tied = "tied" if "embed_head" in names else "apart"
        joined = ", ".join(f"`{name}`" for name in names if "-" in name)
        rows.append(f"| `{family}` | {stacks} | {tied} | {joined} |")
    return "\n".join(rows)
