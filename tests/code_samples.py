"""Small source trees, and a tokenizer that knows them."""

from __future__ import annotations

import json
import random
import subprocess
from functools import lru_cache
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer

from lwo_dist.config import Config
from lwo_dist.config.reading import load_config

__all__ = [
    "END_OF_TEXT",
    "KINDS",
    "code",
    "git",
    "make_config",
    "make_tokenizer",
    "tokenizer_of_kind",
    "write_tree",
]

END_OF_TEXT = "<|endoftext|>"


def code(seed: int, lines: int = 40) -> str:
    """Text that looks like a program; another text for another seed. Each line is shorter than 50
    characters.

    The shape of a line follows from that of the line before, the names in it do not.
    """
    draw = random.Random(seed)
    names = ["alpha", "beta", "gamma", "delta", f"own_{seed}"]
    shapes = [
        "def {}({}):",
        "    {} = {} + 1",
        "    return {}[{}]",
        "",
        "# {} and {}",
        "    )",
        "for {} in {}:",
    ]
    chosen = (shapes[(seed + i) % len(shapes)] for i in range(lines))
    return "".join(shape.format(draw.choice(names), draw.choice(names)) + "\n" for shape in chosen)


def write_tree(root: Path, files: int = 12, lines: int = 40) -> Path:
    """Write `files` files of different content into `root`, some in a subfolder."""
    (root / "sub").mkdir(parents=True)
    for i in range(files):
        (root / ("sub" if i % 3 == 0 else "") / f"file_{i}.py").write_text(code(i, lines))
    return root


@lru_cache
def make_tokenizer(**special_tokens: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of 400 tokens; no pad token unless asked for. Shared: do not
    change it.
    """
    return _trained(pre_tokenizers.ByteLevel(add_prefix_space=False), special_tokens)


KINDS = ("gpt2", "qwen2", "smollm2", "llama2", "metaspace", "gemma")


@lru_cache
def tokenizer_of_kind(kind: str) -> PreTrainedTokenizerFast:
    """A small tokenizer that treats line ends as those of many models do. Shared: do not change it.

    gpt2: a line end and the indentation after it are one token. qwen2: signs and the line end after
    them are one token. smollm2: as gpt2, and a digit is a token alone. llama2: a text gets a space
    before it, and a line end is a token alone. metaspace: the same space, and a line end may be in
    the middle of a token. gemma: no space before a text; runs of spaces and of line ends are
    tokens. llama2 and gemma put a token before each text.
    """
    if kind == "gpt2":
        return make_tokenizer()
    if kind == "qwen2":
        return _trained(Qwen2Tokenizer().backend_tokenizer.pre_tokenizer, {})
    if kind == "smollm2":
        digits = pre_tokenizers.Digits(individual_digits=True)
        bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False)
        return _trained(pre_tokenizers.Sequence([digits, bytes_]), {})
    if kind == "metaspace":
        return _trained(
            pre_tokenizers.Metaspace(prepend_scheme="always"),
            {},
            decoder=decoders.Metaspace(prepend_scheme="always"),
            alphabet=[*map(chr, range(32, 127)), "\n", "\t", "\u00e9"],
        )
    if kind == "gemma":
        return _gemma()
    letters = [chr(i) for i in range(33, 127)]
    merges = [("\u2581", "\u2581"), ("\u2581" * 2, "\u2581" * 2), ("d", "e"), ("de", "f")]
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    words = ["<unk>", END_OF_TEXT, *bytes_, "\u2581", *letters, *("".join(m) for m in merges)]
    model = models.BPE(
        {word: i for i, word in enumerate(words)},
        merges,
        unk_token="<unk>",
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return _with_start(tokenizer)


def _gemma() -> PreTrainedTokenizerFast:
    learned = Tokenizer(models.BPE())
    learned.normalizer = normalizers.Replace(" ", "\u2581")
    # Line ends are never in one token with anything else.
    pieces = Regex("\n+|\u2581?[^\n\u2581]+|\u2581+")
    learned.pre_tokenizer = pre_tokenizers.Split(pieces, "isolated")
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=[*map(chr, range(33, 127)), "\n", "\t"],
        show_progress=False,
    )
    texts = [code(i).replace("\n)", "\n\n)") for i in range(20)]
    learned.train_from_iterator(texts, trainer)
    model = json.loads(learned.to_str())["model"]
    words = ["<unk>", *(f"<0x{i:02X}>" for i in range(256)), *model["vocab"]]
    tokenizer = Tokenizer(
        models.BPE(
            {word: i for i, word in enumerate(words)},
            [tuple(pair) for pair in model["merges"]],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = learned.normalizer
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return _with_start(tokenizer)


def _with_start(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """As Llama's and Gemma's, which begin every text with a token."""
    tokenizer.add_special_tokens([END_OF_TEXT, "<s>"])
    tokenizer.post_processor = TemplateProcessing(
        "<s> $A", "<s> $A <s> $B", [("<s>", tokenizer.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token=END_OF_TEXT, unk_token="<unk>"
    )


def _trained(
    pre_tokenizer: pre_tokenizers.PreTokenizer,
    special_tokens: dict[str, str],
    *,
    decoder: decoders.Decoder | None = None,
    alphabet: list[str] | None = None,
) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoder or decoders.ByteLevel()
    special_tokens = {"eos_token": END_OF_TEXT} | special_tokens
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=sorted({*special_tokens.values()}),
        initial_alphabet=alphabet or pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((code(i) for i in range(20)), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special_tokens)


def make_config(source: Path, storage: Path, *overrides: str) -> Config:
    """A config of short sequences and few lines."""
    small = [
        "train.sequence_length=48",
        "eval.num_lines=20",
        "eval.max_new_tokens=16",
        "data.held_out_fraction=0.3",
    ]
    return load_config(None, [f"data.source={source}", f"storage={storage}", *small, *overrides])


def git(folder: Path, *arguments: str, date: int = 0) -> str:
    """Run git as somebody, `date` seconds after a fixed time, without the user's settings."""
    who = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
    when = f"{1_700_000_000 + date} +0000"
    done = subprocess.run(
        ["git", *who, *arguments],
        cwd=folder,
        check=True,
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin", "GIT_COMMITTER_DATE": when, "GIT_AUTHOR_DATE": when},
    )
    return done.stdout.strip()
