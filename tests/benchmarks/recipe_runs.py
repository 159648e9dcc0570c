"""The data and the runs of recipes.py: training, and the scores of what it gives."""

from __future__ import annotations

import copy
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import AutoModelForCausalLM, AutoTokenizer

import lwo_dist
from lwo_dist.config import Config, LWOConfig
from lwo_dist.orthogonal import ITERATIONS
from lwo_dist.registry import METHODS
from lwo_dist.tasks import metrics

__all__ = [
    "Training",
    "by_count",
    "load",
    "lora_settings",
    "prepare",
    "score",
    "settings_of",
    "train",
    "write",
]

LENGTH = 512
"""Tokens of a sequence, unless `--length` says otherwise."""
SEQUENCES = 8
"""Of a step."""
WARMUP = 4
POINTS = 6
"""Of the curve of the held-out loss, unless a run says otherwise."""
COUNTS = (0, 1, 3, 11, 51, 301)
"""How often a token was trained on: the least of each class."""
SCORED = 96
"""Held-out sequences."""
TAKEN_FROM = 128
"""Lines are scored that begin at this token of their sequence or later."""
WRITTEN = 4
"""Lines of a sequence that are written out after a run."""
LINE_TOKENS = 40
RANK = 16


# ---- data


def prepare(model: Path, target: Path, sources: Sequence[Path], length: int) -> None:
    """Sequences of `length` tokens of each source."""
    tokenizer = AutoTokenizer.from_pretrained(*_place(model), **_gguf(model))
    data = {}
    for source in sources:
        files = sorted(source.rglob("*.py"))
        random.Random(0).shuffle(files)
        texts = dict.fromkeys(file.read_text(errors="replace") for file in files)
        usable = [text for text in texts if 200 < len(text) < 200_000]
        held = max(1, len(usable) // 8)
        generator = torch.Generator().manual_seed(0)
        scored, lines = _windows(tokenizer, usable[:held], length)
        chosen = torch.randperm(len(scored), generator=generator)[:SCORED]
        train, _ = _windows(tokenizer, usable[held:], length)
        data[source.name] = {"train": train, "held": scored[chosen], "lines": lines[chosen]}
        print(f"{source.name}: {len(train)} sequences to train on, {len(chosen)} held out")
    torch.save(data, target)


def _windows(tokenizer: Any, texts: Sequence[str], length: int) -> tuple[Tensor, Tensor]:
    """Token ids, and of each token the number of the line that it is part of; -1: not scored."""
    ids: list[int] = []
    lines: list[int] = []
    for text in texts:
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        starts = [0]
        for line in text.splitlines(keepends=True):
            starts.append(starts[-1] + len(line))
        number = 0
        for token, (start, end) in zip(encoded.input_ids, encoded.offset_mapping, strict=True):
            while number + 1 < len(starts) - 1 and starts[number + 1] <= start:
                number += 1
            content = text[start:end].strip() != ""
            full = sum(map(str.isalnum, text[starts[number] : starts[number + 1]])) >= 3
            ids.append(token)
            lines.append(number if content and full else -1)
        ids.append(tokenizer.eos_token_id)
        lines.append(-1)
    number = len(ids) // length
    shape = (number, length)
    return (
        torch.tensor(ids[: number * length], dtype=torch.int32).view(shape),
        torch.tensor(lines[: number * length], dtype=torch.int32).view(shape),
    )


def _place(model: Path) -> tuple[str]:
    return (str(model.parent if model.suffix == ".gguf" else model),)


def _gguf(model: Path) -> dict[str, str]:
    return {"gguf_file": model.name} if model.suffix == ".gguf" else {}


# ---- runs


class Training:
    """One run of a list, a step at a time."""

    def __init__(self, run: dict[str, Any], base: Any, train: Tensor, device: str):
        torch.manual_seed(run["seed"])
        model = copy.deepcopy(base)
        method = METHODS.get(run["method"])
        method.prepare(model, Config(lora=lora_settings(run)))
        model.to(device).train()
        config = LWOConfig(
            **{"warmup_steps": WARMUP, **settings_of(run)},
            seed=run["seed"],
            max_steps=run["steps"],
        )
        self.lwo = lwo_dist.attach(model, config, method)
        self.seconds: list[float] = []
        self._device = device
        self._precision = precision_of(run, device)
        self._train = train
        self._order = _order(len(train), run["steps"] * SEQUENCES, run["seed"])

    @property
    def seen(self) -> Tensor:
        """The sequences of all steps so far."""
        return self._train[self._order[: len(self.seconds) * SEQUENCES]]

    def step(self) -> None:
        began = time.perf_counter()
        chosen = self._order[len(self.seconds) * SEQUENCES :][:SEQUENCES]
        ids = self._train[chosen].long().to(self._device)
        with _autocast(self._device, self._precision):
            loss = lwo_dist.causal_lm_loss(self.lwo.model, {"input_ids": ids, "labels": ids})
        self.lwo.backward(loss)
        self.lwo.step()
        if self._device == "cuda":
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - began)


