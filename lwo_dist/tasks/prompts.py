"""Prompts and answers in tokens: plain text for base models, or by a chat template."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from jinja2 import TemplateError

from lwo_dist.config import DataConfig
from lwo_dist.data.examples import Note, PromptedText, PromptTokenizer, end_of_text_id
from lwo_dist.data.pairs import Pair, Pairs
from lwo_dist.errors import UserError, first_line

__all__ = ["Prompts", "end_of_message"]


class Prompts:
    """Prompts in tokens, as the settings of the data ask for them.

    Args:
        ask: the task's prompt of a pair; with `data.chat` its request.

    Raises:
        UserError: `data.chat` without a chat template.
    """

    def __init__(
        self, ask: Callable[[Pair], str], tokenizer: Any, config: DataConfig, source: Pairs
    ):
        self._ask = ask
        self._tokenizer = tokenizer
        self._config = config
        self._tokenize = PromptTokenizer(tokenizer, chat=config.chat)
        self.begin = self._tokenize.begin
        self.end = end_of_message(tokenizer) if config.chat else end_of_text_id(tokenizer)
        """The token after a target."""
        one_line = not any("\n" in pair.target for pair in source.train)
        self.ends_with = "\n" if one_line and not config.chat else ""
        """What ends an answer of a model that does not know the token: an untuned one goes on."""

    def __call__(self, pair: Pair, target: str) -> PromptedText | Note:
        """The prompt of `pair` and `target` in tokens; or the reason why not."""
        texts = [pair.source, target, *(text for _, text in pair.messages)]
        if self._config.chat and any(
            token in text for token in _special_texts(self._tokenizer) for text in texts
        ):
            return Note("special token of the chat template")
        found = self._tokenize(self._text(pair), target)
        return Note("no token border before the target") if found is None else found

    def _text(self, pair: Pair) -> str:
        template = self._config.prompt
        asked = self._ask(pair) if template is None else template.replace("{source}", pair.source)
        if not self._config.chat:
            return asked
        if pair.messages and template is None:
            messages = [{"role": role, "content": text} for role, text in pair.messages]
        else:
            messages = [{"role": "user", "content": asked}]
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
