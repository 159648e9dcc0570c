"""The schema of a checkpoint's files and of run.json, which may be forged.

A state.json that matches its own digest may still come from anybody: the digest has no key. All
types, sizes and names are therefore checked before use; any violation is a `DamagedError`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, TypeAdapter, ValidationError

from lwo_dist.config import LoRAConfig
from lwo_dist.errors import DamagedError, first_line, printable
from lwo_dist.files import is_plain

__all__ = [
    "check_depth",
    "check_record",
    "check_run_record",
    "check_state",
    "file_of",
    "index_of",
    "read_json",
    "reading",
    "weight_map_of",
]

LAYERS = "layers"
STATE = "state.json"
INDEX = "model.safetensors.index.json"
ADAPTERS_INDEX = "adapters.index.json"
"""The index of a checkpoint without the base model: under the usual name, `from_pretrained` would
read it and make up the other weights.
"""
MOMENTS = "active.safetensors"
RECORD = "run.json"

MAX_BYTES = 128 * 2**20
"""Of a file without tensors. state.json holds the loss of every step, about 20 bytes each."""
_MAX_ENTRIES = 1_000_000
_MAX_LAYERS = 1000
"""A config.json with more layers must come with as many weights: from one number alone,
transformers would build layers for hours.
"""
_MAX_SUBLAYERS = 10_000

# Files that a loader would prefer to ours, or that lead it to another model.
_FOREIGN_NAMES = ("adapter_config.json", STATE)
_FOREIGN_SUFFIXES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")
_UP = "../../layers/"

Text = Annotated[str, StringConstraints(max_length=4000)]
Step = Annotated[int, Field(ge=0, le=10**15)]
Finite = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
StepName = Annotated[str, StringConstraints(pattern=r"^[0-9]{1,15}$")]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True)


class _Optimisation(_Strict):
    lr: float
    lr_scheduler_type: Text
    steps_per_layer: Step
    order: Text


class _Training(_Strict):
    global_batch_size: Step
    sequence_length: Step
    precision: Text


class _Run(_Strict):
    run_name: Text
    method: Text
    task: Text
    metric: Text | None = None
    base_model: Text
    base_name: Text | None = None
    revision: Text | None = None
    licence: Text | None = None
    source: Text
    data: dict[Text, Step]
    lwo: _Optimisation
    lora: LoRAConfig | None = None
    base_digest: Sha256 | None = None
    train: _Training
    versions: dict[Text, Text]


class _Data(_Strict):
    seed: int
    global_batch_size: Step
    fingerprint: Text
    batches: Text = "fresh"


class _Cost(_Strict):
    training_seconds: Seconds
    tokens: Step


class _Results(_Strict):
    evaluations: dict[StepName, dict[Text, float]]
    costs: dict[StepName, _Cost] = {}
    training_seconds: Seconds
    blocked_seconds: float
    tokens: Step
    losses: list[float]
    peaks: dict[Text, float]


class _Suffix(_Strict):
    flops: list[Finite] = Field(max_length=_MAX_SUBLAYERS)
    changes: list[list[Finite]] = Field(max_length=_MAX_SUBLAYERS)


class _State(_Strict):
    step: Step
    active_layer: Text
    skipped_steps: float
    suffix: _Suffix | None = None
    moments: dict[Text, Text]
    sha256: dict[Text, Sha256] = Field(max_length=_MAX_ENTRIES)


class _Record(_Strict):
    """The trainer's entries."""

    run: _Run | None = None
    data: _Data | None = None
    results: _Results | None = None


class _RunRecord(_Strict):
    run_name: Text
    attempts: Step
    holder: Text | None = None
    mlflow_run_id: Text | None = None


_WEIGHT_MAP = TypeAdapter(
    Annotated[dict[Text, Text], Field(max_length=_MAX_ENTRIES)], config=ConfigDict(strict=True)
)


