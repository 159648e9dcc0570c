"""A tiny Hugging Face folder: a byte-level tokenizer trained on the given texts, a Qwen2 or an
encoder-decoder of random weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)


def save_tiny_model(
    folder: Path, texts: Sequence[str], *, tied: bool = True, vocabulary: int = 384
) -> None:
    tokenizer = _tokenizer(texts, vocabulary)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n")


def save_tiny_encoder_decoder(folder: Path, texts: Sequence[str], family: str) -> None:
    """A T5, whose texts end with a token, or a BART, whose texts also begin with one."""
    tokenizer = _tokenizer(texts, 384, begin="<begin>" if family == "bart" else "")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    shape = {"vocab_size": len(tokenizer), "d_model": 32}
    special = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model: PreTrainedModel
    if family == "t5":
        start = {"decoder_start_token_id": tokenizer.pad_token_id}
        model = T5ForConditionalGeneration(
            T5Config(
                **shape,
                **special,
                **start,
                d_ff=64,
                d_kv=8,
                num_layers=2,
                num_heads=4,
            )
        )
    else:
        start = {"decoder_start_token_id": tokenizer.eos_token_id}
        model = BartForConditionalGeneration(
            BartConfig(
                **shape,
                **special,
                **start,
                bos_token_id=tokenizer.bos_token_id,
                encoder_layers=2,
                decoder_layers=2,
                encoder_attention_heads=4,
                decoder_attention_heads=4,
                encoder_ffn_dim=64,
                decoder_ffn_dim=64,
                max_position_embeddings=256,
            )
        )
    model.save_pretrained(folder)


def _tokenizer(
    texts: Sequence[str], vocabulary: int, begin: str | None = None
) -> PreTrainedTokenizerFast:
    """`begin`: texts have it before and the end of text after them; None: they have neither."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "<end>", *([begin] if begin else [])]
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocabulary, special_tokens=special, initial_alphabet=alphabet
        ),
    )
    if begin is not None:
        bpe.post_processor = processors.TemplateProcessing(
            f"{begin} $A <end>".strip(),
            special_tokens=[(token, bpe.token_to_id(token)) for token in special[1:]],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<pad>", eos_token="<end>", bos_token=begin or None
    )
