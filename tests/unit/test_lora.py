"""Method lora: which layers get adapters, what is refused, and what an export makes of them."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
)

from lwo_dist.checkpoint.export import export_adapter, export_model
from lwo_dist.checkpoint.format import Checkpoint, newest_checkpoint
from lwo_dist.checkpoint.store import LayerStore
from lwo_dist.config import Config, LoRAConfig, LWOConfig, ModelConfig
from lwo_dist.config.reading import load_config
from lwo_dist.errors import DamagedError, UserError
from lwo_dist.extras import EXTRAS
from lwo_dist.hook import attach
from lwo_dist.methods.lora import LoRA
from lwo_dist.models import base_digest
from lwo_dist.strategies.checks import check_config
from tests import oracle, stores
from tests.unit.test_export import record_of

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`")  # peft's own

METHOD = LoRA()
TOKENS = torch.arange(12).view(1, 12) * 5 % 61


def prepared(model: nn.Module, **settings: Any) -> nn.Module:
    torch.manual_seed(0)
    METHOD.prepare(model, Config(lora=LoRAConfig(**settings)))
    return model


def gpt2() -> Any:
    torch.manual_seed(1)
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=61, **ends))


def mixtral() -> Any:
    torch.manual_seed(1)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 2}
    return MixtralForCausalLM(MixtralConfig(vocab_size=61, **sizes, **heads))


BASES: dict[str, Callable[[], Any]] = {
    "tied": lambda: oracle.tiny_model(tied=True),
    "untied": lambda: oracle.tiny_model(tied=False),
    "gpt2": gpt2,
    "mixtral": mixtral,
}


def adapters_of(model: nn.Module) -> set[str]:
    [layer] = METHOD.layers(model, LWOConfig())
    return {name.partition(".lora_")[0].rpartition(".")[2] for name in layer.parameter_names}


def test_all_linear_layers_but_the_head_get_adapters() -> None:
    model = prepared(oracle.tiny_model(tied=False), rank=3)
    linear = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert adapters_of(model) == linear
    [layer] = METHOD.layers(model, LWOConfig())
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    # By layer: q and o 24 x 24, k and v 12 x 24, three of 24 x 50.
    expected = 4 * 3 * (2 * (24 + 24) + 2 * (12 + 24) + 3 * (24 + 50))
    assert sum(sizes[name] for name in layer.parameter_names) == expected
    assert adapters_of(prepared(gpt2())) == {"c_attn", "c_proj", "c_fc"}
    named = prepared(oracle.tiny_model(tied=False), target_modules=["q_proj", "lm_head"])
    assert adapters_of(named) == {"q_proj", "lm_head"}


def test_adapters_start_alike_and_real_wherever_the_base_is() -> None:
    real = prepared(oracle.tiny_model(tied=True))
    empty = prepared(oracle.tiny_model(tied=True).to("meta"))
    weights = dict(real.named_parameters())
    [layer] = METHOD.layers(real, LWOConfig())
    for name, parameter in empty.named_parameters():
        assert parameter.is_meta == (name not in layer.parameter_names)
        if not parameter.is_meta:
            assert torch.equal(parameter, weights[name])
            assert bool(parameter.any()) == ("lora_A" in name)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["q_proj", "nothing"], "no module of Qwen2ForCausalLM is named nothing; name linear"),
        (["embed_tokens"], "model.embed_tokens is a Embedding, not a linear layer"),
        (["norm"], "model.norm is a Qwen2RMSNorm, not a linear layer; name linear layers, such as"),
        (["lm_head"], "lm_head shares its matrix with another module, which would change too"),
    ],
)
def test_names_of_no_fitting_layer_are_refused(targets: list[str], message: str) -> None:
    model = oracle.tiny_model(tied=True)
    with pytest.raises(UserError) as refusal:
        prepared(model, target_modules=targets)
    assert message in str(refusal.value) and "\n" not in str(refusal.value)
    assert f"lora.target_modules = [{', '.join(targets)}]: " in str(refusal.value)
    assert not any("lora" in name for name, _ in model.named_parameters())


def test_a_model_that_peft_refuses_is_one_line() -> None:
    with pytest.raises(UserError, match=r"peft cannot add adapters to Linear \(.*another method$"):
        prepared(nn.Linear(2, 2))


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys")
def test_layers_that_peft_takes_for_fused_experts_are_refused() -> None:
    # Older versions of peft leave the experts as they are.
    pytest.importorskip("peft.utils.transformers_weight_conversion")
    sizes = {"hidden_size": 16, "intermediate_size": 8, "moe_intermediate_size": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    experts = {"n_routed_experts": 2, "num_experts_per_tok": 1, "first_k_dense_replace": 1}
    config = Glm4MoeConfig(vocab_size=31, num_hidden_layers=2, **sizes, **heads, **experts)
    assert adapters_of(prepared(Glm4MoeForCausalLM(config), target_modules=["q_proj"]))
    with pytest.raises(UserError, match="peft adds adapters to model.layers.1.mlp.experts too"):
        prepared(Glm4MoeForCausalLM(config))


def test_a_model_without_adapters_cannot_be_attached() -> None:
    with pytest.raises(UserError, match="has no LoRA adapters; add them before attach"):
        attach(oracle.tiny_model(tied=False), LWOConfig(), "lora")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["method=lora", "lwo.state=keep"], "lwo.state: keep has no effect with method: lora"),
        (["lora.rank=8"], "lora.rank = 8 has no effect with method: lwo; set method: lora"),
        (["method=full", "lora.dropout=0.1"], "lora.dropout = 0.1 has no effect with method: full"),
        (["method=lora", "lora.rank=0"], "lora.rank"),
        (["method=lora", "lora.target_modules=[]"], "lora.target_modules"),
        (["method=lora", "lora.target_modules=['.*_proj']"], "lora.target_modules"),
    ],
)
def test_settings_without_effect_and_values_out_of_range_are_refused(
    overrides: list[str], message: str
) -> None:
    with pytest.raises(UserError) as refusal:
        check_config(load_config(None, overrides))
    assert message in str(refusal.value)


def test_without_peft_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(EXTRAS, "lora", ("peft_is_not_here",))
    with pytest.raises(UserError) as refusal:
        prepared(oracle.tiny_model(tied=False))
    assert str(refusal.value) == (
        "method: lora needs packages that are not installed (peft_is_not_here):"
        " pip install 'lwo-dist[lora]'"
    )


def test_a_model_of_peft_s_own_is_trained_as_it_is() -> None:
    model: Any = peft.get_peft_model(
        oracle.tiny_model(tied=False), peft.LoraConfig(target_modules=["q_proj"], use_dora=True)
    )
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    lwo = attach(model, LWOConfig(lr=1e-2), "lora")
    stores.step(lwo, 2)
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {name for name in before if "lora_" in name}
    assert {name.rpartition(".lora_")[2][:9] for name in changed} >= {"magnitude"}


# ---- exports


def saved(base: Any, folder: Path, **settings: Any) -> tuple[Any, Checkpoint]:
    """Adapters on `base`, trained for two steps, and their checkpoint; the base is in `folder`."""
    base.save_pretrained(folder / "base")
    model = prepared(base, **settings)
    lwo = attach(model, LWOConfig(lr=1e-2), "lora")
    stores.step(lwo, 2)
    store = LayerStore(stores.run_folder(folder), base.config.save_pretrained, adapters_only=True)
    about = record_of(
        {0: 5.0, 2: 4.0},
        method="lora",
        lora=LoRAConfig(**settings).model_dump(mode="json"),
        base_model=str(folder / "base"),
        base_digest=base_digest(ModelConfig(name=str(folder / "base"))),
    )
    stores.save(store, lwo, **about)
    checkpoint = newest_checkpoint(stores.run_folder(folder))
    assert checkpoint is not None
    return model, checkpoint


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS).logits


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("tied", {"rank": 4, "alpha": 20, "use_rslora": True, "dropout": 0.1}),
        ("untied", {"target_modules": ["q_proj", "down_proj", "lm_head"]}),
        ("gpt2", {"rank": 2}),  # its linear layers are transposed, one of them is square
        ("mixtral", {}),  # transformers fuses its experts; they have no adapters
    ],
)
def test_both_exports_compute_what_base_and_adapters_do(
    kind: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    base = BASES[kind]()
    untuned = logits(base)
    model, checkpoint = saved(base, tmp_path, **settings)
    tuned = logits(model)
    assert (tuned - untuned).abs().max() > 1e-2
    merged = AutoModelForCausalLM.from_pretrained(export_model(checkpoint, tmp_path / "merged"))
    torch.testing.assert_close(logits(merged), tuned, rtol=0, atol=1e-5)
    adapter = export_adapter(checkpoint, tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # such as of missing keys
        loaded = peft.PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(tmp_path / "base"), str(adapter)
        )
    assert torch.equal(logits(loaded), tuned)
    about = json.loads((adapter / "adapter_config.json").read_text())
    assert about["base_model_name_or_path"] == str(tmp_path / "base")
    assert about["r"] == settings.get("rank", 16)
    assert f"rank {about['r']} on " in (adapter / "README.md").read_text()
    assert "library_name: peft" in (adapter / "README.md").read_text()
    assert "adapters merged in fp32" in (tmp_path / "merged" / "README.md").read_text()


def test_a_checkpoint_holds_adapters_only_and_loads_as_no_model(tmp_path: Path) -> None:
    model, checkpoint = saved(oracle.tiny_model(tied=False), tmp_path, rank=2)
    held = {name: tensor for tensors in checkpoint.weights() for name, tensor in tensors.items()}
    trained = {name: p for name, p in model.named_parameters() if "lora_" in name}
    assert held.keys() == trained.keys()
    assert all(torch.equal(held[name], trained[name]) for name in trained)
    with pytest.raises(OSError, match="no file named"):
        AutoModelForCausalLM.from_pretrained(checkpoint.folder)


def test_an_export_reads_the_base_model_that_was_trained_on_and_no_other(tmp_path: Path) -> None:
    _, checkpoint = saved(oracle.tiny_model(tied=False), tmp_path, rank=2)
    other = ModelConfig(name=str(tmp_path / "other"))
    oracle.tiny_model(tied=False, seed=1).save_pretrained(other.name)
    with pytest.raises(UserError, match=r"other is not the model .* its weights differ; give"):
        export_model(checkpoint, tmp_path / "model", base=other)
    moved = tmp_path / "moved"
    (tmp_path / "base").rename(moved)
    with pytest.raises(UserError, match=r"base model cannot be read .* give it with --base$"):
        export_model(checkpoint, tmp_path / "model")
    export_model(checkpoint, tmp_path / "model", base=ModelConfig(name=str(moved)))
    # Without a digest, a forged checkpoint could have any folder exported.
    run = {**checkpoint.state["run"], "base_digest": None, "base_model": str(moved)}
    forged = Checkpoint(checkpoint.folder, {**checkpoint.state, "run": run})
    with pytest.raises(UserError, match="no digest of their base model .*; give that model with"):
        export_model(forged, tmp_path / "forged")
    assert not (tmp_path / "forged").exists()


@pytest.mark.parametrize("part", ["A", "B"])
def test_adapters_that_do_not_fit_are_damage(part: str, tmp_path: Path) -> None:
    _, checkpoint = saved(oracle.tiny_model(tied=False), tmp_path, rank=2)
    [file] = {checkpoint.folder / reference for reference in checkpoint.weight_map.values()}
    tensors = load_file(file)
    name = f"model.layers.0.self_attn.q_proj.lora_{part}.default.weight"
    tensors[name] = tensors[name].repeat(2, 1)
    save_file(tensors, file)
    with pytest.raises(DamagedError, match="adapter of model.layers.0.self_attn.q_proj does not"):
        export_model(checkpoint, tmp_path / "model")


def test_the_digest_tells_a_tuned_model_from_its_base(tmp_path: Path) -> None:
    model = oracle.tiny_model(tied=False)
    config = ModelConfig(name=str(tmp_path))
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    before = base_digest(config)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert base_digest(config) == before is not None
    with torch.no_grad():
        model.get_submodule("model.layers.2.mlp.up_proj").weight.add_(1e-3)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert base_digest(config) != before
