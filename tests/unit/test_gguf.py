"""GGUF files: written here with the package gguf from a small model, and read back as a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from lwo_dist.config import ModelConfig
from lwo_dist.driver import prepare
from lwo_dist.errors import UserError
from lwo_dist.models import licence_of
from lwo_dist.models.gguf import dequantise
from tests.code_samples import END_OF_TEXT, code, make_config, tokenizer_of_kind, write_tree


def small_model() -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=400,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            tie_word_embeddings=False,
        )
    )


def write_gguf(path: Path, model: Any, kind: Kind, architecture: str = "qwen2") -> Path:
    """A file as llama.cpp's converter writes it: matrices of `kind`, vectors in fp32."""
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("Small model")
    writer.add_license("apache-2.0")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10_000.0)
    tokenizer = tokenizer_of_kind("qwen2")
    words = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = sorted(words["vocab"], key=words["vocab"].get)
    tokens += [f"[unused{i}]" for i in range(config.vocab_size - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token == END_OF_TEXT else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in words["merges"]])
    writer.add_eos_token_id(tokens.index(END_OF_TEXT))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        array = tensor.numpy()
        here = kind if array.ndim == 2 else Kind.F32
        writer.add_tensor(
            names.get_name(name, (".weight", ".bias")), gguf.quantize(array, here), raw_dtype=here
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("kind", [Kind.F32, Kind.Q8_0])
def test_the_folder_holds_the_file_s_weights_in_fp32(kind: Kind, tmp_path: Path) -> None:
    model = small_model()
    path = write_gguf(tmp_path / "small.gguf", model, kind)
    folder = dequantise(ModelConfig(name=str(path)), tmp_path / "cache")
    found = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    expected = model.state_dict()
    for name, tensor in found.state_dict().items():
        wanted = expected[name].numpy()
        if wanted.ndim == 2:
            wanted = gguf.dequantize(gguf.quantize(wanted, kind), kind)
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(tensor, torch.from_numpy(wanted), rtol=0, atol=0)
    assert len(found.state_dict()) == len(expected)
    settings = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in settings
    assert licence_of(str(folder)) == "apache-2.0"


def test_the_folder_has_the_file_s_tokenizer(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "small.gguf", small_model(), Kind.F32)
    tokenizer = AutoTokenizer.from_pretrained(
        dequantise(ModelConfig(name=str(path)), tmp_path / "cache")
    )
    expected = tokenizer_of_kind("qwen2")
    text = code(1) + "\n\n    x = 'é'\n"
    assert tokenizer(text)["input_ids"] == expected(text)["input_ids"]
    assert tokenizer.eos_token == END_OF_TEXT


def test_it_is_made_once_and_goes_by_the_contents(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_gguf(tmp_path / "small.gguf", small_model(), Kind.F32)
    config, cache = ModelConfig(name=str(path)), tmp_path / "cache"
    first = dequantise(config, cache)
    assert capsys.readouterr().out == "dequantising small.gguf to fp32, once\n"
    assert dequantise(config, cache) == first and first.name.startswith("small-")
    assert capsys.readouterr().out == ""
    write_gguf(path, small_model(), Kind.Q8_0)
    assert dequantise(config, cache) != first


def test_a_run_tunes_it(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "small.gguf", small_model(), Kind.Q8_0)
    source = write_tree(tmp_path / "tree")
    config = make_config(source, tmp_path / "runs", f"model.name={path}", "tracking.enabled=false")
    folder = Path(prepare(config).model.name)
    assert folder.parent == tmp_path / "runs" / "cache" / "models"
    assert (folder / "model.safetensors").is_file()


def _damaged(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:2000])


def _other_format(path: Path) -> None:
    path.write_bytes(b"no model at all" * 100)


def _unknown(path: Path) -> None:
    write_gguf(path, small_model(), Kind.F32, "gptneox9")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (Path.unlink, "is not a file; give the path of a GGUF file"),
        (_damaged, "its GGUF file cannot be read"),
        (_other_format, "its GGUF file cannot be read"),
        (_unknown, "give a decoder that transformers reads from GGUF"),
    ],
)
def test_a_file_that_cannot_be_used(spoil: Any, said: str, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "small.gguf", small_model(), Kind.F32)
    spoil(path)
    with pytest.raises(UserError) as error:
        dequantise(ModelConfig(name=str(path)), tmp_path / "cache")
    message = str(error.value)
    assert said in message and "\n" not in message and str(path) in message
    assert not list((tmp_path / "cache").glob("models/*"))