def train(
    run: dict[str, Any], base: Any, data: dict[str, Tensor], device: str, tokenizer: Any
) -> dict[str, Any]:
    training = Training(run, base, data["train"], device)
    lwo = training.lwo
    precision = precision_of(run, device)
    curve = []
    every = max(1, run["steps"] // run.get("points", POINTS))
    for step in range(1, run["steps"] + 1):
        training.step()
        if step % every == 0 or step == run["steps"]:
            of_tokens, hits = score(lwo.model, data, device, precision)
            losses = of_tokens.mean(1).tolist()
            exact = 100 * statistics.fmean(hit == "1" for hit in "".join(hits))
            curve.append([step, round(statistics.fmean(losses), 4), round(exact, 2)])
    memory = lwo.memory()
    return {
        **run,
        "length": data["train"].shape[1],
        "loss": curve[-1][1],
        "exact": curve[-1][2],
        **(write(lwo.model, data, device, precision, tokenizer) if run.get("write", True) else {}),
        "by_count": by_count(of_tokens, data["held"], training.seen),
        "curve": curve,
        "iterations": ITERATIONS,
        "ms": round(1000 * statistics.median(training.seconds), 1),
        "optimizer_state_bytes": memory["optimizer_state_bytes"],
        "gradient_bytes": memory["gradient_bytes"],
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "losses": [round(loss, 4) for loss in losses],
        "hits": hits,
    }


def precision_of(run: dict[str, Any], device: str) -> str:
    """bf16 on a GPU and fp32 on a CPU, unless the run says otherwise."""
    return str(run.get("precision", "bf16" if device == "cuda" else "fp32"))


def _autocast(device: str, precision: str) -> torch.autocast:
    return torch.autocast(device, torch.bfloat16, enabled=precision == "bf16")


def settings_of(run: dict[str, Any]) -> dict[str, Any]:
    """Its `lwo`, and what all lists take for granted."""
    decay = {"lr_scheduler_type": "cosine"}
    if run["method"] != "lwo":
        return decay | run["lwo"]
    visits = {"steps_per_layer": 1, "order": "random", "state": "keep"}
    return decay | visits | {"embeddings": "visit", "head_rows": "all"} | run["lwo"]


def lora_settings(run: dict[str, Any]) -> dict[str, Any]:
    rank = run.get("rank", RANK)
    return {"rank": rank, "alpha": 2 * rank}


def _order(number: int, wanted: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    epochs = [torch.randperm(number, generator=generator) for _ in range(-(-wanted // number))]
    return torch.cat(epochs)


@torch.no_grad()
def score(
    model: Any, data: dict[str, Tensor], device: str, precision: str
) -> tuple[Tensor, list[str]]:
    """The loss of each token of each sequence but its first, in nats; and of each sequence a digit
    for each scored line: 1 if every token is the likeliest.

    Given the true tokens before it, a line of which each token is the likeliest is what greedy
    decoding writes.
    """
    model.eval()
    losses = []
    right: list[str] = []
    for ids, numbers in zip(data["held"].split(8), data["lines"].split(8), strict=True):
        tokens = ids.long().to(device)
        with _autocast(device, precision):
            logits = model(input_ids=tokens).logits[:, :-1].float()
        targets = tokens[:, 1:]
        of_token = torch.nn.functional.cross_entropy(logits.mT, targets, reduction="none")
        losses.append(of_token.cpu())
        hits = (logits.argmax(-1) == targets).cpu()
        for row, lines in zip(hits, numbers, strict=True):
            right.append(
                "".join("1" if row[places - 1].all() else "0" for places in _scored(lines))
            )
    model.train()
    return torch.cat(losses), right


def by_count(losses: Tensor, held: Tensor, seen: Tensor) -> list[list[float | None]]:
    """Held-out tokens by how often they occur in `seen`; of each class: [its least count, how many
    tokens, their mean loss].
    """
    vocabulary = 1 + int(torch.stack([held.max(), seen.max()]).max())
    times = torch.bincount(seen.flatten(), minlength=vocabulary)[held[:, 1:].long()]
    found: list[list[float | None]] = []
    for least, below in pairwise((*COUNTS, torch.inf)):
        own = losses[(times >= least) & (times < below)]
        found.append([least, len(own), round(own.mean().item(), 4) if len(own) else None])
    return found


def _scored(lines: Tensor) -> list[Tensor]:
    """The places of each scored line's tokens in one sequence."""
    numbers = lines.tolist()
    begun = {*numbers[:TAKEN_FROM], numbers[-1], -1}
    places: dict[int, list[int]] = defaultdict(list)
    for place, number in enumerate(numbers):
        if number not in begun:
            places[number].append(place)
    return list(map(torch.tensor, places.values()))


@torch.no_grad()
def write(
    model: Any, data: dict[str, Tensor], device: str, precision: str, tokenizer: Any
) -> dict[str, float]:
    """Scores of the first `WRITTEN` scored lines of each sequence, written by greedy decoding."""
    prompts, references = [], []
    for ids, lines in zip(data["held"].long(), data["lines"], strict=True):
        for places in _scored(lines)[:WRITTEN]:
            prompts.append(ids[: places[0]])
            references.append(tokenizer.decode(ids[places[0] : places[-1] + 1]))
    model.eval()
    predictions: list[str] = []
    for at in range(0, len(prompts), 128):
        part = prompts[at : at + 128]
        longest = max(map(len, part))
        # Padding on the left, so that all lines begin at the same place.
        padded = torch.stack([pad(ids, (longest - len(ids), 0)) for ids in part])
        mask = torch.stack([torch.arange(longest) >= longest - len(ids) for ids in part]).long()
        with _autocast(device, precision):
            found = model.generate(
                input_ids=padded.to(device),
                attention_mask=mask.to(device),
                max_new_tokens=LINE_TOKENS,
                do_sample=False,
                use_cache=True,
                pad_token_id=tokenizer.eos_token_id,
            )
        texts = tokenizer.batch_decode(found[:, longest:], skip_special_tokens=True)
        predictions += [text.partition("\n")[0] for text in texts]
    model.train()
    return {
        "written_exact": round(metrics.exact_match(predictions, references), 2),
        "edit_similarity": round(metrics.edit_similarity(predictions, references), 2),
        "bleu": round(metrics.bleu(predictions, references), 2),
    }


def load(model: Path) -> tuple[Any, Any]:
    base = AutoModelForCausalLM.from_pretrained(*_place(model), **_gguf(model), dtype=torch.float32)
    base.config.use_cache = False
    return base, AutoTokenizer.from_pretrained(*_place(model), **_gguf(model))
