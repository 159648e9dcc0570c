"""tiny-code is made once, whole or not at all, and is an ordinary folder afterwards."""

from __future__ import annotations

import fcntl
import math
import os
import signal
import sysconfig
import threading
from dataclasses import replace
from pathlib import Path
from queue import Empty, Queue
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lwo_dist.errors import UserError
from lwo_dist.examples import tiny_code
from lwo_dist.examples.tiny_code import Recipe, default_cache_folder, ensure_tiny_code
from tests.ranks import RanksError, run_ranks

TINY = Recipe(
    files=12,
    vocab_size=400,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    sequence_length=32,
    steps=20,
    warmup_steps=2,
    lr=1e-2,
)


def silent(line: str) -> None:
    pass


def unexpected(line: str) -> None:
    raise AssertionError(f"built again: {line}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ensure_tiny_code(tmp_path_factory.mktemp("cache"), recipe=TINY, log=silent)


def test_is_an_ordinary_folder(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert type(model).__name__ == "Qwen2ForCausalLM"
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert len(tokenizer) == model.config.vocab_size == 400
    assert tokenizer.eos_token_id != tokenizer.pad_token_id
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id
    prompt = tokenizer("def main():\n", return_tensors="pt")
    assert model.generate(**prompt, max_new_tokens=3).shape[1] <= prompt.input_ids.shape[1] + 3


def test_has_learned(folder: Path) -> None:
    tokenizer, model = (
        AutoTokenizer.from_pretrained(folder),
        AutoModelForCausalLM.from_pretrained(folder),
    )
    ids = tokenizer(
        Path(sysconfig.get_paths()["stdlib"], "argparse.py").read_text(), return_tensors="pt"
    ).input_ids
    with torch.no_grad():
        loss = model(input_ids=ids[:, :1000], labels=ids[:, :1000]).loss.item()
    assert loss < math.log(400) - 0.5


def test_tokenizer(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    newline = tokenizer("\n").input_ids
    assert len(newline) == 1
    texts = [
        (
            "def f(self, x):\n\n\n        return self.x[12] + 1  \n    \n\tx = '  '\r\n  #"
            " caf\u00e9 \U0001f40d\n"
        ),
        ":\n:\n)\n",
        Path(tiny_code.__file__).read_text(),
    ]
    for text in texts:
        ids = tokenizer(text).input_ids
        assert tokenizer.decode(ids) == text
        by_line = [id for line in text.split("\n") for id in tokenizer(line).input_ids + newline]
        assert ids == by_line[:-1]


def test_made_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ensure_tiny_code(folder.parent, recipe=TINY, log=unexpected) == folder
    with pytest.raises(AssertionError, match="built again"):
        ensure_tiny_code(folder.parent, recipe=replace(TINY, seed=1), log=unexpected)
    monkeypatch.setattr("sys.version_info", (3, 99, 0))
    with pytest.raises(AssertionError, match="built again"):
        ensure_tiny_code(folder.parent, recipe=TINY, log=unexpected)


def test_deterministic_on_any_number_of_cores(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = {0} if len(os.sched_getaffinity(0)) > 1 else {0, 1}
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: others)
    torch.manual_seed(1234)
    rng, threads = torch.get_rng_state(), torch.get_num_threads()
    again = ensure_tiny_code(tmp_path, recipe=TINY, log=silent)
    for name in ("model.safetensors", "tokenizer.json"):
        assert (again / name).read_bytes() == (folder / name).read_bytes()
    assert torch.equal(torch.get_rng_state(), rng) and torch.get_num_threads() == threads


def die_at_the_last_moment(cache: Path) -> None:
    Path.rename = lambda *args: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[method-assign, assignment]
    ensure_tiny_code(cache, recipe=TINY, log=silent)


def test_killed(tmp_path: Path) -> None:
    with pytest.raises(RanksError, match="died with exit code -9"):
        run_ranks(die_at_the_last_moment, 1, tmp_path)
    left = [path for path in tmp_path.iterdir() if path.is_dir()]
    assert [path.suffix for path in left] == [".unfinished"] and any(left[0].iterdir())
    (left[0] / "of-the-killed").touch()
    folder = ensure_tiny_code(tmp_path, recipe=TINY, log=silent)
    assert not (folder / "of-the-killed").exists()
    AutoModelForCausalLM.from_pretrained(folder)
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == [folder]


def test_waits_for_another_process(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: Queue[Any] = Queue()
    monkeypatch.setattr(tiny_code, "_build", lambda *args: said.put("builds too"))
    with (tmp_path / f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        waiter = threading.Thread(
            target=lambda: said.put(ensure_tiny_code(tmp_path, recipe=TINY, log=said.put)),
            daemon=True,
        )
        waiter.start()
        assert "waiting" in said.get(timeout=60)
        with pytest.raises(Empty):
            said.get(timeout=0.3)
        (tmp_path / folder.name).mkdir()
    assert said.get(timeout=60) == tmp_path / folder.name, "it takes what the other one made"


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be kept in .*LWO_CACHE_DIR"):
        ensure_tiny_code(tmp_path / "file" / "cache", recipe=TINY)
    monkeypatch.setenv("LWO_TINY_CODE", "huge")
    with pytest.raises(UserError, match="LWO_TINY_CODE = 'huge' must be one of full, small"):
        ensure_tiny_code(tmp_path)
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(UserError, match="only 0 of its sources"):
        ensure_tiny_code(tmp_path / "cache", recipe=TINY)
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]


def test_default_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LWO_CACHE_DIR", raising=False)
    assert default_cache_folder(tmp_path) == tmp_path / "cache"
    monkeypatch.setenv("LWO_CACHE_DIR", str(tmp_path / "mine"))
    assert default_cache_folder("runs") == tmp_path / "mine"
