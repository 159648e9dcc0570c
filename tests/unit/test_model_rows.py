"""What a model has no rows for: positions and tokens beyond its embeddings are refused."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    CodeGenConfig,
    CodeGenForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MptConfig,
    MptForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    Qwen2ForCausalLM,
)

from lwo_dist.config import ModelConfig
from lwo_dist.data.examples import LineTokenizer, pad_id
from lwo_dist.errors import UserError
from lwo_dist.models import (
    check_model,
    load_tokenizer,
    refuse_long_sequences,
    refuse_tokens,
)
from tests.code_samples import END_OF_TEXT, make_tokenizer
from tests.prepared import prepared
from tests.unit import test_models
from tests.unit.test_models import edit_config

folder = test_models.folder
GPT2 = {"vocab_size": 400, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 48}
MPT = {"vocab_size": 400, "d_model": 16, "n_layers": 2, "n_heads": 2, "max_seq_len": 48}
OPT = {
    "vocab_size": 400,
    "hidden_size": 16,
    "ffn_dim": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "word_embed_proj_dim": 16,
    "max_position_embeddings": 48,
}


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (GPT2LMHeadModel, GPT2Config(**GPT2)),
        (CodeGenForCausalLM, CodeGenConfig(**GPT2, rotary_dim=4)),  # a buffer
        (OPTForCausalLM, OPTConfig(**OPT)),  # two more rows than positions
        (MptForCausalLM, MptConfig(**MPT)),  # ALiBi of a fixed length
    ],
)
def test_a_sequence_longer_than_the_positions_of_the_model(
    tmp_path: Path, kind: type[PreTrainedModel], settings: Any
) -> None:
    model = kind(settings)
    model.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    config = ModelConfig(name=str(tmp_path))
    check_model(config, 48)
    refuse_long_sequences("x", model, 48)
    for check in (lambda: check_model(config, 49), lambda: refuse_long_sequences("x", model, 49)):
        with pytest.raises(
            UserError, match=r"train.sequence_length = 49 is more than the 48 positions of .*set it"
        ):
            check()
    with pytest.raises((IndexError, RuntimeError)), torch.no_grad():
        model(input_ids=torch.ones(1, 49, dtype=torch.int64))


def test_a_model_that_computes_its_positions_takes_any_length(folder: Path) -> None:
    edit_config(folder, max_position_embeddings=16, vocab_size=400)
    make_tokenizer().save_pretrained(folder)
    check_model(ModelConfig(name=str(folder)), 64)


def save_tokenizer(folder: Path, **added: Any) -> int:
    """One with these tokens more than the model has rows; returns the number of rows."""
    tokenizer = pickle.loads(pickle.dumps(make_tokenizer()))
    rows = len(tokenizer)
    tokenizer.add_tokens(added.pop("words", []))
    tokenizer.add_special_tokens(added)
    tokenizer.save_pretrained(folder)
    edit_config(folder, vocab_size=rows)
    return rows


@pytest.mark.parametrize(
    ("added", "first"),
    [
        ({"pad_token": "[PAD]"}, "[PAD]"),
        ({"words": ["return", "self"]}, "return"),
        ({"eos_token": "<|im_end|>"}, "<|im_end|>"),
    ],
)
def test_a_token_that_the_embedding_has_no_row_for(
    folder: Path, added: dict[str, Any], first: str
) -> None:
    rows = save_tokenizer(folder, **added)
    with pytest.raises(UserError) as caught:
        check_model(ModelConfig(name=str(folder)))
    assert f"{first!r} ({rows}), and its embedding only {rows} rows; use" in str(caught.value)


def test_special_tokens_beyond_the_embedding_are_not_used(folder: Path) -> None:
    marker = "<|fim_prefix|>"
    rows = save_tokenizer(folder, extra_special_tokens=[marker], pad_token=END_OF_TEXT)
    tokenizer = load_tokenizer(ModelConfig(name=str(folder)))
    assert tokenizer.convert_tokens_to_ids(marker) == rows
    assert pad_id(tokenizer) < rows
    assert max(LineTokenizer(tokenizer)(f"x = '{marker}'\n").tokens) < rows


def test_an_example_with_a_token_that_the_embedding_has_no_row_for(folder: Path) -> None:
    data = prepared([3, 40])
    assert data.highest_token == 2039
    model = Qwen2ForCausalLM.from_pretrained(folder)
    refuse_tokens("m", model, 30)
    with pytest.raises(UserError, match=r"hold the token 31, .* 'm' has only 31 rows; call"):
        refuse_tokens("m", model, 31)
