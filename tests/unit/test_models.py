"""Loading on one rank, and what is refused, in one line each."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from huggingface_hub import errors as hub
from huggingface_hub import snapshot_download
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    GenerationConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.core_model_loading import Transpose, WeightConverter

from lwo_dist import distributed
from lwo_dist.config import ModelConfig, TrainConfig
from lwo_dist.errors import UserError
from lwo_dist.models import (
    PretrainedSource,
    licence_of,
    load_tokenizer,
)
from lwo_dist.models import hub as folders
from lwo_dist.models import weights as loading
from tests.loading import load_model

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny tied Qwen2, saved in bf16, without a tokenizer."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=31,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
        attention_dropout=0.1,
    )
    Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def one_rank() -> Iterator[None]:
    distributed.init_process_group(60)
    yield
    dist.destroy_process_group()


def load(name: Path | str, *, strategy: str = "replicate", **settings: Any) -> Any:
    train = TrainConfig(gradient_checkpointing=settings.pop("gradient_checkpointing", False))
    return load_model(ModelConfig(name=str(name), **settings), train, strategy=strategy)


def refusal(name: Path | str, **settings: Any) -> str:
    with pytest.raises(UserError) as caught:
        load(name, **settings)
    message = str(caught.value)
    assert "\n" not in message and repr(str(name)) in message and ";" in message
    return message


def edit_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def edit_weights(folder: Path, **values: torch.Tensor | None) -> None:
    """Replace, add or (None) remove tensors; `__` in a name stands for a dot."""
    path = folder / "model.safetensors"
    named = {name.replace("__", "."): tensor for name, tensor in values.items()}
    tensors = {
        name: tensor for name, tensor in (load_file(path) | named).items() if tensor is not None
    }
    save_file(tensors, path, metadata={"format": "pt"})


def test_replicate_is_from_pretrained_in_fp32(folder: Path) -> None:
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    model = load(folder)
    assert {tensor.dtype for tensor in model.parameters()} == {torch.float32}
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not model.training and not model.config.use_cache
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("strategy", ["replicate", "fsdp"])
def test_gradient_checkpointing(folder: Path, strategy: str, one_rank: None) -> None:
    model = load(folder, strategy=strategy, gradient_checkpointing=True).train()
    model.model.embed_tokens.weight.requires_grad_(False)
    seen: list[bool] = []
    model.model.layers[0].input_layernorm.register_forward_pre_hook(
        lambda module, args: seen.append(args[0].requires_grad)
    )
    model(input_ids=torch.arange(6).view(1, 6), labels=torch.arange(6).view(1, 6)).loss.backward()
    assert seen == [False, False], "once forward, once recomputed, and inputs need no gradient"


@pytest.mark.parametrize(
    "kind", ["as saved", "index", "old buffers", "both tied names", "pytorch bin", "converted"]
)
def test_fsdp_is_from_pretrained(
    folder: Path, one_rank: None, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    GenerationConfig(max_new_tokens=7).save_pretrained(folder)
    monkeypatch.setattr(
        loading, "_PIECE_BYTES", 64
    )  # Several pieces a tensor, and rows larger than a piece.
    if kind == "index":
        Qwen2ForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="1KB")
        assert len(list(folder.glob("*.safetensors"))) > 2
    elif kind == "old buffers":
        edit_weights(folder, model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(2))
    elif kind == "both tied names":
        edit_weights(
            folder,
            lm_head__weight=load_file(folder / "model.safetensors")[
                "model.embed_tokens.weight"
            ].clone(),
        )
    elif kind == "pytorch bin":
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    elif (
        kind == "converted"
    ):  # The names of a checkpoint may be right and its values still to be transposed.
        step = WeightConverter("no_such_name", "no_such_name", [Transpose()])
        monkeypatch.setattr(loading, "get_model_conversion_mapping", lambda model: [step])
    whole = []
    monkeypatch.setattr(loading, "receive", lambda *args: (whole.append(1), receive(*args)))
    model = load(folder, strategy="fsdp")
    assert bool(whole) == (kind in ("both tied names", "pytorch bin", "converted")), (
        "only these are read whole"
    )
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not model.training and not model.config.use_cache
    assert model.generation_config.to_dict() == expected.generation_config.to_dict()
    for name, tensor in expected.state_dict().items():
        found = model.state_dict()[name]
        assert found.dtype == torch.float32 and torch.equal(found.full_tensor(), tensor), name
    for name, buffer in expected.named_buffers():
        assert torch.equal(model.get_buffer(name), buffer), name


receive = loading.receive


@pytest.mark.parametrize("strategy", ["replicate", "fsdp"])
@pytest.mark.parametrize(
    ("weights", "part"),
    [
        ({"model__norm__weight": None}, "1 missing weights, first model.norm.weight"),
        ({"model__extra__weight": torch.ones(2)}, "1 unexpected weights, first model.extra.weight"),
        ({"model__norm__weight": torch.ones(9)}, ""),
    ],
)
def test_wrong_weights(
    folder: Path, one_rank: None, strategy: str, weights: dict[str, torch.Tensor | None], part: str
) -> None:
    edit_weights(folder, **weights)
    assert part in refusal(folder, strategy=strategy)


def load_partitioned(folder: Path) -> None:
    """As under ZeRO-3."""
    source = PretrainedSource(ModelConfig(name=str(folder)))
    source.fill_partitioned(source.empty(), CPU, lambda parameter: None)


LOADERS = [
    partial(load, strategy="replicate"),
    partial(load, strategy="fsdp"),
    load_partitioned,
]


@pytest.mark.parametrize("loader", LOADERS)
def test_tied_in_config_only(
    folder: Path, one_rank: None, loader: Callable[[Path], object]
) -> None:
    edit_weights(folder, lm_head__weight=torch.ones(31, 8))
    with pytest.raises(UserError, match=r"ties .* but the saved weights differ; set tie_word"):
        loader(folder)


@pytest.mark.parametrize("loader", LOADERS)
def test_an_encoder_decoder_with_a_head_of_its_own(
    tmp_path: Path, one_rank: None, loader: Callable[[Path], object]
) -> None:
    """transformers ties T5 whatever its config.json says."""
    model = T5ForConditionalGeneration(
        T5Config(vocab_size=9, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    )
    model.lm_head.weight = torch.nn.Parameter(torch.ones(9, 8))
    model.save_pretrained(tmp_path)
    edit_config(tmp_path, tie_word_embeddings=False)
    with pytest.raises(UserError, match="ties .* differ; give a model that has one matrix"):
        loader(tmp_path)


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("family", ["t5", "mt5"])
def test_an_encoder_decoder_that_is_untied_in_config_only(
    tmp_path: Path, one_rank: None, family: str, loader: Callable[[Path], Any]
) -> None:
    """As configs of T5 1.1 and mT5 say, which in T5 means that the head's input is not scaled."""
    shape = {"vocab_size": 9, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    config = AutoConfig.for_model(family, **shape)
    AutoModelForSeq2SeqLM.from_config(config).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    written.pop("scale_decoder_outputs", None)  # older than this setting
    (tmp_path / "config.json").write_text(json.dumps(written | {"tie_word_embeddings": False}))
    loaded = loader(tmp_path)
    if loaded is not None:
        assert "lm_head.weight" not in dict(loaded.named_parameters())
        assert family == "mt5" or not loaded.config.scale_decoder_outputs


@pytest.mark.parametrize("loader", LOADERS)
def test_untied_in_config_only(
    folder: Path, one_rank: None, loader: Callable[[Path], object]
) -> None:
    edit_config(folder, tie_word_embeddings=False)
    with pytest.raises(UserError, match=r"1 missing weights, first lm_head.weight"):
        loader(folder)


@pytest.mark.parametrize("strategy", ["replicate", "fsdp"])
def test_damaged_weights(folder: Path, one_rank: None, strategy: str) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert "download or save the folder again" in refusal(folder, strategy=strategy)
    path.unlink()
    assert "download or save the folder again" in refusal(folder, strategy=strategy)


def write_index(folder: Path, names: Iterable[str], file: str) -> None:
    """All tensors in one file."""
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, file)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("strategy", ["replicate", "fsdp"])
@pytest.mark.parametrize("file", ["../outside.safetensors", "{outside}", "../../layers/x", ""])
def test_an_index_that_leads_out_of_the_folder(
    folder: Path, one_rank: None, strategy: str, file: str
) -> None:
    outside = folder.parent / "outside.safetensors"
    (folder / "model.safetensors").rename(outside)
    write_index(folder, load_file(outside), file.format(outside=outside))
    assert "which is no file beside it; download or save" in refusal(folder, strategy=strategy)


