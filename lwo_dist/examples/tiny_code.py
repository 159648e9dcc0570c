"""tiny-code: a small model of Python, made where no hub can be reached, so that there is something
to tune.

A tokenizer and a Qwen2 model are trained from nothing, in full and with plain torch, on the sources
of the interpreter's standard library. That takes about two minutes on two cores, once per cache
folder.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import random
import shutil
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from lwo_dist.access import share_as_made
from lwo_dist.errors import UserError

__all__ = ["Recipe", "default_cache_folder", "ensure_tiny_code"]

END_OF_TEXT = "<|endoftext|>"
PADDING = "<|pad|>"
# Tests and tools that no program imports, tables that were generated, and what is not the standard
# library.
_LEFT_OUT = {
    "_bundled",
    "dist-packages",
    "distutils",
    "encodings",
    "idlelib",
    "lib2to3",
    "msilib",
    "pydoc_data",
}
_LEFT_OUT |= {"site-packages", "test", "tests", "turtledemo"}
_MIN_FILES = 100


@dataclass(frozen=True)
class Recipe:
    """What tiny-code is made of. Anything that changes the result belongs here: the cache goes by
    it.
    """

    version: int = 1
    """Raised when the code below changes what it makes."""
    files: int | None = None
    """The first so many files of the standard library; None: all."""
    vocab_size: int = 4096
    hidden_size: int = 128
    intermediate_size: int = 384
    num_hidden_layers: int = 6
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    sequence_length: int = 256
    batch_size: int = 2
    steps: int = 1800
    warmup_steps: int = 90
    lr: float = 3e-3
    weight_decay: float = 0.1
    seed: int = 0


_CARD = """---
license: psf-2.0
tags: [code]
---

