"""The loss without whole logits equals that of whole logits, gradients too, for every family; and
what it saves is counted.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

import lwo_dist
from lwo_dist import heads
from lwo_dist.errors import UserError
from lwo_dist.losses import IGNORED_LABEL, causal_lm_loss, read, summed_loss
from lwo_dist.plan.live import LiveBytes
from tests import families, oracle

# What differs after or around the head: a softcap, a scale, a divisor, a bias, a projection before
# it, a head tied and scaled, a bias added after it, experts.
SAMPLE = ["cohere", "gemma2", "gptj", "granite", "marian", "opt", "qwen2_moe", "t5"]
IN_FP32 = {"falcon_mamba", "mamba", "mamba2", "nemotron_h"}
"""Families that cast their logits to fp32, in fp64 too."""
BOUND = {torch.float64: 1e-12, torch.float32: 1e-6}
CASES = [
    pytest.param(name, marks=() if name in SAMPLE else pytest.mark.long)
    for name in sorted(families.FAMILIES)
]


def batch_of(model: Any, tokens: Tensor) -> dict[str, Tensor]:
    if model.config.is_encoder_decoder:
        return {"input_ids": tokens.flip(1), "decoder_input_ids": tokens}
    return {"input_ids": tokens}


def labelled(tokens: Tensor, share: float = 0.7) -> Tensor:
    """What each position is to predict, for a random share of them."""
    labels = pad(tokens[:, 1:], (0, 1), value=IGNORED_LABEL)
    chosen = torch.rand(labels.shape, generator=torch.Generator().manual_seed(1)) < share
    return labels.masked_fill(~chosen, IGNORED_LABEL)


def plain_loss(model: Any, inputs: Mapping[str, Tensor], labels: Tensor) -> Tensor:
    logits = model(**inputs).logits
    return cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED_LABEL, reduction="sum"
    )


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor | None]:
    """Of a share of the loss, as a trainer divides it."""
    model.zero_grad()
    (loss / 7).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_equal(
    found: Mapping[str, Tensor | None], expected: Mapping[str, Tensor | None], bound: float
) -> None:
    """Relative to the largest gradient of all."""
    largest = max(float(g.abs().max()) for g in expected.values() if g is not None)
    for name, gradient in expected.items():
        assert (found[name] is None) == (gradient is None), name
        if gradient is not None:
            assert float((found[name] - gradient).abs().max()) <= bound * largest, name


def check(model: Any, bound: float, *, share: float = 0.7) -> None:
    """In one chunk, in several of which the last is shorter, and in chunks of one position."""
    tokens = torch.randint(
        3, families.VOCABULARY, (3, 12), generator=torch.Generator().manual_seed(0)
    )
    inputs, labels = batch_of(model, tokens), labelled(tokens, share)
    assert int((labels != IGNORED_LABEL).sum()) % 4 or not share
    plain = plain_loss(model, inputs, labels)
    expected = gradients(model, plain)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # of a loss from whole logits
        for chunk_size in (None, 4, 1):
            loss = summed_loss(model, inputs, labels, chunk_size=chunk_size)
            assert loss.item() == pytest.approx(plain.item(), rel=bound)
            assert_equal(gradients(model, loss), expected, bound)
            with torch.no_grad():
                assert float(summed_loss(model, inputs, labels, chunk_size=chunk_size)) == (
                    pytest.approx(plain.item(), rel=bound)
                )


@pytest.mark.parametrize("family", CASES)
def test_equals_the_loss_of_whole_logits(family: str) -> None:
    bound = 1e-6 if family in IN_FP32 else BOUND[torch.float64]
    check(families.make(family, torch.float64), bound)


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("share", [1.0, 0.7, 0.0])
def test_tied_and_untied_with_ignored_positions_and_without_a_label(
    tied: bool, share: float, dtype: torch.dtype
) -> None:
    model = families.make("llama", dtype, tie_word_embeddings=tied)
    check(model, BOUND[dtype], share=share)
    if share == 0.0:  # zeros, for which the other ranks wait
        tokens = torch.randint(3, families.VOCABULARY, (2, 8))
        found = gradients(model, summed_loss(model, {"input_ids": tokens}, labelled(tokens, 0.0)))
        assert all(gradient is not None and not gradient.any() for gradient in found.values())


@pytest.mark.parametrize("trained", ["lm_head.weight", "model.layers.3.mlp.up_proj.weight"])
def test_only_what_is_trained_gets_a_gradient(trained: str) -> None:
    model = families.make("llama", torch.float64, tie_word_embeddings=False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name == trained)
    check(model, BOUND[torch.float64])


def test_gradients_accumulate_and_a_second_backward_is_an_error() -> None:
    model = families.make("llama", torch.float64)
    tokens = torch.randint(3, families.VOCABULARY, (2, 8))
    inputs, labels = {"input_ids": tokens}, labelled(tokens)
    expected = {n: 2 * g for n, g in gradients(model, plain_loss(model, inputs, labels)).items()}
    gradients(model, summed_loss(model, inputs, labels, chunk_size=3))
    again = summed_loss(model, inputs, labels, chunk_size=3) / 7
    again.backward()
    assert_equal({n: p.grad for n, p in model.named_parameters()}, expected, 1e-12)
    with pytest.raises(RuntimeError, match="second time"):
        again.backward()
    retained = summed_loss(model, inputs, labels)
    retained.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        retained.backward()


def test_chunks_of_16_bits_are_summed_in_32() -> None:
    """As one matrix product does: a sum in bf16 loses 20 times as much."""
    model = families.make("llama", torch.float64)
    tokens = torch.randint(3, families.VOCABULARY, (8, 64))
    inputs, labels = {"input_ids": tokens}, labelled(tokens, 1.0)
    exact = gradients(model, plain_loss(model, inputs, labels))["lm_head.weight"]
    model.bfloat16()
    of_plain = gradients(model, plain_loss(model, inputs, labels))["lm_head.weight"]
    of_chunks = gradients(model, summed_loss(model, inputs, labels, chunk_size=2))["lm_head.weight"]
    assert of_chunks.dtype == torch.bfloat16
    errors = [float((found.double() - exact).norm()) for found in (of_chunks, of_plain)]
    assert errors[0] < 1.2 * errors[1]


def test_the_head_computes_under_the_autocast_of_the_forward_pass() -> None:
    """`strategy: replicate` in bf16: bitwise the losses of whole logits."""
    model = families.make("llama")
    model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)
    tokens = torch.randint(3, families.VOCABULARY, (2, 8))
    inputs, labels = {"input_ids": tokens}, labelled(tokens, 1.0)

    def each(reduction: str) -> Tensor:
        logits = model(**inputs).logits[:, :-1]
        assert logits.dtype == torch.bfloat16
        targets = tokens[:, 1:].flatten()
        return cross_entropy(logits.flatten(0, 1).float(), targets, reduction=reduction)

    assert torch.equal(read(model, inputs, labels).losses[:, :-1].flatten(), each("none"))
    expected = gradients(model, each("sum"))
    assert_equal(gradients(model, summed_loss(model, inputs, labels)), expected, 1e-2)
    assert "forward" in model.__dict__  # the same as before


def test_adapters_on_the_head_are_trained() -> None:
    peft = pytest.importorskip("peft")
    model: Any = families.make("llama", torch.float64, tie_word_embeddings=False)
    settings = peft.LoraConfig(r=4, target_modules=["lm_head", "q_proj"], init_lora_weights=False)
    model = peft.get_peft_model(model, settings).double()
    check(model, BOUND[torch.float64])
    trained = [
        name for name, p in model.named_parameters() if p.requires_grad and "lm_head" in name
    ]
    assert len(trained) == 2 and all(model.get_parameter(name).grad.any() for name in trained)


def test_parts_of_the_head_with_hooks_are_called_once() -> None:
    """They may gather weights: every rank has to call them as often as the others."""
    peft = pytest.importorskip("peft")
    model: Any = families.make("llama", torch.float64, tie_word_embeddings=False)
    settings = peft.LoraConfig(r=4, target_modules=["lm_head"], init_lora_weights=False)
    model = peft.get_peft_model(model, settings).double()
    calls = []
    part = model.get_base_model().lm_head.lora_A
    part.default.register_forward_pre_hook(lambda *_: calls.append(1))
    check(model, BOUND[torch.float64])
    # The plain loss, three losses, and these without gradients.
    assert len(calls) == 7


# ---- evaluation


@pytest.mark.parametrize("family", ["gemma2", "t5"])
def test_reading_gives_each_loss_and_the_logits_of_a_position(family: str) -> None:
    model = families.make(family, torch.float64)
    tokens = torch.randint(3, families.VOCABULARY, (3, 12))
    inputs, labels = batch_of(model, tokens), labelled(tokens)
    with torch.no_grad():
        output = model(**inputs)
    each = cross_entropy(output.logits.mT, labels, ignore_index=IGNORED_LABEL, reduction="none")
    found = read(model, inputs, labels, logits_of=5)
    torch.testing.assert_close(found.losses, each, rtol=1e-12, atol=0)
    torch.testing.assert_close(found.logits, output.logits[:, 5], rtol=1e-12, atol=1e-14)
    assert found.output.logits is None
    if family == "t5":
        hidden = output.encoder_last_hidden_state
        assert torch.equal(found.output.encoder_last_hidden_state, hidden)


# ---- models that do not fit


class _Odd(LlamaForCausalLM):
    """Does something after its head."""

    def __init__(self, config: Any, after: str):
        super().__init__(config)
        self.after = after
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        if self.after == "mixes positions":
            output.logits = output.logits + 0.1 * output.logits.roll(1, 1)
        elif self.after == "weighs positions":
            weights = torch.arange(output.logits.shape[1]).double()
            output.logits = output.logits * weights[None, :, None]
        elif self.after == "trains after it":
            output.logits = output.logits * self.scale
        elif self.after == "calls it twice":
            output.logits = output.logits + self.lm_head(output.logits[..., :32] * 0)
        elif self.after == "looks at the batch":
            output.logits = output.logits.view(kwargs["input_ids"].shape[0], -1, 67)
        elif self.after == "cuts positions":
            output.logits = output.logits[:, -1:]
        return output


def odd(after: str) -> Any:
    torch.manual_seed(0)
    settings = {**families.LLAMA, "attention_dropout": 0.3}
    return _Odd(LlamaConfig(**settings), after).double().train()


REASONS = {
    "weighs positions": "not done for each position apart",
    "mixes positions": "not done for each position apart",
    "trains after it": "trains parameters after its head",
    "calls it twice": "calls the head 2 times",
    "looks at the batch": "needs the logits: shape",
}


@pytest.mark.parametrize("after", REASONS)
def test_a_model_that_does_not_fit_gets_its_loss_from_whole_logits(after: str) -> None:
    model = odd(after)
    tokens = torch.randint(3, families.VOCABULARY, (3, 12))
    inputs, labels = {"input_ids": tokens}, labelled(tokens)
    torch.manual_seed(4)  # of the dropout: tried or not, it is the same
    plain = plain_loss(model, inputs, labels)
    expected = gradients(model, plain)
    torch.manual_seed(4)
    with pytest.warns(UserWarning, match=f"loss of _Odd .* whole batch.*: .*{REASONS[after]}"):
        loss = summed_loss(model, inputs, labels)
    assert loss.item() == pytest.approx(plain.item(), rel=1e-12)
    assert_equal(gradients(model, loss), expected, 1e-12)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.manual_seed(4)  # said once
        assert summed_loss(model, inputs, labels).item() == loss.item()


def test_logits_of_other_positions_than_the_labels_are_refused() -> None:
    tokens = torch.randint(3, families.VOCABULARY, (3, 12))
    with (
        pytest.warns(UserWarning, match="not done for each position apart"),
        pytest.raises(UserError, match=r"logits of \(3, 1\) positions, .* labels are of \(3, 12\)"),
    ):
        summed_loss(odd("cuts positions"), {"input_ids": tokens}, labelled(tokens))


def test_an_error_before_the_head_is_the_model_s_own() -> None:
    model = families.make("llama")
    tokens = torch.full((1, 4), 10_000)
    with pytest.raises(IndexError):
        summed_loss(model, {"input_ids": tokens}, tokens)
    assert "forward" not in model.__dict__ and isinstance(model.lm_head, nn.Linear)
    assert model not in heads._WITH_WHOLE_LOGITS


def test_a_module_without_a_head_and_one_compiled_as_a_whole() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = oracle.tiny_model(tied=False)

        def forward(self, input_ids: Tensor) -> Any:
            return self.inner.model(input_ids)

    tokens = torch.randint(3, 61, (2, 8))
    model = families.make("llama")
    expected = plain_loss(model, {"input_ids": tokens}, labelled(tokens))
    compiled = torch.compile(model, backend="eager")
    with pytest.warns(UserWarning, match="compiled as a whole"):
        found = summed_loss(compiled, {"input_ids": tokens}, labelled(tokens))
    torch.testing.assert_close(found, expected)


# ---- in anybody's loop


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_public_loss_is_that_of_transformers(reduction: str) -> None:
    model = families.make("gemma2", torch.float32)
    tokens = torch.randint(3, families.VOCABULARY, (3, 12))
    labels = tokens.clone()
    labels[0, :7] = labels[2, 9:] = IGNORED_LABEL
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}
    expected = model(**batch).loss
    if reduction == "sum":
        expected = expected * (labels[:, 1:] != IGNORED_LABEL).sum()
    found = lwo_dist.causal_lm_loss(model, batch, reduction=reduction, chunk_size=5)
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    assert_equal(gradients(model, found), gradients(model, expected), 1e-6)
    assert "labels" in batch


def test_what_the_public_loss_would_leave_out_is_refused() -> None:
    tokens = torch.randint(3, families.VOCABULARY, (3, 12))
    batch = {"input_ids": tokens, "labels": tokens}
    with pytest.raises(UserError, match="for decoders"):
        causal_lm_loss(families.make("t5"), batch)
    with pytest.raises(UserError, match="reduction = 'none'"):
        causal_lm_loss(families.make("llama"), batch, reduction="none")
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    model = MixtralForCausalLM(MixtralConfig(**families.LLAMA, **experts))
    causal_lm_loss(model, batch)
    with pytest.raises(UserError, match=r"does not add the router's loss"):
        causal_lm_loss(model, {**batch, "output_router_logits": True})
    model.config.output_router_logits = True
    with pytest.raises(UserError, match=r"does not add the router's loss"):
        causal_lm_loss(model, batch)


# ---- memory

SEQUENCES, TOKENS, VOCABULARY = 64, 128, 151_936
LOGITS = SEQUENCES * TOKENS * VOCABULARY * 4
"""Bytes of the logits of a batch in fp32."""


def step_of(loss_of: Any, trained: str, labels: Tensor) -> LiveBytes:
    """Forward and backward of a small model with Qwen2.5-Coder-7B's vocabulary, without values."""
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**families.LLAMA | {"vocab_size": VOCABULARY}))
    model.config.use_cache = False
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained in name)
    inputs = {
        "input_ids": torch.zeros(labels.shape, dtype=torch.int64, device="meta"),
        "attention_mask": torch.zeros((1, 1, TOKENS, TOKENS), device="meta"),
    }
    with LiveBytes() as counted:
        loss_of(model, inputs, labels).backward()
    return counted