@pytest.mark.parametrize("strategy", ["replicate", "fsdp"])
def test_a_snapshot_whose_files_are_links_and_a_checkpoint_that_names_layers(
    folder: Path, one_rank: None, strategy: str
) -> None:
    expected = load(folder, strategy=strategy).state_dict()
    weights = load_file(folder / "model.safetensors")
    root = folder.parent
    blob = root / "blobs" / "0123"
    blob.parent.mkdir()
    (folder / "model.safetensors").rename(blob)
    snapshot = root / "snapshots" / "main"
    shutil.copytree(folder, snapshot)
    (snapshot / "part.safetensors").symlink_to("../../blobs/0123")
    write_index(snapshot, weights, "part.safetensors")
    checkpoint = root / "checkpoints" / "step_000001"
    shutil.copytree(folder, checkpoint)
    (root / "layers").mkdir()
    shutil.copyfile(blob, root / "layers" / "x.safetensors")
    write_index(checkpoint, weights, "../../layers/x.safetensors")
    loaded = [load(model, strategy=strategy).state_dict() for model in (snapshot, checkpoint)]
    for found in loaded:
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("strategy", ["replicate", "fsdp"])
def test_own_code(
    folder: Path, tmp_path: Path, one_rank: None, monkeypatch: pytest.MonkeyPatch, strategy: str
) -> None:
    monkeypatch.setattr(
        "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules")
    )
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    (folder / "own.py").write_text(
        "from transformers import Qwen2Config, Qwen2ForCausalLM\n"
        "class OwnConfig(Qwen2Config):\n    model_type = 'own'\n"
        "class OwnModel(Qwen2ForCausalLM):\n    config_class = OwnConfig\n"
    )
    auto_map = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    edit_config(folder, model_type="own", architectures=["OwnModel"], auto_map=auto_map)
    model = load(folder, strategy=strategy, trust_remote_code=True)
    assert type(model).__name__.endswith("OwnModel")
    ids = torch.arange(8).view(1, 8)
    expected = Qwen2ForCausalLM.from_pretrained(folder, config=model.config, dtype=torch.float32)
    assert torch.equal(model(input_ids=ids).logits, expected(input_ids=ids).logits)


