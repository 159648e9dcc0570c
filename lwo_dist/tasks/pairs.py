"""Tasks from text to text: given a source, write or choose the target.

Prompt, target and the token that ends them are tokenised as one text, and only what follows the
prompt is learned. Prompts are plain text, for base models; the page of the tasks shows them. Each
ends with a line break, which is a border of tokens for most tokenizers: where the target's
indentation is in the same token, that token is the first to generate, as in line completion.

With `data.chat` the prompt is a user's message, written by the model's own chat template, and the
target ends as that template ends a message.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy.typing as npt
from jinja2 import TemplateError

from lwo_dist.config import Config, DataConfig
from lwo_dist.data.examples import (
    EvalExample,
    Note,
    PromptTokenizer,
    TrainExample,
    end_of_text_id,
    scored_bytes,
    text_after,
)
from lwo_dist.data.pairs import Pair, Pairs
from lwo_dist.data.public import read_public
from lwo_dist.errors import UserError, first_line

from . import metrics
from .base import LOSS, LOSS_PER_BYTE, Task, byte_losses, token_losses
from .scores import Column, Score, Scores

__all__ = [
    "ChoiceTask",
    "DefectDetection",
    "Generation",
    "PairTask",
    "Repair",
    "Summarisation",
    "Translation",
    "choose",
    "cut_context",
]

EXACT_MATCH = Score(
    "exact_match", "exact match", "%", headline=True, count_label="answers exactly right"
)
EDIT_SIMILARITY = Score("edit_similarity", "edit similarity", "%")
BLEU = Score("bleu", "BLEU", headline=True, per_example=False)
CODEXGLUE_BLEU = Score("codexglue_bleu", "CodeXGLUE's BLEU", per_example=False)
CODE_SCORES = (EXACT_MATCH, BLEU, CODEXGLUE_BLEU, EDIT_SIMILARITY, LOSS, LOSS_PER_BYTE)
"""Of a task that writes code."""

_MARKS = {"python": "#", "ruby": "#", "shell": "#", "r": "#", "perl": "#", "sql": "--", "lua": "--"}
_NAMES = {
    "c#": "C#",
    "cpp": "C++",
    "javascript": "JavaScript",
    "typescript": "TypeScript",
    "tsx": "TypeScript",
}


class PairTask(Task):
    """What tasks from text to text have in common."""

    example = ("answer", "answers")

    def read(self, config: DataConfig, cache: Path) -> Pairs:
        """The usable pairs of the source, split.

        Raises:
            UserError: a source that cannot be read, or has too few pairs.
        """
        if config.format == "code":
            return self.read_code(config, cache)
        return read_public(config)

    @abstractmethod
    def read_code(self, config: DataConfig, cache: Path) -> Pairs:
        """The pairs in files of code, or in a git history."""

    @abstractmethod
    def prompt(self, pair: Pair) -> str:
        """The text before the target, for a base model."""

    @abstractmethod
    def request(self, pair: Pair) -> str:
        """What a user asks of a chat model."""

    def training_examples(
        self, source: Pairs, tokenizer: Any, config: Config
    ) -> Iterator[TrainExample | Note]:
        """One example a pair. A pair that is longer than `train.sequence_length` is left out."""
        prompts = _Prompts(self, tokenizer, config.data, source)
        for pair in source.train:
            found = prompts(pair, pair.target)
            if isinstance(found, Note):
                yield found
            elif len(found.tokens) + 1 > config.train.sequence_length:
                yield Note("longer than train.sequence_length")
            else:
                yield TrainExample([*found.tokens, prompts.end], found.start)

    def evaluation_examples(
        self, source: Pairs, tokenizer: Any, config: Config
    ) -> list[EvalExample | Note]:
        """`eval.num_lines` of the held-out pairs, those with the lowest hashes, in their order.

        A context that leaves no room for an answer is cut at its front.

        Raises:
            UserError: fewer than two, too few for a confidence interval.
        """
        prompts = _Prompts(self, tokenizer, config.data, source)
        return choose(
            source,
            lambda pair: self._evaluation(prompts, tokenizer, pair, config),
            config.eval.num_lines,
            self.example[1],
        )

    def _evaluation(
        self, prompts: _Prompts, tokenizer: Any, pair: Pair, config: Config
    ) -> list[EvalExample | Note]:
        found = prompts(pair, pair.target)
        if isinstance(found, Note):
            return [found]
        target = [*found.tokens[found.start :], prompts.end]
        limit = config.train.sequence_length - config.eval.max_new_tokens
        context, notes = cut_context(found.tokens[: found.start], limit, prompts.begin)
        if len(target) > config.eval.max_new_tokens:
            notes.append(Note("target cut to eval.max_new_tokens"))
            target = target[: config.eval.max_new_tokens]
        example = EvalExample(
            context,
            target,
            pair.target,
            pair.name,
            pair.line,
            found.begins_with,
            scored_bytes(tokenizer, context, target),
            ends_with=prompts.ends_with,
        )
        return [example, *notes]

    def end_token_ids(self, tokenizer: Any) -> list[int]:
        """The end of the text, and of a message where the tokenizer has a chat template.

        Raises:
            UserError: the tokenizer has no end-of-text token.
        """
        ends = {end_of_text_id(tokenizer)}
        with suppress(UserError):  # no template, or one that a chat would be refused for
            ends.add(_end_of_message(tokenizer))
        return sorted(ends)

    def decode(self, tokenizer: Any, example: EvalExample, token_ids: list[int]) -> str:
        """The text up to the first token that ends an answer; its first line, where no target has
        more."""
        ends = set(self.end_token_ids(tokenizer))
        end = next((i for i, token in enumerate(token_ids) if token in ends), len(token_ids))
        text = text_after(tokenizer, example.context, token_ids[:end])
        text = text.removeprefix(example.begins_with)
        if example.ends_with:
            text = text.lstrip(example.ends_with).partition(example.ends_with)[0]
        return text

    def score(
        self,
        examples: Sequence[EvalExample],
        predictions: Sequence[str],
        losses: Column,
        tokens: npt.NDArray[Any],
    ) -> Scores:
        """Those of `compare`, and the losses."""
        found = self.compare(predictions, [example.text for example in examples])
        loss, token_column = token_losses(losses, tokens)
        per_byte, byte_column = byte_losses(losses, examples)
        return Scores(
            totals={**found.totals, "loss": loss, "loss_per_byte": per_byte},
            columns={**found.columns, "loss": token_column, "loss_per_byte": byte_column},
        )

    def compare(self, predictions: Sequence[str], references: Sequence[str]) -> Scores:
        """The scores of the answers alone: of code."""
        columns = {
            "exact_match": metrics.exact_matches(predictions, references),
            "edit_similarity": metrics.edit_similarities(predictions, references),
        }
        totals = {name: float(column.mean()) for name, column in columns.items()}
        totals["bleu"] = metrics.bleu(predictions, references)
        totals["codexglue_bleu"] = metrics.codexglue_bleu(predictions, references)
        return Scores(totals, columns)


class ChoiceTask(PairTask):
    """A task whose targets are a few answers: the most probable one is chosen.

    The loss is that of the right answer, without the token that ends it.
    """

    answers: ClassVar[tuple[str, ...]]

    def read(self, config: DataConfig, cache: Path) -> Pairs:
        """As `PairTask.read`.

        Raises:
            UserError: also for a target that is not among the answers, and for a side with one
                answer alone.
        """
        found = super().read(config, cache)
        for side, pairs in (("train", found.train), ("held-out", found.held_out)):
            for pair in pairs:
                if pair.target not in self.answers:
                    raise UserError(
                        f"data.source = {found.source}: {pair.name}, line {pair.line} has the"
                        f" answer {pair.target[:40]!r}; give {' or '.join(self.answers)}"
                    )
            if len(kinds := {pair.target for pair in pairs}) == 1:
                raise UserError(
                    f"data.source = {found.source}: the answer of all {len(pairs)} {side} examples"
                    f" is {kinds.pop()!r}; give examples of {' and '.join(self.answers)}"
                )
        return found

    def _evaluation(
        self, prompts: _Prompts, tokenizer: Any, pair: Pair, config: Config
    ) -> list[EvalExample | Note]:
        found = {answer: prompts(pair, answer) for answer in self.answers}
        for text in found.values():
            if isinstance(text, Note):
                return [text]
        right = found[pair.target]
        context = right.tokens[: right.start]
        if any(text.tokens[: text.start] != context for text in found.values()):
            return [Note("answers of which the prompt's tokens depend")]
        choices = [text.tokens[text.start :] for text in found.values()]
        limit = config.train.sequence_length - max(map(len, choices))
        context, notes = cut_context(context, limit, prompts.begin)
        target = right.tokens[right.start :]
        example = EvalExample(
            context,
            target,
            pair.target,
            pair.name,
            pair.line,
            right.begins_with,
            scored_bytes(tokenizer, context, target),
            choices,
        )
        return [example, *notes]


class Generation(PairTask):
    """`task: generation`: from a signature and its documentation to the body."""

    name = "generation"
    formats = ("code", "jsonl", "concode")
    example = ("function", "functions")
    scores = CODE_SCORES

    def read_code(self, config: DataConfig, cache: Path) -> Pairs:
        from lwo_dist.data.private import read_generation

        return read_generation(config, cache)

    def prompt(self, pair: Pair) -> str:
        return f"{pair.source}\n"

    def request(self, pair: Pair) -> str:
        return f"Continue this {_language(pair)}. Answer with the code only.\n\n{pair.source}"


class Summarisation(PairTask):
    """`task: summarisation`: from a function to the first sentence of its documentation."""

    name = "summarisation"
    formats = ("code", "jsonl", "code-to-text")
    example = ("summary", "summaries")
    scores = (
        Score("smoothed_bleu4", "smoothed BLEU-4", headline=True),
        Score("rouge_l", "ROUGE-L", headline=True),
        Score("chrf", "chrF"),
        LOSS,
        LOSS_PER_BYTE,
    )

    def read_code(self, config: DataConfig, cache: Path) -> Pairs:
        from lwo_dist.data.private import read_summarisation

        return read_summarisation(config, cache)

    def prompt(self, pair: Pair) -> str:
        return f"{pair.source}\n{_mark(pair.language)} summary:\n"

    def request(self, pair: Pair) -> str:
        return f"Summarise this {_language(pair)} in one sentence.\n\n{pair.source}"

    def compare(self, predictions: Sequence[str], references: Sequence[str]) -> Scores:
        columns = {
            "smoothed_bleu4": metrics.smoothed_bleu4(predictions, references),
            "rouge_l": metrics.rouge_l(predictions, references),
            "chrf": metrics.chrf(predictions, references),
        }
        return Scores({name: float(column.mean()) for name, column in columns.items()}, columns)


class Translation(PairTask):
    """`task: translation`: from one programming language to another."""

    name = "translation"
    formats = ("jsonl", "code-to-code-trans")
    example = ("translation", "translations")
    scores = CODE_SCORES

    def read_code(self, config: DataConfig, cache: Path) -> Pairs:
        raise AssertionError("refused by check()")

    def prompt(self, pair: Pair) -> str:
        source, target = pair.source_language, pair.language
        return (
            f"{_mark(source)} {_shown(source) or 'original'}\n{pair.source}\n"
            f"{_mark(target)} {_shown(target) or 'translation'}\n"
        )

    def request(self, pair: Pair) -> str:
        target = f" to {_shown(pair.language)}" if pair.language else ""
        source = f"{_shown(pair.source_language)} code".strip()
        return f"Translate this {source}{target}. Answer with the code only.\n\n{pair.source}"


class Repair(PairTask):
    """`task: repair`: from a function with a bug to the function without it."""

    name = "repair"
    formats = ("code", "jsonl", "code-refinement")
    example = ("fix", "fixes")
    scores = CODE_SCORES

    def read_code(self, config: DataConfig, cache: Path) -> Pairs:
        from lwo_dist.data.private import read_repair

        return read_repair(config, cache)

    def prompt(self, pair: Pair) -> str:
        mark = _mark(pair.language)
        return f"{mark} buggy\n{pair.source}\n{mark} fixed\n"

    def request(self, pair: Pair) -> str:
        return f"Fix the bug in this {_language(pair)}. Answer with the code only.\n\n{pair.source}"


class DefectDetection(ChoiceTask):
    """`task: defect`: whether a function has a bug."""

    name = "defect"
    formats = ("code", "jsonl", "devign")
    example = ("function", "functions")
    answers = ("no", "yes")
    scores = (
        Score("accuracy", "accuracy", "%", headline=True, count_label="functions judged rightly"),
        Score("f1", "F1 of yes", "%", headline=True, per_example=False),
        LOSS,
        LOSS_PER_BYTE,
    )

    def read_code(self, config: DataConfig, cache: Path) -> Pairs:
        from lwo_dist.data.private import read_defect

        return read_defect(config, cache)

    def prompt(self, pair: Pair) -> str:
        mark = _mark(pair.language)
        return f"{pair.source}\n{mark} Does this function have a bug, yes or no?\n"

    def request(self, pair: Pair) -> str:
        return (
            f"Does this {_language(pair)} have a bug? Answer with yes or no alone.\n\n{pair.source}"
        )

    def compare(self, predictions: Sequence[str], references: Sequence[str]) -> Scores:
        accuracy = metrics.exact_matches(predictions, references)
        return Scores(
            {"accuracy": float(accuracy.mean()), "f1": metrics.f1(predictions, references)},
            {"accuracy": accuracy},
        )


def choose(
    source: Pairs,
    make: Callable[[Pair], list[EvalExample | Note]],
    count: int,
    many: str,
) -> list[EvalExample | Note]:
    """The examples of `count` of the held-out pairs, those with the lowest hashes, in their order.

    Args:
        make: the example of a pair, and notes on it.
        many: what they are called.

    Raises:
        UserError: fewer than two, too few for a confidence interval.
    """
    made: dict[Pair, list[EvalExample | Note]] = {}
    missing = count
    for pair in sorted(source.held_out, key=lambda pair: pair.sha256):
        if missing:
            made[pair] = make(pair)
            missing -= any(isinstance(item, EvalExample) for item in made[pair])
    found = [item for pair in source.held_out for item in made.get(pair, [])]
    usable = sum(isinstance(item, EvalExample) for item in found)
    if usable < 2:
        reasons = Counter(item.reason for item in found if isinstance(item, Note))
        shown = ", ".join(f"{n} {reason}" for reason, n in sorted(reasons.items()))
        raise UserError(
            f"data.source = {source.source}: {usable} of {len(source.held_out)} held-out {many} can"
            f" be scored (skipped: {shown or 'none'}), at least 2 are needed; give a larger source"
            " or raise data.held_out_fraction"
        )
    return found


def cut_context(
    context: Sequence[int], limit: int, begin: Sequence[int]
) -> tuple[list[int], list[EvalExample | Note]]:
    """The last `limit` tokens of a context, of which `begin` are still the first; and a note if it
    was cut.
    """
    if len(context) <= limit:
        return list(context), []
    cut = [*begin, *context[len(context) - limit + len(begin) :]]
    return cut, [Note("context cut at its front")]


class _Prompts:
    """Prompts in tokens, as the settings of the data ask for them.

    Raises:
        UserError: `data.chat` without a chat template.
    """

    def __init__(self, task: PairTask, tokenizer: Any, config: DataConfig, source: Pairs):
        self._task = task
        self._tokenizer = tokenizer
        self._config = config
        self._tokenize = PromptTokenizer(tokenizer, chat=config.chat)
        self.begin = self._tokenize.begin
        self.end = _end_of_message(tokenizer) if config.chat else end_of_text_id(tokenizer)
        """The token after a target."""
        one_line = not any("\n" in pair.target for pair in source.train)
        self.ends_with = "\n" if one_line and not config.chat else ""
        """What ends an answer of a model that does not know the token: an untuned one goes on."""

    def __call__(self, pair: Pair, target: str) -> Any:
        """The prompt of `pair` and `target` in tokens, a `PromptedText`; or the reason why not."""
        texts = [pair.source, target, *(text for _, text in pair.messages)]
        if self._config.chat and any(
            token in text for token in _special_texts(self._tokenizer) for text in texts
        ):
            return Note("special token of the chat template")
        found = self._tokenize(self._text(pair), target)
        return Note("no token border before the target") if found is None else found

    def _text(self, pair: Pair) -> str:
        template = self._config.prompt
        own = None if template is None else template.replace("{source}", pair.source)
        if not self._config.chat:
            return self._task.prompt(pair) if own is None else own
        if pair.messages and own is None:
            messages = [{"role": role, "content": text} for role, text in pair.messages]
        else:
            request = self._task.request(pair) if own is None else own
            messages = [{"role": "user", "content": request}]
        return _chat_text(self._tokenizer, messages, add_generation_prompt=True)


def _chat_text(tokenizer: Any, messages: list[dict[str, str]], **options: Any) -> str:
    if not tokenizer.chat_template:
        raise UserError(
            f"data.chat needs a chat template, and the tokenizer {tokenizer.name_or_path} has none;"
            " use a chat model, or data.chat: false"
        )
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))
    except (TemplateError, TypeError, ValueError) as error:
        roles = ", ".join(message["role"] for message in messages)
        raise UserError(
            f"the chat template of {tokenizer.name_or_path} refuses messages of the roles {roles}:"
            f" {first_line(error)}; change them, or use data.chat: false"
        ) from None


@cache
def _end_of_message(tokenizer: Any) -> int:
    """The token with which the chat template ends an answer."""
    probe = "\u2026answer\u2026"
    messages = [{"role": "user", "content": "question"}, {"role": "assistant", "content": probe}]
    after = _chat_text(tokenizer, messages).rpartition(probe)[2]
    tokens = tokenizer(after, add_special_tokens=False)["input_ids"]
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    return next((token for token in tokens if token in special), end_of_text_id(tokenizer))


@cache
def _special_texts(tokenizer: Any) -> tuple[str, ...]:
    return tuple(str(token) for token in tokenizer.added_tokens_decoder.values() if token.special)


def _mark(language: str) -> str:
    """What begins a comment to the end of the line."""
    return _MARKS.get(language, "//")


def _shown(language: str) -> str:
    return _NAMES.get(language, language.capitalize())


def _language(pair: Pair) -> str:
    return f"{_shown(pair.language)} function".strip()
