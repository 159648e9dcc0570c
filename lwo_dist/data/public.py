"""Data sets of examples: public benchmarks in their own formats, and JSON lines with named fields.

A folder's files are read by side: `train`, `valid` (or `validation`, `val`, `dev`) and `test` in
their names. The sides of a benchmark are kept as they are: its test files are held out, its valid
files are for validation. Where it has no train files, the valid files are trained on; where it has
no test files, or publishes no answers to them, the valid files are held out. What then is missing
is split off by hash, as from a single file, or from a folder whose files name no side.
"""

from __future__ import annotations

import gzip
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path, PurePath
from typing import Any

from lwo_dist.config import DataConfig
from lwo_dist.errors import UserError, first_line
from lwo_dist.redaction import without_credentials
from lwo_dist.secret_rule import find_secret

from .pairs import Pair, Pairs, split_pairs

__all__ = ["read_public"]

_SIDES = {"train": "train", "test": "test"} | dict.fromkeys(
    ("valid", "validation", "val", "dev"), "valid"
)
_JSON_ENDINGS = (".jsonl", ".json", ".jsonl.gz", ".json.gz")
_SHOWN_FIELDS = 20

Record = Mapping[str, Any]


class _MissingError(Exception):
    """A record does not have this field."""


class _NotTextError(Exception):
    """The value of this field is no text."""


def read_public(config: DataConfig) -> Pairs:
    """The usable pairs of the data set in `config.source`, by side.

    What is scored is never trained on: equal pairs are left out of training.

    Raises:
        UserError: a file that does not exist or cannot be read, no file with examples to train on
            or to score, no line with the fields that the format needs, parallel files of different
            lengths, or too few usable pairs.
    """
    source = without_credentials(str(config.source))
    files = _find_files("source", config.source, config)
    skipped: Counter[str] = Counter()

    def pairs_of(some: Sequence[Path]) -> list[Pair]:
        return [pair for file in some for pair in _read_file(file, config, skipped)]

    validation = pairs_of(_chosen("validation_source", config, files, "valid"))
    test = pairs_of(_chosen("held_out_source", config, files, "test"))
    train = pairs_of(files.get("train") or files.get("", []))
    if not train and config.validation_source is None:
        train, validation = validation, []
    if not test and config.held_out_source is None:
        if config.validation_source is not None:
            found = split_pairs(_one_side(config, config.held_out_fraction), source, train, skipped)
            train, test = list(found.train), list(found.held_out)
            skipped = Counter(found.skipped)
        elif validation:
            test, validation = validation, []
        else:
            return split_pairs(config, source, train, skipped)
    if not validation and config.validation_fraction:
        found = split_pairs(_one_side(config, config.validation_fraction), source, train, skipped)
        train, validation = list(found.train), list(found.held_out)
        skipped = Counter(found.skipped)
    scored = test if config.evaluate_on == "held_out" else validation
    kept_aside = {pair.sha256 for pair in (*test, *validation)}
    learned = [pair for pair in train if pair.sha256 not in kept_aside]
    if len(learned) < len(train):
        skipped["also held out"] += len(train) - len(learned)
    _check_sides(config, learned, scored, skipped)
    return Pairs(source, tuple(learned), tuple(scored), dict(sorted(skipped.items())))


def _one_side(config: DataConfig, fraction: float) -> DataConfig:
    """`config`, for a split into two parts."""
    return config.model_copy(
        update={
            "held_out_fraction": fraction,
            "validation_fraction": 0.0,
            "evaluate_on": "held_out",
        }
    )


def _check_sides(
    config: DataConfig, train: Sequence[Pair], scored: Sequence[Pair], skipped: Mapping[str, int]
) -> None:
    shown = ", ".join(f"{n} {reason}" for reason, n in sorted(skipped.items())) or "none"
    source = without_credentials(str(config.source))
    if not train:
        raise UserError(
            f"data.source = {source}: no usable examples to train on (skipped: {shown}); give a"
            f" file or folder with some in the format {config.format}, and data.held_out_source for"
            " those to score"
        )
    if len(scored) < 2:
        is_test = config.evaluate_on == "held_out"
        setting = "held_out_source" if is_test else "validation_source, or a validation_fraction"
        raise UserError(
            f"data.source = {source}: {len(scored) or 'no'} usable"
            f" {'test' if is_test else 'validation'} examples (skipped: {shown}), at least 2 are"
            f" needed; give data.{setting}"
        )


