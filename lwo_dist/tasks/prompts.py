"""Prompts and answers in tokens: plain text for base models, or by a chat template."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from jinja2 import TemplateError

from lwo_dist.config import DataConfig
from lwo_dist.data.examples import (
    EncoderTokenizer,
    Note,
    PromptedText,
    PromptTokenizer,
    end_of_text_id,
)
from lwo_dist.data.pairs import Pair, Pairs
from lwo_dist.errors import UserError, first_line

from .worked_examples import WorkedExamples

__all__ = ["Prompts", "end_of_message"]


class Prompts:
    """Prompts in tokens, as the settings of the data ask for them.

    Args:
        ask: the task's prompt of a pair; with `data.chat` its request.
        with_examples: put `data.retrieval` worked examples before each prompt.
        encodes: the prompts are for an encoder.

    Raises:
        UserError: `data.chat` without a chat template.
    """

    def __init__(
        self,
        ask: Callable[[Pair], str],
        tokenizer: Any,
        config: DataConfig,
        source: Pairs,
        *,
        with_examples: bool,
        encodes: bool = False,
    ):
        self._ask = ask
        self._tokenizer = tokenizer
        self._config = config
        self._tokenize: PromptTokenizer | EncoderTokenizer = (
            EncoderTokenizer(tokenizer) if encodes else PromptTokenizer(tokenizer, chat=config.chat)
        )
        self.begin = self._tokenize.begin
        self.end = end_of_message(tokenizer) if config.chat else end_of_text_id(tokenizer)
        """The token after a target."""
        one_line = not any("\n" in pair.target for pair in source.train)
        self.ends_with = "\n" if one_line and not config.chat else ""
        """What ends an answer of a model that does not know the token: an untuned one goes on."""
        self._examples = None
        if with_examples:
            usable = [pair for pair in source.train if not self._is_marked(pair)]
            self._examples = WorkedExamples(usable, config)

    def __call__(
        self, pair: Pair, targets: Sequence[str], fits: Callable[[PromptedText], bool]
    ) -> list[PromptedText] | Note:
        """The prompt of `pair` and each of `targets` in tokens; or the reason why not.

        Before it come as many worked examples as fit, the best one last. Without any, a text is
        given even if it does not fit.
        """
        if self._is_marked(pair):
            return Note("special token of the chat template")
        examples = self._examples(pair) if self._examples else []
        for first in range(len(examples)):
            found = self._tokenized(pair, targets, examples[first:])
            if not isinstance(found, Note) and all(map(fits, found)):
                return found
        return self._tokenized(pair, targets, [])

    def _tokenized(
        self, pair: Pair, targets: Sequence[str], examples: Sequence[Pair]
    ) -> list[PromptedText] | Note:
        prompt = self._text(pair, examples)
        found = [self._tokenize(prompt, target) for target in targets]
        whole = [text for text in found if text is not None]
        return whole if len(whole) == len(found) else Note("no token border before the target")

    def _is_marked(self, pair: Pair) -> bool:
        """Whether its texts hold a special token, which the template's text would be read as."""
        texts = [pair.source, pair.target, *(text for _, text in pair.messages)]
        marks = _special_texts(self._tokenizer) if self._config.chat else ()
        return any(mark in text for mark in marks for text in texts)

    def _text(self, pair: Pair, examples: Sequence[Pair]) -> str:
        if not self._config.chat:
            before = [f"{self._asked(each)}{each.target}\n\n" for each in examples]
            return "".join([*before, self._asked(pair)])
        system, asked = self._messages(pair)
        turns = [
            message
            for each in examples
            for message in (*self._messages(each)[1], {"role": "assistant", "content": each.target})
        ]
        messages = [*system, *turns, *asked]
        return _chat_text(self._tokenizer, messages, add_generation_prompt=True)

    def _asked(self, pair: Pair) -> str:
        template = self._config.prompt
        return self._ask(pair) if template is None else template.replace("{source}", pair.source)

    def _messages(self, pair: Pair) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
        """The system's messages, which come first in a chat, and the others."""
        if not pair.messages or self._config.prompt is not None:
            return [], [{"role": "user", "content": self._asked(pair)}]
        messages = [{"role": role, "content": text} for role, text in pair.messages]
        first = next((i for i, each in enumerate(messages) if each["role"] != "system"), 0)
        return messages[:first], messages[first:]


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
def end_of_message(tokenizer: Any) -> int:
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
