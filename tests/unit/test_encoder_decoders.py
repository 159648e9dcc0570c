"""Examples, batches and answers for encoder-decoders, against plain transformers."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from lwo_dist import distributed
from lwo_dist.config import Config, LWOConfig, ModelConfig
from lwo_dist.data.batches import global_batch
from lwo_dist.data.dataset import PreparedData
from lwo_dist.data.examples import EvalExample
from lwo_dist.driver import fitting_task, prepare
from lwo_dist.errors import UserError
from lwo_dist.models import decoder_start, load_tokenizer
from lwo_dist.registry import METHODS
from lwo_dist.tasks.prepare import prepare_dataset
from lwo_dist.training.evaluate import Evaluation, evaluate
from tests.code_samples import make_config
from tests.models import save_tiny_encoder_decoder, save_tiny_model
from tests.ranks import run_ranks

FUNCTIONS = [
    (
        f"def f_{i}(alpha):\n    '''Gives {i}.'''",
        f"    beta = {i}\n" + "    return beta\n" * (i % 3),
    )
    for i in range(16)
]
FAMILIES = ["t5", "bart"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each family, one with a decoder, and the data."""
    folder = tmp_path_factory.mktemp("encoder_decoders")
    texts = [f"{source}\n{target}\n" for source, target in FUNCTIONS]
    for family in FAMILIES:
        save_tiny_encoder_decoder(folder / family, texts, family)
    save_tiny_model(folder / "decoder", texts)
    for side, pairs in (("train", FUNCTIONS[:10]), ("test", FUNCTIONS[10:])):
        records = [{"source": source, "target": target} for source, target in pairs]
        (folder / f"{side}.jsonl").write_text("\n".join(map(json.dumps, records)))
    records = [
        {"source": source, "target": "yes" if i % 3 else "no"}
        for i, (source, _) in enumerate(FUNCTIONS)
    ]
    (folder / "defects").mkdir()
    (folder / "defects" / "all.jsonl").write_text("\n".join(map(json.dumps, records)))
    for family in FAMILIES:
        learn(folder, family)
    return folder


def config_of(root: Path, model: str, *overrides: str) -> Config:
    return make_config(
        root,
        root / "runs",
        f"model.name={root / model}",
        "task=generation",
        "data.format=jsonl",
        "train.sequence_length=120",
        "eval.max_new_tokens=40",
        "tracking.enabled=false",
        *overrides,
    )


def prepared(config: Config) -> tuple[Any, Any, PreparedData]:
    task, start = fitting_task(config)
    tokenizer = load_tokenizer(config.model)
    return task, tokenizer, prepare_dataset(config, tokenizer, task, decoder_start=start)


def learn(root: Path, family: str) -> None:
    """Until answers differ, and end."""
    torch.manual_seed(0)
    _, _, data = prepared(config_of(root, family))
    model = AutoModelForSeq2SeqLM.from_pretrained(root / family, dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for step in range(40):
        (batch,) = global_batch(
            data, seed=0, step=step, global_batch_size=5, world_size=1, rank=0, accumulation=1
        ).micro_batches
        labels = batch.pop("labels")
        logits = model(**batch).logits[:, :-1]
        functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(root / family)


def model_of(folder: Path, *, noise: float = 0.0) -> Any:
    """`noise`: so much in all matrices that answers depend on the question."""
    model = AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float64).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.add_(torch.randn(weight.shape, generator=generator), alpha=noise)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_examples_are_a_text_for_the_encoder_and_one_for_the_decoder(
    family: str, root: Path
) -> None:
    task, tokenizer, data = prepared(config_of(root, family))
    begin = [tokenizer.bos_token_id] if family == "bart" else []
    for (source, target), row in zip(FUNCTIONS[:10], data.train, strict=True):
        context, answer = (
            [
                *begin,
                *tokenizer(text, add_special_tokens=False)["input_ids"],
                tokenizer.eos_token_id,
            ]
            for text in (f"{source}\n", target)
        )
        assert row["input_ids"] == context + answer
        assert row["target_start"] == len(context) and row["label_tokens"] == len(answer)
    for (_, target), example in zip(FUNCTIONS[10:], data.held_out, strict=True):
        assert example.context[-1] == example.target[-1] == tokenizer.eos_token_id
        assert task.decode(tokenizer, example, list(example.target)) == target == example.text
        assert example.target_bytes == len(target.encode())
        assert "<" not in task.context_shown(tokenizer, example)