def _chosen(
    setting: str, config: DataConfig, files: Mapping[str, list[Path]], side: str
) -> list[Path]:
    """The files of a side: of the setting for it, else of `data.source`."""
    path = getattr(config, setting)
    if path is None:
        return files.get(side, [])
    found = _find_files(setting, path, config)
    if chosen := found.get(side) or found.get("", []):
        return chosen
    raise UserError(
        f"data.{setting} = {path}: holds only {' and '.join(sorted(found))} files; give a {side}"
        " file"
    )


def _find_files(setting: str, given: str | None, config: DataConfig) -> dict[str, list[Path]]:
    """The files to read, by the side that their name tells; "" where it tells none, and for a
    file that is named itself.
    """
    if not given:
        raise UserError(
            f"data.source is not set; give a file or a folder in the format {config.format}"
        )
    path = Path(given).expanduser()
    shown = f"data.{setting} = {without_credentials(given)}"
    kind = f"the format {config.format}"
    endings = _endings(config)
    files: dict[str, list[Path]] = {}
    try:
        if path.is_file():
            return {"": [path]}
        if not path.is_dir():
            problem = "is no file and no folder" if path.exists() else "does not exist"
            raise UserError(f"{shown}: {problem}; give a file or a folder in {kind}")
        for file in sorted(path.iterdir()):
            if file.name.endswith(endings) and not file.name.startswith(".") and file.is_file():
                files.setdefault(_side(file.name), []).append(file)
    except OSError as error:
        raise UserError(f"{shown}: {error.strerror}; give one that can be read") from None
    if not files:
        raise UserError(
            f"{shown}: has no file that ends in {' or '.join(endings)}; give a folder in {kind}"
        )
    if len(files) > 1:
        files.pop("", None)
    return files


def _endings(config: DataConfig) -> tuple[str, ...]:
    default = _PARALLEL.get(config.format)
    return _JSON_ENDINGS if default is None else ("." + config.fields.get("source", default[0]),)


def _side(name: str) -> str:
    parts = re.split(r"[._-]", name.lower())
    return next((_SIDES[part] for part in parts if part in _SIDES), "")


def _read_file(file: Path, config: DataConfig, skipped: Counter[str]) -> Iterator[Pair]:
    """The usable pairs of a file; the others are counted in `skipped`."""
    read = _read_parallel if config.format in _PARALLEL else _read_records
    try:
        for pair in read(file, config, skipped):
            if reason := _unusable(pair, config):
                skipped[reason] += 1
            else:
                yield pair
    except (OSError, EOFError) as error:
        raise UserError(f"{file}: {first_line(error)}; give a file that can be read") from None


def _unusable(pair: Pair, config: DataConfig) -> str:
    for side in ("source", "target"):
        if not getattr(pair, side).strip():
            return f"empty {side}"
    try:
        f"{pair.name}{pair.language}".encode()
        text = f"{pair.source}\n{pair.target}".encode()
    except UnicodeEncodeError:  # JSON can hold lone surrogates
        return "not Unicode"
    if len(text) > config.max_file_bytes:
        return "huge"
    return "secret" if find_secret(text) else ""


def _lines(file: Path) -> Iterator[bytes]:
    """The lines of a file, without their ends: those of "\\n" alone, as the texts may hold others.

    Raises: OSError.
    """
    with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as lines:
        for line in lines:
            yield line.removesuffix(b"\n")


# Format -> endings of the files of sources and of targets.
_PARALLEL = {"code-to-code-trans": ("java", "cs"), "code-refinement": ("buggy", "fixed")}
_LANGUAGES = {"cs": "c#", "py": "python", "js": "javascript", "ts": "typescript"}
_LANGUAGES |= {"go": "go", "java": "java", "c": "c", "cpp": "cpp", "rs": "rust", "php": "php"}


