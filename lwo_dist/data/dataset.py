"""Examples on disk: memory-mapped Arrow, so that every worker of a machine shares them.

<folder>/train.arrow      TrainExample, one a row
<folder>/packs.arrow      with `train.packing`: the training examples of each sequence
<folder>/held_out.arrow   EvalExample, one a row
<folder>/about.json       counts
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc
from datasets import Dataset, Features, Value
from datasets import Sequence as ListOf
from datasets.arrow_writer import ArrowWriter

from lwo_dist.errors import UserError

from .examples import EvalExample, Note, TrainExample, pad_id
from .packing import pack

__all__ = ["PreparedData", "load_dataset", "write_dataset"]

_TRAIN = Features(
    {
        "input_ids": ListOf(Value("int32")),
        "length": Value("int32"),
        "target_start": Value("int32"),
        "label_tokens": Value("int32"),
    }
)
_PACKS = Features({"examples": ListOf(Value("int32"))})
_HELD_OUT = Features(
    {
        "context": ListOf(Value("int32")),
        "target": ListOf(Value("int32")),
        "text": Value("large_string"),
        "name": Value("string"),
        "line": Value("int32"),
        "begins_with": Value("string"),
        "ends_with": Value("string"),
        "target_bytes": Value("int32"),
        "choices": ListOf(ListOf(Value("int32"))),
    }
)

_REMEDY = "raise train.sequence_length, or give another data.source"


@dataclass(frozen=True)
class PreparedData:
    """The examples of a run. Equal on every rank."""

    train: Dataset
    """Columns `input_ids`, `length`, `target_start`, `label_tokens`; memory-mapped."""
    lengths: npt.NDArray[np.int32]
    """[sequences], tokens of each. A sequence is an example, or with `packs` several."""
    label_tokens: npt.NDArray[np.int32]
    """[sequences], tokens of each that count in the loss."""
    target_starts: npt.NDArray[np.int32]
    """[examples], tokens of each that are its context."""
    held_out: tuple[EvalExample, ...]
    counts: Mapping[str, Any]
    """What the task has read (of a source tree: `train_files`, `held_out_files`, `skipped`, reason
    -> number), `windows`, `tokens` (context included), `label_tokens`, and with the task's word for
    its examples `held_out_lines`, `held_out_lines_asked`; `notes`, reason -> number, if there are
    any. With packing `packed_rows`, and the padding of all sequences up to `sequence_length`:
    `padding_tokens`, and `padding_tokens_unpacked` without packing."""
    fingerprint: str
    """64 hex digits. A resumed run must find the same."""
    folder: Path
    pad_id: int
    """Neither the end-of-text token nor a line end."""
    sequence_length: int
    decoder_start: int | None = None
    """First token of the decoder, if the examples are for an encoder-decoder."""
    packs: Dataset | None = None
    """Column `examples`: the rows of `train` that make up each sequence; None: one each."""

    @property
    def highest_token(self) -> int:
        """The largest token id in any example."""
        train = pc.max(pc.list_flatten(self.train.data.column("input_ids"))).as_py()
        held_out = (max((*e.context, *e.target, *chain(*e.choices))) for e in self.held_out)
        return max(train or 0, *held_out, 0)


def write_dataset(
    folder: Path,
    train: Iterable[TrainExample | Note],
    held_out: Sequence[EvalExample],
    counts: Mapping[str, Any],
    notes: Mapping[str, int],
    *,
    packed_length: int | None = None,
) -> dict[str, int]:
    """Write the examples into `folder`, and `counts` with those of the training examples and of the
    notes added; return the notes.

    Training examples without a token to learn are left out.

    Args:
        notes: reason -> number, on the held-out examples.
        packed_length: pack the training examples into sequences of at most so many tokens.

    Raises:
        UserError: no training examples are left.
        OSError
    """
    learned = {"windows": 0, "tokens": 0, "label_tokens": 0}
    noted = Counter(notes)

    def rows() -> Iterator[dict[str, Any]]:
        for example in train:
            if isinstance(example, Note):
                noted[example.reason] += 1
                continue
            length = len(example.input_ids)
            labels = example.label_tokens
            if labels > 0:
                learned["windows"] += 1
                learned["tokens"] += length
                learned["label_tokens"] += labels
                yield vars(example) | {"length": length, "label_tokens": labels}

    _write_arrow(folder / "held_out.arrow", _HELD_OUT, map(vars, held_out))
    _write_arrow(folder / "train.arrow", _TRAIN, rows())
    if not learned["windows"]:
        reasons = ", ".join(f"{n} {reason}" for reason, n in sorted(noted.items()))
        raise UserError(f"no example is left to train on ({reasons or 'none found'}); {_REMEDY}")
    if packed_length is not None:
        learned |= _write_packs(folder, packed_length)
    found = dict(sorted(noted.items()))
    about = {**counts, **learned, **({"notes": found} if found else {})}
    (folder / "about.json").write_text(json.dumps(about, indent=1))
    return found


def _write_arrow(path: Path, features: Features, rows: Iterable[dict[str, Any]]) -> None:
    with ArrowWriter(features=features, path=str(path)) as writer:
        for row in rows:
            writer.write(row)
        writer.finalize()


def _write_packs(folder: Path, length: int) -> dict[str, int]:
    lengths = _column(Dataset.from_file(str(folder / "train.arrow")), "length")
    packs = pack(lengths, length)
    _write_arrow(folder / "packs.arrow", _PACKS, ({"examples": examples} for examples in packs))
    return {
        "packed_rows": len(packs),
        "padding_tokens": _padding(_sums(lengths, packs), length),
        "padding_tokens_unpacked": _padding(lengths, length),
    }


def _padding(lengths: npt.NDArray[np.int32], length: int) -> int:
    return int(np.maximum(length - lengths, 0).sum(dtype=np.int64))


def _column(dataset: Dataset, name: str) -> npt.NDArray[np.int32]:
    column: npt.NDArray[Any] = dataset.select_columns([name]).with_format("numpy")[:][name]
    return column.astype(np.int32)


def load_dataset(
    folder: Path,
    fingerprint: str,
    tokenizer: Any,
    sequence_length: int,
    *,
    decoder_start: int | None = None,
) -> PreparedData:
    """What `write_dataset` wrote into `folder`.

    Args:
        decoder_start: first token of the decoder, of examples for an encoder-decoder.

    Raises:
        UserError: this worker does not see the folder, or the tokenizer has no token to pad with.
    """
    if not folder.is_dir():
        raise UserError(
            f"{folder} was made by another worker and cannot be seen by this one; "
            "set data.cache (or storage) to a folder that all workers share"
        )
    train = Dataset.from_file(str(folder / "train.arrow"))
    lengths, label_tokens = _column(train, "length"), _column(train, "label_tokens")
    packs = None
    if (folder / "packs.arrow").exists():
        packs = Dataset.from_file(str(folder / "packs.arrow"))
        of_each = [pack["examples"] for pack in packs]
        lengths, label_tokens = _sums(lengths, of_each), _sums(label_tokens, of_each)
    held_out = tuple(
        EvalExample(**row) for row in Dataset.from_file(str(folder / "held_out.arrow"))
    )
    return PreparedData(
        train=train,
        lengths=lengths,
        label_tokens=label_tokens,
        target_starts=_column(train, "target_start"),
        held_out=held_out,
        counts=json.loads((folder / "about.json").read_text()),
        fingerprint=fingerprint,
        folder=folder,
        pad_id=pad_id(tokenizer),
        sequence_length=sequence_length,
        decoder_start=decoder_start,
        packs=packs,
    )


def _sums(values: npt.NDArray[np.int32], packs: list[list[int]]) -> npt.NDArray[np.int32]:
    """[packs], the sum of `values` over the examples of each."""
    return np.array([values[examples].sum() for examples in packs], dtype=np.int32)
