"""Tasks from text to text: their prompts in tokens, what is learned and scored of them, and what
does not fit.
"""

from __future__ import annotations

import json
from collections import Counter
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from lwo_dist import distributed
from lwo_dist.config import Config
from lwo_dist.data.examples import EvalExample, Note, TrainExample, scored_bytes
from lwo_dist.data.pairs import Pair, Pairs
from lwo_dist.driver import prepare
from lwo_dist.errors import UserError
from lwo_dist.registry import TASKS
from lwo_dist.run import run
from lwo_dist.tasks import metrics
from lwo_dist.tasks.pairs import PairTask
from lwo_dist.tasks.prepare import prepare_dataset
from lwo_dist.training.evaluate import Evaluation, evaluate
from tests.code_samples import END_OF_TEXT, KINDS, make_config, make_tokenizer, tokenizer_of_kind
from tests.models import save_tiny_model
from tests.ranks import run_ranks

WRITING = ("generation", "summarisation", "translation", "repair")
FUNCTIONS = [
    (f"def f_{i}(alpha):\n    '''Gives {i}.'''", f"    beta = {i}\n    return alpha[beta]")
    for i in range(12)
]
CHAT = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|stop|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def task_named(name: str) -> PairTask:
    task: PairTask = TASKS.get(name)
    return task


def source_of(pairs: list[tuple[str, str]], language: str = "python") -> Pairs:
    both = tuple(
        Pair(source, target, "a.jsonl", i, language) for i, (source, target) in enumerate(pairs, 1)
    )
    return Pairs("a", both, both, {})


def small(*overrides: str) -> Config:
    return make_config(
        Path("a"),
        Path("b"),
        "data.format=jsonl",
        "train.sequence_length=200",
        "eval.max_new_tokens=60",
        *overrides,
    )


def training(task: PairTask, source: Pairs, tokenizer: Any, config: Config) -> list[TrainExample]:
    found = list(task.training_examples(source, tokenizer, config))
    examples = [example for example in found if isinstance(example, TrainExample)]
    assert len(examples) == len(found)
    return examples


def evaluation(task: PairTask, source: Pairs, tokenizer: Any, config: Config) -> list[EvalExample]:
    found = task.evaluation_examples(source, tokenizer, config)
    return [example for example in found if isinstance(example, EvalExample)]


def tokens_of(tokenizer: Any, text: str) -> list[int]:
    tokens: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return tokens


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [*WRITING, "defect"])
def test_examples_are_pieces_of_the_whole_texts_own_tokens(name: str, kind: str) -> None:
    task = task_named(name)
    tokenizer = tokenizer_of_kind(kind)
    answers = ["yes", "no"] * 6 if name == "defect" else [target for _, target in FUNCTIONS]
    source = source_of(
        [(code, answer) for (code, _), answer in zip(FUNCTIONS, answers, strict=True)]
    )
    config = small("train.sequence_length=400")
    learned = training(task, source, tokenizer, config)
    scored = evaluation(task, source, tokenizer, config)
    for pair, train, held_out in zip(source.train, learned, scored, strict=True):
        prompt = task.prompt(pair)
        whole = tokenizer(prompt + pair.target)["input_ids"]  # begins as its texts begin
        assert train.input_ids == [*whole, tokenizer.eos_token_id]
        assert list(held_out.context) == whole[: train.target_start]
        known = tokenizer.decode(held_out.context, skip_special_tokens=True)
        assert known + held_out.begins_with == prompt
        end = [] if name == "defect" else [tokenizer.eos_token_id]
        assert list(held_out.target) == [*whole[train.target_start :], *end]
        assert (
            task.decode(tokenizer, held_out, list(held_out.target)) == pair.target == held_out.text
        )
        assert held_out.target_bytes == len((held_out.begins_with + pair.target).encode())
        if name == "defect":
            decoded = [task.decode(tokenizer, held_out, list(c)) for c in held_out.choices]
            assert decoded == ["no", "yes"]