def _read_parallel(file: Path, config: DataConfig, skipped: Counter[str]) -> Iterator[Pair]:
    """Line i of one file belongs to line i of the other."""
    endings = _PARALLEL[config.format]
    first = config.fields.get("source", endings[0])
    second = config.fields.get("target", endings[1])
    if not file.name.endswith(f".{first}"):
        raise UserError(
            f"{file}: does not end in .{first}; give the folder, or set data.fields to the endings"
        )
    other = file.with_name(f"{file.name.removesuffix(first)}{second}")
    if not other.is_file():
        raise UserError(
            f"{file}: there is no {other.name} beside it, with its targets; add it, or set"
            " data.fields to the endings"
        )
    counts = [sum(1 for _ in _lines(side)) for side in (file, other)]
    if counts[0] != counts[1]:
        raise UserError(
            f"{file} has {counts[0]} lines and {other.name} has {counts[1]}; line i of the one must"
            " belong to line i of the other"
        )
    language = "java" if config.format == "code-refinement" else _LANGUAGES.get(second, second)
    other_language = "" if config.format == "code-refinement" else _LANGUAGES.get(first, first)
    for number, sides in enumerate(zip_longest(_lines(file), _lines(other)), 1):
        try:
            source, target = (side.decode("utf-8-sig").strip() for side in sides)
        except UnicodeDecodeError:
            skipped["not UTF-8"] += 1
            continue
        yield Pair(source, target, file.name, number, language, other_language)


def _read_records(file: Path, config: DataConfig, skipped: Counter[str]) -> Iterator[Pair]:
    """One JSON object a line, or one list of them."""
    make = _MAKERS[config.format]
    first_missing = ""
    found = 0
    for number, record in _records(file, skipped):
        try:
            pair = make(_Fields(record, config.fields))
        except _MissingError as missing:
            skipped["missing field"] += 1
            names = ", ".join(list(record)[:_SHOWN_FIELDS])
            first_missing = first_missing or (
                f"{file}, line {number}: has no field {missing}; it has {names or 'none'}; name the"
                " fields with data.fields.source and data.fields.target"
            )
        except _NotTextError:
            skipped["not text"] += 1
        else:
            found += 1
            yield replace(pair, name=pair.name or file.name, line=number)
    if first_missing and not found:
        raise UserError(first_missing)


def _records(file: Path, skipped: Counter[str]) -> Iterator[tuple[int, Record]]:
    for number, line in enumerate(_lines(file), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line.decode("utf-8-sig"))
        except UnicodeDecodeError:
            skipped["not UTF-8"] += 1
            continue
        except (ValueError, RecursionError):
            skipped["not JSON"] += 1
            continue
        # A file with a single list holds its records in one line.
        records = record if isinstance(record, list) else [record]
        for place, item in enumerate(records, number):
            if isinstance(item, dict):
                yield place, item
            else:
                skipped["not a JSON object"] += 1


@dataclass(frozen=True)
class _Fields:
    """The texts in a record."""

    record: Record
    names: Mapping[Any, str]
    """What the user says: `source` and `target` -> name of the field."""

    def __contains__(self, name: str) -> bool:
        return name in self.record

    def text(self, name: str) -> str:
        """The text of a field; tokens are joined with spaces.

        Raises: _MissingError, _NotTextError.
        """
        if name not in self.record:
            raise _MissingError(repr(name))
        value = self.record[name]
        if isinstance(value, list) and all(isinstance(token, str) for token in value):
            return " ".join(value)
        if isinstance(value, (str, int)):
            return str(value)
        if value is None:
            return ""
        raise _NotTextError

    def source(self, default: str) -> str:
        return self.text(self.names.get("source", default))

    def target(self, default: str) -> str:
        return self.text(self.names.get("target", default))

    def optional(self, name: str) -> str:
        value = self.record.get(name, "")
        return value if isinstance(value, str) else ""


def _named_fields(fields: _Fields) -> Pair:
    if "messages" in fields and not fields.names:
        return _chat(fields.record["messages"])
    language = fields.optional("language").lower()
    return Pair(fields.source("source"), fields.target("target"), "", 0, language)


def _chat(messages: Any) -> Pair:
    """A list of messages, each with a `role` and a `content`; the last is the target.

    Raises: _NotTextError.
    """
    try:
        texts = [(message["role"], message["content"]) for message in messages]
    except (KeyError, TypeError):
        raise _NotTextError from None
    if not texts or not all(isinstance(part, str) for message in texts for part in message):
        raise _NotTextError
    *before, (role, target) = texts
    if role != "assistant":
        raise _NotTextError
    return Pair("\n\n".join(text for _, text in before), target, "", 0, messages=tuple(before))


