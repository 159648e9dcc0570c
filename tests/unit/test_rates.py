"""The learning rate of a config that sets none: by the method and the size of a hidden state."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import lwo_dist
from lwo_dist import LWOConfig
from lwo_dist.config.reading import load_config
from lwo_dist.errors import UserError
from lwo_dist.layers import Layer
from lwo_dist.methods import Method
from lwo_dist.methods.lwo import LayerWise
from lwo_dist.registry import METHODS
from lwo_dist.run import _with_rate
from lwo_dist.schedule import learning_rate
from lwo_dist.strategies.checks import check_config
from tests import families, oracle

HIDDEN = 32  # of the families' models


def rate(model: nn.Module, method: str = "lwo", **settings: float) -> float | None:
    found = METHODS.get(method).with_rate(model, LWOConfig(**settings)).lr
    assert found is None or isinstance(found, float)
    return found


@pytest.mark.parametrize("family", families.FAMILIES)
def test_a_family_s_width_is_its_hidden_size(family: str) -> None:
    assert rate(families.make_empty(family)) == float(f"{0.6 / HIDDEN:.1e}")


def test_it_falls_as_the_width_grows_and_fits_the_model_that_it_was_measured_on() -> None:
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "vocab_size": 49152}
    with torch.device("meta"):
        small = families._build("llama", num_attention_heads=9, num_key_value_heads=3, **sizes)
        large = families._build(
            "qwen2",
            hidden_size=3584,
            intermediate_size=18944,
            vocab_size=152064,
            num_attention_heads=28,
            num_key_value_heads=4,
        )
    assert [rate(small, method) for method in ("lwo", "full", "lora")] == [1e-3, 1.7e-4, 2.1e-3]
    assert [rate(large, method) for method in ("lwo", "full", "lora")] == [1.7e-4, 2.8e-5, 3.3e-4]


def test_adapters_do_not_hide_the_width_of_their_base() -> None:
    base = oracle.tiny_model(tied=True)
    adapted = get_peft_model(copy.deepcopy(base), LoraConfig(r=8, target_modules="all-linear"))
    assert rate(adapted, "lora") == rate(base, "lora") == 0.05


def test_a_rate_that_is_set_stays() -> None:
    assert rate(oracle.tiny_model(tied=True), lr=3e-5) == 3e-5


def test_the_hook_trains_with_it_and_reports_it() -> None:
    rates, weights = [], []
    for config in (LWOConfig(), LWOConfig(lr=0.025)):
        lwo = lwo_dist.attach(oracle.tiny_model(tied=True), config)
        tokens, labels = oracle.global_batch(0)
        lwo.backward(lwo.model(input_ids=tokens, labels=labels).loss)
        rates += [lwo.step().lr, lwo.config.lr]
        weights.append(lwo.module.state_dict())
    assert rates == [0.025] * 4
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_run_says_it(capsys: pytest.CaptureFixture[str]) -> None:
    lwo = lwo_dist.attach(oracle.tiny_model(tied=True), LWOConfig())
    assert _with_rate(load_config(), lwo).lwo.lr == 0.025
    said = capsys.readouterr().out
    assert said == "lwo.lr is unset: 0.025, for method lwo and this model\n"


def test_a_method_without_one_is_refused_by_name() -> None:
    class Own(Method):
        name = "own"

        def layers(self, model: nn.Module, config: LWOConfig) -> list[Layer]:
            return [Layer("all", tuple(name for name, _ in model.named_parameters()))]

    message = r"^method: own has no learning rate of its own; set lwo\.lr$"
    with pytest.raises(UserError, match=message):
        lwo_dist.attach(oracle.tiny_model(tied=True), LWOConfig(), Own())


def test_a_run_of_such_a_method_is_refused_before_it_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(LayerWise, "rate_times_width", None)
    with pytest.raises(UserError, match=r"^method: lwo has no learning rate of its own; set lwo"):
        check_config(load_config())
    check_config(load_config(None, ["lwo.lr=1e-3"]))


def test_embeddings_and_convolutions_do_not_count() -> None:
    model = nn.ModuleDict(
        {
            "embed": nn.Embedding(1000, 40),
            "convolution": nn.Conv1d(40, 40, 10),
            "up": nn.Linear(16, 8),
            "experts": nn.ParameterList([nn.Parameter(torch.ones(3, 8, 10))]),
        }
    )
    assert rate(model, "full") == 0.013  # 0.1 / 8


def test_of_two_sizes_the_smaller_is_the_width() -> None:
    assert rate(nn.Linear(10, 5), "full") == rate(nn.Linear(5, 10), "full") == 0.02


def test_a_packed_model_is_refused() -> None:
    model = oracle.tiny_model(tied=True)
    linear = model.get_submodule("model.layers.0.mlp.up_proj")
    packed = torch.zeros(600, 1, dtype=torch.uint8)  # as bitsandbytes keeps four bits
    linear.weight = nn.Parameter(packed, requires_grad=False)
    message = r"^model\.layers\.0\.mlp\.up_proj\.weight is of torch\.uint8, packed, so that its"
    with pytest.raises(UserError, match=message):
        rate(model, "lora")
    assert rate(model, "lora", lr=1e-4) == 1e-4


def test_a_model_without_matrices_is_refused() -> None:
    model = nn.ModuleDict({"vectors": nn.LayerNorm(8)})
    with pytest.raises(UserError, match=r"^a ModuleDict has no matrices to choose a rate by; set"):
        lwo_dist.attach(model, LWOConfig(), "full")


def test_a_schedule_without_a_model_needs_it() -> None:
    lwo = lwo_dist.attach(oracle.tiny_model(tied=True), LWOConfig())
    with pytest.raises(UserError, match="lr is unset"):
        learning_rate(LWOConfig(), lwo.schedule, 0)