def test_prompts_are_those_of_the_page() -> None:
    page = (Path(__file__).parents[2] / "lwo_dist" / "tasks" / "README.md").read_text()
    pair = Pair("int f();", "yes", "a", 1, "c#", "java")
    for name in (*WRITING, "defect"):
        prompt = task_named(name).prompt(pair)
        shown = "".join(f"{line}\n" for line in prompt.replace(pair.source, "SOURCE").splitlines())
        assert f"```\n{shown}TARGET\n```" in page
        request = task_named(name).request(pair)
        assert request.partition("\n")[0] in page and request.endswith(f"\n\n{pair.source}")


def test_comments_begin_as_the_language_has_them() -> None:
    pair = Pair("SOURCE", "x", "a", 1, "python", "typescript")
    assert task_named("translation").prompt(pair) == "// TypeScript\nSOURCE\n# Python\n"
    unknown = Pair("SOURCE", "x", "a", 1)
    assert task_named("translation").prompt(unknown) == "// original\nSOURCE\n// translation\n"


def test_the_users_own_prompt_may_end_within_a_line() -> None:
    tokenizer = make_tokenizer()
    config = small("data.prompt='for {source} in '")
    source = source_of([("alpha", "beta:"), ("beta", "gamma:")])
    task = task_named("generation")
    for pair, example in zip(
        source.held_out, evaluation(task, source, tokenizer, config), strict=True
    ):
        assert tokenizer.decode(example.context) == f"for {pair.source} in"
        assert example.begins_with == " "  # one token with the name after it
        assert task.decode(tokenizer, example, list(example.target)) == pair.target


def test_the_answer_is_one_line_where_no_target_has_more() -> None:
    """An untuned model goes on, and what it writes then says nothing about its answer."""
    tokenizer = make_tokenizer()
    task = task_named("generation")
    written = tokens_of(tokenizer, "\nalpha\nbeta")
    (line, *_) = evaluation(task, source_of([("a", "b"), ("b", "c")]), tokenizer, small())
    assert task.decode(tokenizer, line, written) == "alpha"
    (lines, *_) = evaluation(task, source_of([("a", "b\nb"), ("b", "c")]), tokenizer, small())
    assert task.decode(tokenizer, lines, written) == "\nalpha\nbeta"