tiny-code, made by lwo_dist from the sources of Python's standard library.
"""

# "small" is made in seconds and knows little: for tests.
RECIPES = {
    "full": Recipe(),
    "small": Recipe(
        files=60,
        vocab_size=512,
        hidden_size=32,
        intermediate_size=64,
        sequence_length=128,
        steps=60,
        warmup_steps=6,
    ),
}


def default_cache_folder(storage: str | Path) -> Path:
    """Where a run keeps tiny-code: LWO_CACHE_DIR if that is set, else <storage>/cache, which all
    workers see.
    """
    return Path(os.environ.get("LWO_CACHE_DIR") or Path(storage) / "cache").expanduser()


_print = partial(print, flush=True)  # A job's log is a file: it shows each line at once.


def ensure_tiny_code(
    cache_folder: Path, *, recipe: Recipe | None = None, log: Callable[[str], None] = _print
) -> Path:
    """The folder of tiny-code, as `save_pretrained` writes one; it is made if `cache_folder` does
    not have it.

    Of several processes, on one machine or on several that share `cache_folder`, one builds and the
    others wait. A build that is killed leaves nothing that is taken for a model.

    Args:
        recipe: None takes the one that the environment variable LWO_TINY_CODE names, "full" or
            "small", else "full".
        log: gets a line now and then while the model is made.

    Raises:
        UserError: an interpreter without the sources of its standard library, a cache folder that
            cannot be written, an unknown LWO_TINY_CODE.
    """
    recipe = recipe or _chosen_recipe()
    folder = cache_folder / f"tiny-code-{_fingerprint(recipe)}"
    if folder.is_dir():
        return folder
    try:
        cache_folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder.with_suffix(".lock"), log):
            if not folder.is_dir():
                unfinished = folder.with_suffix(".unfinished")
                shutil.rmtree(unfinished, ignore_errors=True)
                _build(recipe, unfinished, log)
                share_as_made(unfinished)
                unfinished.rename(folder)
    except OSError as error:
        raise UserError(
            f"tiny-code cannot be kept in {cache_folder}: {error.strerror or error}; "
            "set LWO_CACHE_DIR, or storage, to a writable folder"
        ) from error
    return folder


def _chosen_recipe() -> Recipe:
    name = os.environ.get("LWO_TINY_CODE") or "full"
    if name not in RECIPES:
        raise UserError(
            f"LWO_TINY_CODE = {name!r} must be one of {', '.join(RECIPES)}; unset it for the full"
            " model"
        )
    return RECIPES[name]


def _fingerprint(recipe: Recipe) -> str:
    # The standard library is the training data, and is another one in each release of Python.
    made_from = json.dumps([asdict(recipe), sys.version_info[:3]])
    return hashlib.sha256(made_from.encode()).hexdigest()[:12]


@contextmanager
def _locked(path: Path, log: Callable[[str], None]) -> Iterator[None]:
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log("tiny-code: another process is making it; waiting")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield  # Closing the file, or the death of this process, gives the lock back.


def _build(recipe: Recipe, folder: Path, log: Callable[[str], None]) -> None:
    started = time.monotonic()
    texts = _standard_library()[: recipe.files]
    log(
        f"tiny-code: making a base model from {len(texts)} files of the standard library, once, in"
        " about two minutes"
    )
    tokenizer = _train_tokenizer(texts, recipe)
    model = _train_model(_packed(texts, tokenizer, recipe), tokenizer, recipe, log)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    (folder / "README.md").write_text(_CARD)
    log(f"tiny-code: made in {time.monotonic() - started:.0f} s")


def _standard_library() -> list[str]:
    """The texts of its Python sources, in the order of their paths."""
    root = Path(sysconfig.get_paths()["stdlib"])
    texts = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if not _LEFT_OUT.isdisjoint(relative.parts) or path.name.startswith("_sysconfigdata"):
            continue
        try:
            texts.append(path.read_text("utf-8"))
        except UnicodeDecodeError:
            continue
    texts = [text for text in texts if text.strip()]
    if len(texts) < _MIN_FILES:
        raise UserError(
            f"tiny-code is made from the standard library, but {root} holds only {len(texts)} of"
            " its sources; use a Python that has them, or set model.name to a folder or a Hugging"
            " Face id"
        )
    return texts


def _train_tokenizer(texts: list[str], recipe: Recipe) -> Qwen2Tokenizer:
    """Qwen2's byte-level BPE with a vocabulary of its own.

    `AutoTokenizer` reads the tokenizer of a Qwen2 model as this class, with the class's way of
    cutting text into words, whatever was saved; so this is what is trained. But no token crosses
    the end of a line: a line has the same tokens alone as within its file.
    """
    qwen2 = Qwen2Tokenizer().backend_tokenizer
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = qwen2.normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", "isolated"), qwen2.pre_tokenizer]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocab_size,
        special_tokens=[END_OF_TEXT, PADDING],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    learned = json.loads(tokenizer.to_str())["model"]
    return Qwen2Tokenizer(
        vocab=learned["vocab"],
        merges=[tuple(pair) for pair in learned["merges"]],
        eos_token=END_OF_TEXT,
        pad_token=PADDING,
        model_max_length=4 * recipe.sequence_length,
    )


def _packed(texts: list[str], tokenizer: Qwen2Tokenizer, recipe: Recipe) -> Tensor:
    """All files in a random order, an end-of-text token after each, as int64 rows of
    `sequence_length`.
    """
    ids = [encoding.ids for encoding in tokenizer.backend_tokenizer.encode_batch_fast(texts)]
    random.Random(recipe.seed).shuffle(ids)
    stream = torch.tensor([token for file in ids for token in (*file, tokenizer.eos_token_id)])
    rows = len(stream) // recipe.sequence_length
    return stream[: rows * recipe.sequence_length].view(rows, recipe.sequence_length)


def _train_model(
    rows: Tensor, tokenizer: Qwen2Tokenizer, recipe: Recipe, log: Callable[[str], None]
) -> Qwen2ForCausalLM:
    threads = torch.get_num_threads()
    rng = torch.get_rng_state()
    torch.set_num_threads(1)  # In this thread too; see `_train`.
    try:
        torch.manual_seed(recipe.seed)
        model = Qwen2ForCausalLM(_architecture(tokenizer, recipe))
        model.generation_config = GenerationConfig(
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            do_sample=False,
        )
        _train(model, rows, recipe, log)
    finally:
        torch.set_num_threads(threads)
        torch.set_rng_state(rng)
    return model.eval()


def _architecture(tokenizer: Qwen2Tokenizer, recipe: Recipe) -> Qwen2Config:
    return Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.num_hidden_layers,
        num_attention_heads=recipe.num_attention_heads,
        num_key_value_heads=recipe.num_key_value_heads,
        max_position_embeddings=4 * recipe.sequence_length,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _train(
    model: Qwen2ForCausalLM, rows: Tensor, recipe: Recipe, log: Callable[[str], None]
) -> None:
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(
        parameters, lr=recipe.lr, betas=(0.9, 0.95), weight_decay=recipe.weight_decay, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _lr_factor(step, recipe))
    batches = _batches(rows, recipe.batch_size, torch.Generator().manual_seed(recipe.seed))
    said = time.monotonic()
    losses = []
    # Cores work on sequences, not on parts of one operation: at this size those would wait for each
    # other most of the time, and on a busy machine nearly all of it. The sum does not depend on the
    # number of cores either.
    with ThreadPoolExecutor(
        len(os.sched_getaffinity(0)), initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        for step in range(1, recipe.steps + 1):
            parts = list(pool.map(partial(_gradients, model, parameters), next(batches).split(1)))
            losses += [loss for loss, _ in parts]
            for parameter, *gradients in zip(
                parameters, *(gradients for _, gradients in parts), strict=True
            ):
                parameter.grad = torch.stack(gradients).mean(0)
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            if time.monotonic() - said > 10 or step == recipe.steps:
                log(f"tiny-code: step {step}/{recipe.steps}  loss {sum(losses) / len(losses):.3f}")
                said = time.monotonic()
                losses = []


def _gradients(
    model: Qwen2ForCausalLM, parameters: list[Tensor], row: Tensor
) -> tuple[float, tuple[Tensor, ...]]:
    loss = model(input_ids=row, labels=row, use_cache=False).loss
    return loss.item(), torch.autograd.grad(loss, parameters)


def _batches(rows: Tensor, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Random rows, each once before any comes again."""
    while True:
        for chosen in torch.randperm(len(rows), generator=generator).split(batch_size):
            yield rows[chosen]


def _lr_factor(step: int, recipe: Recipe) -> float:
    if step < recipe.warmup_steps:
        return (step + 1) / recipe.warmup_steps
    done = (step - recipe.warmup_steps) / max(1, recipe.steps - recipe.warmup_steps)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done))
