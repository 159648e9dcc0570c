"""Examples on disk: made once, by one process, as memory-mapped Arrow; read by all.

<cache>/datasets/<task>-<fingerprint>/train.arrow      TrainExample, one a row
<cache>/datasets/<task>-<fingerprint>/held_out.arrow   EvalExample, one a row
<cache>/datasets/<task>-<fingerprint>/about.json       counts

The fingerprint is that of the files' contents, the tokenizer and the settings that examples depend
on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from datasets import Dataset, Features, Sequence, Value
from datasets.arrow_writer import ArrowWriter

from lwo_dist.config import Config, DataConfig
from lwo_dist.errors import UserError

from .cache import build_once, cache_folder
from .examples import EvalExample, TrainExample, end_of_text_id, pad_id

__all__ = ["ExampleMaker", "PreparedData", "Source", "prepare_dataset"]

# Raise it when the same files would give other examples: caches of before are then not read.
_FORMAT = 1
_TRAIN = Features(
    {
        "input_ids": Sequence(Value("int32")),
        "length": Value("int32"),
        "target_start": Value("int32"),
    }
    | {"label_tokens": Value("int32")}
)
_HELD_OUT = Features(
    {
        "context": Sequence(Value("int32")),
        "target": Sequence(Value("int32")),
        "text": Value("large_string"),
    }
    | {"name": Value("string"), "line": Value("int32")}
)


class Source(Protocol):
    """What a task reads its examples from."""

    @property
    def identity(self) -> Any:
        """JSON values that change when the examples would."""

    @property
    def counts(self) -> dict[str, Any]:
        """Numbers for people: how much was read and skipped."""


class ExampleMaker(Protocol):
    """The part of a task that makes examples; the modules of `lwo_dist.tasks` are such."""

    NAME: str

    def read(self, config: DataConfig, cache: Path) -> Source:
        """Find and judge the input; UserError where there is none to use."""

    def training_examples(
        self, source: Any, tokenizer: Any, config: Config
    ) -> Iterator[TrainExample]:
        """Examples of at most `train.sequence_length` tokens, in a fixed order."""

    def evaluation_examples(self, source: Any, tokenizer: Any, config: Config) -> list[EvalExample]:
        """Up to `eval.num_lines` examples; context and target together at most
        `train.sequence_length` tokens.
        """

    def end_token_ids(self, tokenizer: Any) -> list[int]:
        """The tokens after which a completion has ended; UserError where the tokenizer has none."""


@dataclass(frozen=True)
class PreparedData:
    """The examples of a run. Equal on every rank."""

    train: Dataset
    """Columns `input_ids`, `length`, `target_start`, `label_tokens`; memory-mapped."""
    lengths: npt.NDArray[np.int32]
    """[examples], tokens of each."""
    label_tokens: npt.NDArray[np.int32]
    """[examples], tokens of each that count in the loss."""
    held_out: tuple[EvalExample, ...]
    counts: Mapping[str, Any]
    """`train_files`, `held_out_files`, `skipped` (reason -> number), `windows`, `tokens` (context
    included), `label_tokens`, `held_out_lines`, `held_out_lines_asked`."""
    fingerprint: str
    """64 hex digits. A resumed run must find the same."""
    folder: Path
    pad_id: int
    """Neither the end-of-text token nor a line end."""
    sequence_length: int


def prepare_dataset(
    config: Config,
    tokenizer: Any,
    task: ExampleMaker,
    *,
    is_builder: bool = True,
    broadcast: Callable[[Any], Any] = lambda value: value,
) -> PreparedData:
    """Make the examples of `config`, or find those that were made before. Every rank calls this.

    Args:
        tokenizer: a Hugging Face tokenizer with an end-of-text token.
        is_builder: true on one rank, the only one that reads the source.
        broadcast: a collective that returns the builder's value on every rank. It tells the others
            where the examples are, or why there are none: an error of the builder is raised on
            every rank, so that none waits.

    Raises:
        UserError: the source or a setting is wrong, the cache cannot be written, or this worker
            does not see it.
    """
    fingerprint, folder, failure = "", Path(), None
    if is_builder:
        try:
            fingerprint, folder = _build(config, tokenizer, task)
        except Exception as error:
            failure = error
    told = (
        None if failure is None else (isinstance(failure, UserError), str(failure) or repr(failure))
    )
    fingerprint, folder, told = broadcast((fingerprint, folder, told))
    if failure is not None:
        raise failure
    if told is not None:
        raise (UserError if told[0] else RuntimeError)(told[1])
    return _load(folder, fingerprint, pad_id(tokenizer), config)


def _build(config: Config, tokenizer: Any, task: ExampleMaker) -> tuple[str, Path]:
    if config.eval.max_new_tokens >= config.train.sequence_length:
        raise UserError(
            f"eval.max_new_tokens = {config.eval.max_new_tokens} leaves no room for a context in "
            f"train.sequence_length = {config.train.sequence_length}; make it smaller"
        )
    task.end_token_ids(tokenizer)
    cache = cache_folder(config)
    source = task.read(config.data, cache)
    settings = [config.train.sequence_length, config.eval.num_lines, config.eval.max_new_tokens]
    parts = [_FORMAT, task.NAME, source.identity, _tokenizer_identity(tokenizer), settings]
    fingerprint = hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def write(folder: Path) -> None:
        counts = source.counts | {"windows": 0, "tokens": 0, "label_tokens": 0}

        def rows() -> Iterator[dict[str, Any]]:
            for example in task.training_examples(source, tokenizer, config):
                length, labels = len(example.input_ids), example.label_tokens
                if labels > 0:
                    counts["windows"] += 1
                    counts["tokens"] += length
                    counts["label_tokens"] += labels
                    yield vars(example) | {"length": length, "label_tokens": labels}

        held_out = task.evaluation_examples(source, tokenizer, config)
        counts |= {"held_out_lines": len(held_out), "held_out_lines_asked": config.eval.num_lines}
        _write_arrow(folder / "held_out.arrow", _HELD_OUT, map(vars, held_out))
        _write_arrow(folder / "train.arrow", _TRAIN, rows())
        (folder / "about.json").write_text(json.dumps(counts, indent=1))

    return fingerprint, build_once(cache / "datasets" / f"{task.NAME}-{fingerprint[:16]}", write)


def _write_arrow(path: Path, features: Features, rows: Iterable[dict[str, Any]]) -> None:
    with ArrowWriter(features=features, path=str(path)) as writer:
        for row in rows:
            writer.write(row)
        writer.finalize()


def _load(folder: Path, fingerprint: str, pad: int, config: Config) -> PreparedData:
    if not folder.is_dir():
        raise UserError(
            f"{folder} was made by another worker and cannot be seen by this one; "
            "set data.cache (or storage) to a folder that all workers share"
        )
    train = Dataset.from_file(str(folder / "train.arrow"))
    numbers = train.select_columns(["length", "label_tokens"]).with_format("numpy")[:]
    held_out = tuple(
        EvalExample(**row) for row in Dataset.from_file(str(folder / "held_out.arrow"))
    )
    return PreparedData(
        train=train,
        lengths=numbers["length"].astype(np.int32),
        label_tokens=numbers["label_tokens"].astype(np.int32),
        held_out=held_out,
        counts=json.loads((folder / "about.json").read_text()),
        fingerprint=fingerprint,
        folder=folder,
        pad_id=pad,
        sequence_length=config.train.sequence_length,
    )


def _tokenizer_identity(tokenizer: Any) -> list[Any]:
    identity = [type(tokenizer).__name__, end_of_text_id(tokenizer)]
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return [*identity, sorted(tokenizer.get_vocab().items())]
    whole = json.loads(backend.to_str())
    # What the last call of the tokenizer left behind; ours ask for neither.
    return [
        *identity,
        {key: value for key, value in whole.items() if key not in ("truncation", "padding")},
    ]