def test_texts_begin_as_the_tokenizer_begins_them(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(bos_token="<s>", pad_token="<pad>")
    from tokenizers.processors import TemplateProcessing

    backend = tokenizer.backend_tokenizer
    begin = tokenizer.bos_token_id
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", begin)])
    task = task_named("generation")
    source = source_of([("alpha " * 40, "beta"), ("beta " * 40, "gamma")])
    (example, *_) = training(task, source, tokenizer, small())
    assert example.input_ids[0] == begin and example.input_ids.count(begin) == 1
    cut = evaluation(task, source, tokenizer, small("train.sequence_length=80"))[0]
    assert len(cut.context) == 20 and cut.context[0] == begin
    assert list(cut.context[1:]) == list(example.input_ids[: example.target_start][-19:])


def test_what_does_not_fit_is_counted() -> None:
    tokenizer = make_tokenizer()
    task = task_named("generation")
    pairs = [("alpha", "beta"), ("alpha " * 40, "beta"), ("alpha", "beta " * 40)]
    source = source_of(pairs)
    config = small("train.sequence_length=40", "eval.max_new_tokens=20")
    found = list(task.training_examples(source, tokenizer, config))
    assert Counter(type(item) for item in found) == {TrainExample: 1, Note: 2}
    scored = task.evaluation_examples(source, tokenizer, config)
    notes = Counter(item.reason for item in scored if isinstance(item, Note))
    assert notes == {"context cut at its front": 1, "target cut to eval.max_new_tokens": 1}
    examples = [item for item in scored if isinstance(item, EvalExample)]
    assert all(len(e.context) <= 20 and len(e.target) <= 20 for e in examples)
    assert tokenizer.decode(examples[1].context).endswith("alpha \n")
    assert examples[2].text == pairs[2][1]
    kept = tokenizer.decode(examples[2].target)
    assert examples[2].target_bytes == len(kept.encode()) < len(pairs[2][1])


def test_the_notes_are_kept_with_the_counts(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pairs = [*FUNCTIONS, ("alpha", "beta " * 80)]
    lines = [json.dumps({"source": source, "target": target}) for source, target in pairs]
    (tmp_path / "train.jsonl").write_text("\n".join(lines[:13]))
    (tmp_path / "test.jsonl").write_text(
        "\n".join(line.replace("Gives", "Has").replace("alpha", "gamma") for line in lines[:13])
    )
    config = make_config(
        tmp_path,
        tmp_path / "runs",
        "data.format=jsonl",
        "task=generation",
        "train.sequence_length=60",
    )
    data = prepare_dataset(config, make_tokenizer(), TASKS.get("generation"))
    assert data.counts["notes"] == {
        "held out: target cut to eval.max_new_tokens": 1,
        "longer than train.sequence_length": 1,
    }
    assert data.counts["windows"] == 12
    assert "1 longer than train.sequence_length" in capsys.readouterr().out
    config = make_config(
        tmp_path, tmp_path / "runs", "data.format=jsonl", "train.sequence_length=17"
    )
    with pytest.raises(
        UserError,
        match=r"no example is left to train on \(.*13 longer than train.sequence_length\)",
    ):
        prepare_dataset(config, make_tokenizer(), TASKS.get("generation"))


def test_the_held_out_pairs_are_chosen_by_hash() -> None:
    source = source_of(FUNCTIONS)
    few = evaluation(task_named("generation"), source, make_tokenizer(), small("eval.num_lines=5"))
    chosen = sorted(source.held_out, key=lambda pair: pair.sha256)[:5]
    assert [example.line for example in few] == sorted(pair.line for pair in chosen)


@pytest.mark.parametrize(
    ("kind", "letter"), [*((kind, "e") for kind in KINDS), ("gpt2", "\u00e9"), ("llama2", "\u00e9")]
)
def test_bytes_of_tokens_are_those_of_their_text(kind: str, letter: str) -> None:
    tokenizer = tokenizer_of_kind(kind)
    text = f"x = '{letter}{letter}'\n    return"
    tokens = tokens_of(tokenizer, text)
    known = len(tokenizer.decode(tokens[:2]).encode())
    ends = range(3, len(tokens) + 1)
    sizes = [scored_bytes(tokenizer, tokens[:2], tokens[2:end]) for end in ends]
    assert sizes == sorted(sizes)
    assert sizes[-1] == len(text.encode()) - known
    with_end = [*tokens[2:], tokenizer.eos_token_id]
    assert scored_bytes(tokenizer, tokens[:2], with_end) == sizes[-1]


def chat_tokenizer() -> Any:
    tokenizer = deepcopy(make_tokenizer(unk_token="<|start|>", pad_token="<|stop|>"))
    tokenizer.chat_template = CHAT
    return tokenizer


def test_chat_models_are_asked_by_their_template() -> None:
    tokenizer = chat_tokenizer()
    start, stop = tokenizer.convert_tokens_to_ids(["<|start|>", "<|stop|>"])
    task = task_named("repair")
    source = source_of([("alpha", "beta"), ("gamma", "delta")])
    (example, _) = training(task, source, tokenizer, small("data.chat=true"))
    asked = f"user\n{task.request(source.train[0])}"
    assert list(example.input_ids) == [
        start,
        *tokens_of(tokenizer, asked),
        stop,
        *tokens_of(tokenizer, "\n"),
        start,
        *tokens_of(tokenizer, "assistant\nbeta"),
        stop,
    ]
    assert tokenizer.decode(example.input_ids[example.target_start :]) == "beta<|stop|>"
    scored = evaluation(task, source, tokenizer, small("data.chat=true"))[0]
    assert tokenizer.decode(scored.context).endswith("<|start|>assistant\n")
    assert sorted([stop, tokenizer.eos_token_id]) == task.end_token_ids(tokenizer)
    assert task.decode(tokenizer, scored, [*scored.target, start]) == "beta"


def test_a_chats_own_messages_are_kept() -> None:
    tokenizer = chat_tokenizer()
    messages = (("system", "alpha"), ("user", "beta"))
    pairs = (Pair("alpha\n\nbeta", "gamma", "a", 1, messages=messages),) * 2
    source = Pairs("a", pairs, pairs, {})
    (example, _) = training(task_named("generation"), source, tokenizer, small("data.chat=true"))
    assert tokenizer.decode(example.input_ids) == (
        "<|start|>system\nalpha<|stop|>\n<|start|>user\nbeta<|stop|>\n"
        "<|start|>assistant\ngamma<|stop|>"
    )
    (plain, _) = training(task_named("generation"), source, tokenizer, small())
    assert tokenizer.decode(plain.input_ids) == f"alpha\n\nbeta\ngamma{END_OF_TEXT}"


def test_texts_that_hold_marks_of_the_template_are_left_out() -> None:
    """They would end the user's message, and say what the model is to answer."""
    source = source_of([("alpha<|stop|>", "beta"), ("alpha", "beta")])
    task = task_named("generation")
    found = list(task.training_examples(source, chat_tokenizer(), small("data.chat=true")))
    assert found[0] == Note("special token of the chat template")
    assert isinstance(found[1], TrainExample)
    (plain, _) = training(task, source, chat_tokenizer(), small())
    stop = chat_tokenizer().convert_tokens_to_ids("<|stop|>")
    assert stop not in plain.input_ids  # as text, where no template is used


def test_a_chat_without_a_template_is_refused() -> None:
    source = source_of([("alpha", "beta"), ("gamma", "delta")])
    task = task_named("generation")
    with pytest.raises(UserError, match="data.chat needs a chat template, and the tokenizer"):
        list(task.training_examples(source, make_tokenizer(), small("data.chat=true")))
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no system message') }}"
    with pytest.raises(UserError, match="refuses messages of the roles user, .*no system message"):
        list(task.training_examples(source, tokenizer, small("data.chat=true")))
    assert task.end_token_ids(tokenizer) == [tokenizer.eos_token_id]  # for all other runs


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs") / "model"
    save_tiny_model(folder, [f"{source}\n{target}\n" for source, target in FUNCTIONS])
    return folder


def test_the_loss_of_a_base_model_is_that_of_plain_transformers(model_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    task = task_named("generation")
    source = source_of(FUNCTIONS)
    examples = evaluation(task, source, tokenizer, small())
    found = evaluate(model, tokenizer, examples, task=task, batch_size=5, max_new_tokens=60)
    summed = []
    for pair in source.held_out:
        whole = tokens_of(tokenizer, task.prompt(pair) + pair.target)
        ids = torch.tensor([[*whole, tokenizer.eos_token_id]])
        start = len(tokens_of(tokenizer, task.prompt(pair)[:-1]))  # "\n" is a token alone here
        assert tokenizer.decode(whole[start]).startswith("\n")
        start += tokenizer.decode(whole[start]) == "\n"
        losses = functional.cross_entropy(
            model(ids).logits[0, start - 1 : -1], ids[0, start:], reduction="none"
        )
        summed.append((losses.sum().item(), len(losses), len(pair.target.encode())))
    nats, tokens, sizes = np.array(summed).T
    assert found.columns["loss"] == pytest.approx(nats / tokens, abs=1e-5)
    assert found.scores["eval/loss"] == pytest.approx(nats.sum() / tokens.sum(), abs=1e-5)
    assert found.columns["loss_per_byte"] == pytest.approx(nats / sizes, abs=1e-5)
    assert found.scores["eval/loss_per_byte"] == pytest.approx(nats.sum() / sizes.sum(), abs=1e-5)


def judged() -> Pairs:
    return source_of(
        [(source, "yes" if i % 3 else "no") for i, (source, _) in enumerate(FUNCTIONS)]
    )


def decided_model(folder: Path) -> Any:
    """One of large weights: which answer it finds more probable depends on the question."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(8)
    return model


def judge(folder: Path) -> Evaluation:
    rank, world_size = distributed.rank(), distributed.world_size()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    task = task_named("defect")
    return evaluate(
        decided_model(folder),
        tokenizer,
        evaluation(task, judged(), tokenizer, small()),
        task=task,
        batch_size=5,
        max_new_tokens=8,
        rank=rank,
        world_size=world_size,
    )


def test_choices_are_judged_as_a_plain_loop_does_it(model_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = decided_model(model_folder)
    task = task_named("defect")
    predicted, losses = [], []
    for pair in judged().held_out:
        start = len(tokens_of(tokenizer, task.prompt(pair)))
        nats = {}
        for answer in ("no", "yes"):
            ids = torch.tensor([tokens_of(tokenizer, task.prompt(pair) + answer)])
            rows = model(ids).logits[0, start - 1 : -1]
            nats[answer] = functional.cross_entropy(rows, ids[0, start:], reduction="sum").item()
        predicted.append(min(nats, key=lambda answer: nats[answer]))
        losses.append(nats[pair.target])
    found = judge(model_folder)
    assert list(found.predictions) == predicted
    assert set(predicted) == {"no", "yes"}
    assert found.columns["loss"] * found.tokens == pytest.approx(np.array(losses), rel=1e-5)
    right = [pair.target for pair in judged().held_out]
    assert found.scores["eval/accuracy"] == pytest.approx(metrics.accuracy(predicted, right))
    assert found.scores["eval/f1"] == pytest.approx(metrics.f1(predicted, right))
    for shared in run_ranks(judge, 2, model_folder):
        assert shared.scores == found.scores and shared.predictions == found.predictions


def test_defects_of_one_kind_are_refused(tmp_path: Path) -> None:
    def config(*answers: str) -> Config:
        records = [{"source": f"f{i}", "target": answer} for i, answer in enumerate(answers)]
        (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, records)))
        held_out = [{"source": f"g{i}", "target": answer} for i, answer in enumerate(["yes", "no"])]
        (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, held_out)))
        return make_config(tmp_path, tmp_path, "data.format=jsonl")

    task = task_named("defect")
    with pytest.raises(
        UserError, match="all 3 train examples is 'no'; give examples of no and yes"
    ):
        task.read(config("no", "no", "no").data, tmp_path)
    with pytest.raises(
        UserError, match="train.jsonl, line 2 has the answer 'maybe'; give no or yes"
    ):
        task.read(config("no", "maybe").data, tmp_path)
    assert len(task.read(config("no", "yes").data, tmp_path).train) == 2


LINES = [(f"def f_{i}(alpha):\n", f"    return alpha[{i}]") for i in range(12)]


def write_data(folder: Path, name: str) -> str:
    """A data set for the task; returns its format."""
    records: list[dict[str, Any]]
    file_format = "jsonl"
    if name == "defect":
        file_format = "devign"
        records = [{"func": source, "target": i % 2} for i, (source, _) in enumerate(FUNCTIONS)]
    elif name == "completion":
        file_format = "repobench"
        records = [{"cropped_code": source, "next_line": line} for source, line in LINES]
    else:
        records = [{"source": source, "target": target} for source, target in FUNCTIONS]
    folder.mkdir()
    for side, some in (("train", records[:8]), ("test", records[8:])):
        (folder / f"{side}.jsonl").write_text("\n".join(map(json.dumps, some)))
    return file_format


@pytest.mark.parametrize("name", [*WRITING, "defect", "completion"])
def test_every_task_trains_and_is_scored(name: str, model_folder: Path, tmp_path: Path) -> None:
    file_format = write_data(tmp_path / "data", name)
    config = make_config(
        tmp_path / "data",
        tmp_path / "runs",
        f"data.format={file_format}",
        f"task={name}",
        f"model.name={model_folder}",
        "strategy=replicate",
        "train.steps=4",
        "train.global_batch_size=4",
        "train.sequence_length=120",
        "eval.max_new_tokens=40",
        "lwo.steps_per_layer=2",
        "lwo.lr=1e-2",
        "tracking.enabled=false",
        "cluster.num_workers=1",
    )
    (summary,) = run_ranks(_whole_run, 1, config)
    before, after = summary["eval"]["before"], summary["eval"]["after"]
    names = [score.name for score in TASKS.get(name).scores]
    assert [key.removeprefix("eval/") for key in before][:-1] == names
    assert after["eval/loss"] < before["eval/loss"]
    assert after["eval/loss_per_byte"] < before["eval/loss_per_byte"]
    gain = summary["eval"]["gain_95"]["loss_per_byte"]["mean"]
    assert gain == pytest.approx(
        before["eval/loss_per_byte"] - after["eval/loss_per_byte"], abs=1e-5
    )
    assert (before[f"eval/{TASKS.get(name).example[1]}"], len(LINES) - 8) == (4, 4)


def _whole_run(config: Config) -> dict[str, Any] | None:
    return run(distributed.on_rank_0(prepare, config))