def test_a_context_that_is_cut_keeps_its_special_tokens(root: Path) -> None:
    _, tokenizer, data = prepared(
        config_of(root, "bart", "train.sequence_length=52", "eval.max_new_tokens=40")
    )
    for example in data.held_out:
        assert len(example.context) == 12
        assert example.context[0] == tokenizer.bos_token_id
        assert example.context[-1] == tokenizer.eos_token_id
    assert data.counts["notes"]["held out: context cut at its front"] == len(data.held_out)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_of_a_batch_is_that_of_plain_transformers(family: str, root: Path) -> None:
    config = config_of(root, family)
    _, tokenizer, data = prepared(config)
    model = model_of(root / family)
    for world_size in (1, 2):
        total = 0.0
        for rank in range(world_size):
            batch = global_batch(
                data,
                seed=0,
                step=0,
                global_batch_size=8,
                world_size=world_size,
                rank=rank,
                accumulation=2,
            )
            for micro_batch in batch.micro_batches:
                labels = micro_batch.pop("labels")
                with torch.no_grad():
                    logits = model(**micro_batch).logits
                total += functional.cross_entropy(
                    logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
                ).item()
        expected, count = 0.0, 0
        for index in batch.indices.tolist():
            source, target = FUNCTIONS[index]
            labels = tokenizer(text_target=target, return_tensors="pt")["input_ids"]
            inputs = tokenizer(f"{source}\n", return_tensors="pt")
            with torch.no_grad():
                found = model(
                    **{k: inputs[k] for k in ("input_ids", "attention_mask")}, labels=labels
                )
            expected += found.loss.item() * labels.numel()
            count += labels.numel()
        assert total == pytest.approx(expected, rel=1e-6)
        assert batch.label_tokens == count


def answers(root: Path, family: str, batch_size: int = 4) -> Evaluation:
    config = config_of(root, family)
    task, tokenizer, data = prepared(config)
    return evaluate(
        model_of(root / family, noise=0.5),
        tokenizer,
        data.held_out,
        task=task,
        batch_size=batch_size,
        max_new_tokens=config.eval.max_new_tokens,
        decoder_start=data.decoder_start,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
    )


@torch.no_grad()
def plainly(model: Any, example: EvalExample, start: int, end: int) -> tuple[float, list[int]]:
    """The summed loss of the target and the greedy answer: no batch, no padding, no cache."""
    context = torch.tensor([list(example.context)])
    target = torch.tensor([list(example.target)])
    shifted = torch.tensor([[start, *example.target[:-1]]])
    logits = model(input_ids=context, decoder_input_ids=shifted).logits[0]
    loss = functional.cross_entropy(logits, target[0], reduction="sum").item()
    written = [start]
    while len(written) <= 40 and end not in written[1:]:
        logits = model(input_ids=context, decoder_input_ids=torch.tensor([written])).logits
        written.append(int(logits[0, -1].argmax()))
    return loss, written[1:]


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_those_of_a_plain_loop(family: str, root: Path) -> None:
    task, tokenizer, data = prepared(config_of(root, family))
    model = model_of(root / family, noise=0.5)
    start = data.decoder_start
    assert start is not None
    plain = [plainly(model, example, start, tokenizer.eos_token_id) for example in data.held_out]
    found = answers(root, family)
    assert found.columns["loss"] * found.tokens == pytest.approx(
        np.array([loss for loss, _ in plain]), rel=1e-6
    )
    assert list(found.predictions) == [
        task.decode(tokenizer, example, written)
        for example, (_, written) in zip(data.held_out, plain, strict=True)
    ]
    assert len(set(found.predictions)) > 1
    for shared in run_ranks(answers, 2, root, family, 1):
        assert shared.predictions == found.predictions
        assert shared.scores == pytest.approx(found.scores)