def test_not_a_trainable_model(folder: Path) -> None:
    edit_config(folder, quantization_config={"quant_method": "fp8"})
    assert "quantised" in refusal(folder)
    edit_config(folder, model_type="no-such-type", quantization_config=None)
    assert "config.json cannot be read" in refusal(folder)
    edit_config(folder, auto_map={"AutoConfig": "own.OwnConfig"})
    (folder / "own.py").write_text("raise AssertionError('run without being asked to')")
    assert "model.trust_remote_code: true" in refusal(folder)
    (folder / "config.json").write_text("{")
    assert "config.json cannot be read" in refusal(folder)


def test_not_a_model(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "file").touch()
    assert "without config.json" in refusal(tmp_path)
    for name in (tmp_path / "nowhere", tmp_path / "file", "./nowhere", "a/b/c"):
        assert "is not a folder" in refusal(name)
    assert "cannot be a Hugging Face id" in refusal("two words")
    with pytest.raises(UserError, match="has no tokenizer"):
        load_tokenizer(ModelConfig(name=str(folder)))


def test_hub_out_of_reach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        folders, "snapshot_download", partial(snapshot_download, endpoint="http://127.0.0.1:9")
    )
    started = time.monotonic()
    assert "cannot be reached" in refusal("some/model")
    with pytest.raises(UserError, match="cannot be reached"):
        load_tokenizer(ModelConfig(name="some/model"))
    assert time.monotonic() - started < 20


def test_hub_cache_is_enough(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache" / "models--some--model"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("0" * 40)
    (cache / "snapshots").mkdir()
    folder.rename(cache / "snapshots" / ("0" * 40))
    monkeypatch.setattr(
        folders,
        "snapshot_download",
        partial(snapshot_download, endpoint="http://127.0.0.1:9", cache_dir=tmp_path / "cache"),
    )
    assert load("some/model").config.vocab_size == 31
    assert "cannot be reached" in refusal("some/model", revision="other")


@pytest.mark.parametrize(
    ("error", "part"),
    [
        (hub.GatedRepoError, "HF_TOKEN"),
        (hub.RepositoryNotFoundError, "mind the spelling"),
        (hub.RevisionNotFoundError, "no revision 'v9'"),
        (hub.HfHubHTTPError, "try again"),
    ],
)
def test_hub_refuses(monkeypatch: pytest.MonkeyPatch, error: type[Exception], part: str) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise error.__new__(error)

    monkeypatch.setattr(folders, "snapshot_download", fail)
    assert part in refusal("some/model", revision="v9")


@pytest.mark.parametrize(
    ("line", "licence"),
    [
        ("license: mit", "mit"),
        ("license: [mit, apache-2.0]", "mit, apache-2.0"),
        ("license: []", None),
        ("license: 3", "3"),
        ("tags: [code]", None),
        ("license: [", None),
    ],
)
def test_a_licence_is_one_line_of_text_or_none(
    tmp_path: Path, line: str, licence: str | None
) -> None:
    (tmp_path / "README.md").write_text(f"---\n{line}\n---\n")
    assert licence_of(str(tmp_path)) == licence