def _concode(fields: _Fields) -> Pair:
    """The class's members and then what the function is to do, in a comment.

    `nl` holds them the other way round, as CodeXGLUE joins them: text, fields, methods.
    """
    text, *members = fields.source("nl").split("concode_field_sep")
    lines = [line.strip() for part in members for line in part.split("concode_elem_sep")]
    comment = "\n".join(["/*", *filter(None, lines), text.strip(), "*/"])
    target = fields.target("code").strip()
    return Pair(comment if text.strip() else "", target, "", 0, "java")


def _code_to_text(fields: _Fields) -> Pair:
    """The tokens where they are given: without comments, as the benchmark has them."""
    tokens = "code_tokens" in fields
    source = fields.source("code_tokens" if tokens else "code")
    target = fields.target("docstring_tokens" if "docstring_tokens" in fields else "docstring")
    if not tokens:
        source = source.replace(target, "")
    name = "/".join(filter(None, (fields.optional("repo"), fields.optional("path"))))
    return Pair(source, target.strip(), name, 0, fields.optional("language").lower())


def _devign(fields: _Fields) -> Pair:
    answers = {"1": "yes", "True": "yes", "true": "yes", "0": "no", "False": "no", "false": "no"}
    target = fields.target("target")
    if target not in answers:
        raise _NotTextError
    return Pair(fields.source("func").strip(), answers[target], "", 0, "c")


def _codexglue_completion(fields: _Fields) -> Pair:
    source, target = (
        _without_marks(text) for text in (fields.source("input"), fields.target("gt"))
    )
    return Pair(source, target, "", 0)


_LITERAL = re.compile(r"<(STR|NUM|CHAR)_LIT(?::(.*?))?>", re.DOTALL)


def _without_marks(text: str) -> str:
    """Text with line breaks for CodeXGLUE's marks, and the literals that it keeps, as in its
    evaluator; quotes are outside of the marks.
    """
    text = re.sub(r" ?<EOL> ?", "\n", text.replace("<s>", "").replace("</s>", "")).lstrip()
    return _LITERAL.sub(lambda found: found[2] or ("0" if found[1] == "NUM" else ""), text)


def _repobench(fields: _Fields) -> Pair:
    """The prompt of the benchmark's own `construct_prompt`: snippets, then the file so far."""
    path = fields.optional("file_path")
    language = "java" if path.endswith(".java") else "python"
    mark = "//" if language == "java" else "#"
    snippets = fields.record.get("context") or []
    if not isinstance(snippets, list):
        raise _NotTextError
    parts = [f"{mark} Repo Name: {fields.optional('repo_name')}\n"]
    for snippet in snippets:
        if not isinstance(snippet, dict):
            raise _NotTextError
        found = _Fields(snippet, {})
        parts.append(f"{mark} Path: {found.text('path')}\n{found.text('snippet')}\n\n")
    parts.append(f"{mark} Path: {path}\n{fields.optional('import_statement')}\n")
    parts.append(f"{fields.source('cropped_code')}\n")
    text = re.sub(r"\n{4,}", "\n\n", "".join(parts))
    name = "/".join(filter(None, (fields.optional("repo_name"), path)))
    return Pair(text, fields.target("next_line"), name, 0, language)


def _crosscodeeval(fields: _Fields) -> Pair:
    """The retrieved snippets, where there are some, and the file up to the cursor."""
    retrieved = fields.record.get("crossfile_context") or ""
    if isinstance(retrieved, dict):
        retrieved = _Fields(retrieved, {}).text("text")
    metadata = fields.record.get("metadata")
    found = _Fields(metadata if isinstance(metadata, dict) else {}, {})
    file = found.optional("file")
    name = "/".join(filter(None, (found.optional("repository"), file)))
    ending = PurePath(file).suffix.removeprefix(".")
    source = f"{retrieved}{fields.source('prompt')}"
    return Pair(source, fields.target("groundtruth"), name, 0, _LANGUAGES.get(ending, ending))


_MAKERS: dict[str, Callable[[_Fields], Pair]] = {
    "jsonl": _named_fields,
    "concode": _concode,
    "code-to-text": _code_to_text,
    "devign": _devign,
    "codexglue-completion": _codexglue_completion,
    "repobench": _repobench,
    "crosscodeeval": _crosscodeeval,
}