def loss_of_before(model: Any, inputs: Mapping[str, Tensor], labels: Tensor) -> Tensor:
    """The trainer's loss up to now."""
    logits = model(**inputs).logits
    return cross_entropy(
        logits[:, :-1].flatten(0, 1).float(),
        labels[:, :-1].flatten().to("meta"),
        ignore_index=IGNORED_LABEL,
        reduction="sum",
    )


@pytest.mark.parametrize("trained", ["", "layers.3", "lm_head"])
def test_a_step_takes_less_by_more_than_the_logits_of_the_batch(trained: str) -> None:
    labels = torch.zeros((SEQUENCES, TOKENS), dtype=torch.int64)
    before = step_of(loss_of_before, trained, labels)
    now = step_of(summed_loss, trained, labels)
    print(
        f"{trained or 'all'}: peak {before.peak / 2**30:.2f} -> {now.peak / 2**30:.2f} GiB,"
        f" largest {before.largest / 2**30:.2f} -> {now.largest / 2**30:.2f} GiB,"
        f" logits {LOGITS / 2**30:.2f} GiB"
    )
    assert before.largest == LOGITS
    assert before.peak - now.peak >= LOGITS
    assert now.largest <= 4 * heads.CHUNK_ELEMENTS
    # A chunk's logits, their log-softmax and its gradient; and what belongs to the small model.
    assert now.peak < 3.1 * 4 * heads.CHUNK_ELEMENTS + 2**29


def test_nothing_is_computed_where_there_is_no_label() -> None:
    labels = torch.full((SEQUENCES, TOKENS), IGNORED_LABEL)
    labels[:, -1] = 0
    counted = step_of(summed_loss, "layers.3", labels)
    assert counted.largest < SEQUENCES * 1.1 * VOCABULARY * 4
