"""A task's examples: prepared once by one process and read by all.

They are in <cache>/datasets/<task>-v<layout>-<fingerprint>. The fingerprint covers the source's
contents, the tokenizer and the settings that examples depend on.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

from lwo_dist import distributed
from lwo_dist.cache import build_once, cache_folder
from lwo_dist.config import Config
from lwo_dist.console import say
from lwo_dist.data.dataset import PreparedData, load_dataset, write_dataset
from lwo_dist.data.examples import EvalExample, Note, end_of_text_id, text_start

from .base import Task

__all__ = ["prepare_dataset"]

_LAYOUT = 2  # Raised when the files hold more, or other columns, of the same examples.


def prepare_dataset(
    config: Config,
    tokenizer: Any,
    task: Task,
    *,
    is_builder: bool = True,
    decoder_start: int | None = None,
) -> PreparedData:
    """Prepare the examples of `config`, or reuse existing ones. A collective.

    Args:
        tokenizer: a Hugging Face tokenizer with an end-of-text token.
        task: the task of `config.task`.
        is_builder: whether this rank reads the source; true on rank 0 and, if nodes do not share
            the cache, on the first rank of each node.
        decoder_start: first token of the decoder, with a task for encoder-decoders.

    Raises:
        UserError: on all ranks. The source or a setting is invalid, the cache cannot be written, or
            a worker cannot see it.
    """
    fingerprint = ""
    folder = Path()
    with distributed.errors_on_all_ranks():
        if is_builder:
            fingerprint, folder = _build(config, tokenizer, task)
    fingerprint, folder = distributed.broadcast_object((fingerprint, folder))
    with distributed.errors_on_all_ranks():
        length = config.train.sequence_length
        return load_dataset(folder, fingerprint, tokenizer, length, decoder_start=decoder_start)


def _build(config: Config, tokenizer: Any, task: Task) -> tuple[str, Path]:
    task.check(config)
    task.end_token_ids(tokenizer)  # refuse an unusable tokenizer before reading the source
    cache = cache_folder(config)
    source = task.read(config.data, cache)
    length = config.train.sequence_length
    settings: list[Any] = [
        length,
        config.eval.num_lines,
        config.eval.max_new_tokens,
    ]
    if config.train.packing:
        settings.append("packing")
    if config.data.prompt is not None or config.data.chat:
        settings += [config.data.prompt, config.data.chat and tokenizer.chat_template]
    data = config.data
    settings += [[data.retrieval, data.retrieval_in_training]] if data.retrieval else []
    own = config.completion.model_dump(exclude_defaults=True)
    settings += [own] if own else []
    settings += text_start(tokenizer)
    settings += ["encoder-decoder"] if task.encodes else []
    # config.task, not task.name: a task that extends another may have kept its name.
    parts = [
        task.version,
        config.task,
        source.identity,
        _tokenizer_identity(tokenizer),
        settings,
    ]
    fingerprint = hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def write(folder: Path) -> None:
        say("tokenising the source")
        found = task.evaluation_examples(source, tokenizer, config)
        held_out = [item for item in found if isinstance(item, EvalExample)]
        notes = Counter(f"held out: {item.reason}" for item in found if isinstance(item, Note))
        many = task.example[1]
        counts = {
            **source.counts,
            f"held_out_{many}": len(held_out),
            f"held_out_{many}_asked": config.eval.num_lines,
        }
        train = task.training_examples(source, tokenizer, config)
        packed_length = length if config.train.packing else None
        noted = write_dataset(folder, train, held_out, counts, notes, packed_length=packed_length)
        if noted:
            say(f"examples: {', '.join(f'{count} {reason}' for reason, count in noted.items())}")

    name = f"{task.name}-v{_LAYOUT}-{fingerprint[:16]}"
    return fingerprint, build_once(cache / "datasets" / name, write)


def _tokenizer_identity(tokenizer: Any) -> list[Any]:
    identity = [type(tokenizer).__name__, end_of_text_id(tokenizer)]
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return [*identity, sorted(tokenizer.get_vocab().items())]
    whole = json.loads(backend.to_str())
    # Left over from the tokenizer's last call; our calls use neither.
    return [
        *identity,
        {key: value for key, value in whole.items() if key not in ("truncation", "padding")},
    ]