def check_state(state: Mapping[str, Any]) -> None:
    """Raise DamagedError unless the entries of every checkpoint have the right types and name its
    own files.
    """
    with reading(STATE):
        _State.model_validate(state)
    for reference in state["sha256"]:
        file_of("", reference)
    index_of(state["sha256"])
    if MOMENTS not in state["sha256"]:
        raise DamagedError(f"{STATE} does not name {MOMENTS}")
    for reference in state["moments"].values():
        if reference not in state["sha256"]:
            raise DamagedError(f"{STATE} has no sha256 of the moments file {reference[:100]!r}")


def check_record(state: Mapping[str, Any], *needed: str) -> None:
    """Raise DamagedError unless the trainer's entries have the right types.

    Args:
        needed: the required ones of `run`, `data` and `results`.
    """
    with reading(STATE):
        _Record.model_validate(state)
    for name in needed:
        if state.get(name) is None:
            raise DamagedError(f"{STATE} has no {name}")


def check_run_record(record: Any) -> None:
    """Raise DamagedError unless the entries of run.json have their types."""
    with reading(RECORD):
        _RunRecord.model_validate(record)


def index_of(sealed: Iterable[str]) -> str:
    """The index among the files of a checkpoint. Raises: DamagedError."""
    names = {INDEX, ADAPTERS_INDEX}.intersection(sealed)
    if len(names) != 1:
        raise DamagedError(f"{STATE} names {' and '.join(sorted(names)) or f'no {INDEX}'}")
    return names.pop()


def weight_map_of(index: Any, sealed: Mapping[str, str]) -> dict[str, str]:
    """The weight map of an index: parameter -> file, which must be a `sealed` safetensors file.

    Raises:
        DamagedError
    """
    with reading("the index"):
        weight_map = _WEIGHT_MAP.validate_python(index["weight_map"])
    for reference in {*weight_map.values()}:
        if reference not in sealed or not reference.endswith(".safetensors"):
            raise DamagedError(f"the index names {reference[:100]!r}, which is not a weight file")
    return weight_map


def file_of(folder: str, reference: str) -> str:
    """A file reference in a checkpoint, relative to the run's folder instead.

    Args:
        folder: the checkpoint's folder, relative to the run's.
        reference: relative to `folder`.

    Raises:
        DamagedError: `reference` is neither in `folder` nor in `layers/`.
    """
    file = reference.removeprefix(_UP)
    is_layer = file != reference
    if (
        not is_plain(file)
        or "/" in file
        or file.startswith(".")
        or file in _FOREIGN_NAMES
        or file.endswith(_FOREIGN_SUFFIXES)
        or (is_layer and not file.endswith(".safetensors"))
    ):
        raise DamagedError(f"{STATE} names {reference[:100]!r}, which is not a checkpoint file")
    return f"{LAYERS if is_layer else folder}/{file}"


def check_depth(settings: Any, weights: int) -> None:
    """Raise DamagedError if a config.json asks for far more layers than there are weights."""
    limit = max(_MAX_LAYERS, weights)
    waiting = [settings]
    while waiting:
        value = waiting.pop()
        for key, item in value.items() if isinstance(value, dict) else ():
            waiting.append(item)
            counts_layers = re.fullmatch(r"n_layers?|(num|encoder|decoder)_(\w+_)?layers?", key)
            if counts_layers and isinstance(item, int | float) and not item <= limit:
                raise DamagedError(
                    f"config.json: {key} = {str(item)[:20]}, but there are {weights} weights"
                )


def read_json(path: Path) -> Any:
    """The values in a JSON file of at most `MAX_BYTES`.

    Raises:
        DamagedError
        OSError
    """
    with path.open("rb") as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise DamagedError(f"{path.name} is larger than {MAX_BYTES} bytes")
    with reading(path.name):
        return json.loads(data)


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Turn library errors about malformed contents into a DamagedError that names `what`."""
    try:
        yield
    except (DamagedError, OSError):
        raise
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = printable(".".join(str(part)[:100] for part in first["loc"]))
        raise DamagedError(f"{what} is malformed: {where}: {first['msg']}") from None
    except Exception as error:
        raise DamagedError(f"{what} is malformed: {first_line(error)}") from None