def test_choices_are_judged_by_their_loss(root: Path) -> None:
    config = config_of(
        root,
        "bart",
        "task=defect",
        "eval.metric=accuracy",
        f"data.source={root / 'defects'}",
        "data.held_out_fraction=0.5",
    )
    task, tokenizer, data = prepared(config)
    model = model_of(root / "bart", noise=0.5)
    start = data.decoder_start
    assert start is not None
    found = evaluate(
        model,
        tokenizer,
        data.held_out,
        task=task,
        batch_size=3,
        max_new_tokens=8,
        decoder_start=start,
    )
    for example, prediction in zip(data.held_out, found.predictions, strict=True):
        nats = []
        for choice in example.choices:
            inputs = torch.tensor([list(example.context)])
            shifted = torch.tensor([[start, *choice[:-1]]])
            with torch.no_grad():
                logits = model(input_ids=inputs, decoder_input_ids=shifted).logits[0]
            nats.append(
                functional.cross_entropy(logits, torch.tensor(list(choice)), reduction="sum").item()
            )
        assert prediction == ("no", "yes")[int(np.argmin(nats))]
    assert len(set(found.predictions)) == 2


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="needs peft")
@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_are_on_all_linear_layers_of_both_stacks(family: str, root: Path) -> None:
    model = model_of(root / family)
    linear = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    ]
    lora = METHODS.get("lora")
    lora.prepare(model, config_of(root, family, "method=lora"))
    (adapters,) = lora.layers(model, LWOConfig())
    ends = [f".lora_{part}.default.weight" for part in "AB"]
    assert sorted(adapters.parameter_names) == sorted(f"{n}{end}" for n in linear for end in ends)


def test_what_needs_a_decoder_is_refused_before_anything_is_read(root: Path) -> None:
    for overrides, message in (
        (["task=completion", "data.format=code"], "the task completion needs a decoder-only model"),
        (["train.packing=true"], r"train\.packing = True is for decoders"),
        (["data.chat=true"], r"data\.chat = True is for decoders"),
        (["data.retrieval=2"], r"data\.retrieval = 2 is for decoders"),
    ):
        with pytest.raises(UserError, match=f"{message}.*t5' is an encoder-decoder"):
            prepare(config_of(root, "t5", "data.source=nowhere", *overrides))
    assert not (root / "runs").exists() or not any((root / "runs").glob("*/run.json"))
    task, start = fitting_task(config_of(root, "decoder", "data.chat=true"))
    assert start is None and not task.encodes


def test_the_decoder_s_first_token_is_named_or_asked_for(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "t5", tmp_path / "t5")
    config = ModelConfig(name=str(tmp_path / "t5"))
    for name in ("config.json", "generation_config.json"):
        path = tmp_path / "t5" / name
        values = json.loads(path.read_text())
        values.pop("decoder_start_token_id", None)
        path.write_text(json.dumps(values))
    with pytest.raises(UserError, match="has no decoder_start_token_id; add the one"):
        decoder_start(config)
    values = json.loads(path.read_text()) | {"decoder_start_token_id": 7}
    path.write_text(json.dumps(values))
    assert decoder_start(config) == 7


def test_a_tokenizer_that_ends_answers_otherwise_is_refused(root: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    config = config_of(root, "t5")
    task, start = fitting_task(config)
    tokenizer = AutoTokenizer.from_pretrained(root / "t5")
    ids = [("<end>", tokenizer.eos_token_id), ("<pad>", tokenizer.pad_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        "$A <end> <pad>", special_tokens=ids
    )
    with pytest.raises(UserError, match="ends the answer .* with '<pad>'; use a model whose"):
        prepare_dataset(config, tokenizer, task, decoder_start=start)


def test_answers_that_the_tokenizer_changes_are_counted(root: Path) -> None:
    from tokenizers.normalizers import Replace

    config = config_of(root, "t5")
    task, start = fitting_task(config)
    tokenizer = AutoTokenizer.from_pretrained(root / "t5")
    tokenizer.backend_tokenizer.normalizer = Replace("\n", " ")
    data = prepare_dataset(config, tokenizer, task, decoder_start=start)
    lines = [target for _, target in FUNCTIONS[10:]]
    assert data.counts["notes"]["held out: target that the tokenizer does not keep"] == sum(
        "\n" in target for target in lines
    )
