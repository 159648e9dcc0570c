"""Random hostile runs, buckets and configs are contained."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from lwo_dist.checkpoint.schema import INDEX, STATE
from lwo_dist.config import Config
from lwo_dist.config.reading import load_config
from lwo_dist.errors import UserError
from tests import hostile
from tests.hostile import (
    CODE,
    ESCAPE,
    MARKER,
    ODD_KEYS,
    Case,
    bucket_of,
    time_limit,
    try_all,
    watch,
)

case = hostile.case
no_hub = hostile.no_hub


NASTY = [
    "..",
    "../../../../outside/secret",
    "../../layers/../../../outside/secret.safetensors",
    "/etc/passwd",
    "/etc/hostname",
    "/dev/zero",
    "../../layers",
    "",
    ".",
    ESCAPE,
    "\u202e",
    "\udc80",
    "a\x00b",
    "modeling_mine.Mine",
    "os.system",
    "__reduce__",
    "x" * 5000,
    "%s%n{0.__class__}",
    "NaN",
]
NUMBERS = [-1, 0, 1, 2**31, 2**63, 10**30, -(10**30), 10**400, 1e308, float("nan"), float("inf")]
values = st.recursive(
    st.none() | st.booleans() | st.sampled_from(NUMBERS) | st.sampled_from(NASTY) | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(NASTY) | st.text(), inner, max_size=3)
    ),
    max_leaves=5,
)


def mutate(document: Any, draw: Callable[..., Any]) -> Any:
    """`document` with one to three values replaced, removed, renamed or added."""
    for _ in range(draw(st.integers(1, 3))):
        places = [(document, key) for key in document] if isinstance(document, dict) else []
        for holder, key in places:
            inner = holder[key]
            if isinstance(inner, dict):
                places += [(inner, name) for name in inner]
            elif isinstance(inner, list):
                places += [(inner, number) for number in range(len(inner))]
        if not places:
            return draw(values)
        holder, key = draw(st.sampled_from(places))
        how = draw(st.sampled_from(["replace", "replace", "remove", "rename", "add"]))
        if how == "remove":
            del holder[key]
        elif how == "replace" or isinstance(holder, list):
            holder[key] = draw(values)
        elif how == "rename":
            holder[draw(st.sampled_from(NASTY) | st.text())] = holder.pop(key)
        else:
            holder[draw(st.sampled_from(NASTY) | st.text())] = draw(values)
    return document


def hostile_state(case: Case, draw: Callable[..., Any]) -> None:
    state = mutate(case.state(), draw)
    case.reseal(state if isinstance(state, dict) else {"step": state})


def hostile_file(case: Case, draw: Callable[..., Any]) -> None:
    name = draw(st.sampled_from([INDEX, "config.json", "generation_config.json"]))
    case.put_json(name, lambda document: mutate(document, draw))


def hostile_bytes(case: Case, draw: Callable[..., Any]) -> None:
    names = [path for path in sorted(case.run.rglob("*")) if path.is_file()]
    path = draw(st.sampled_from(names))
    path.write_bytes(
        draw(
            st.binary(max_size=50) | st.sampled_from([b"[" * 50_000, b'{"a":' * 9000, b"9" * 9999])
        )
    )
    reference = os.path.relpath(path, case.step)
    if reference in case.state()["sha256"] if path.name != STATE else False:
        case.put(reference, path.read_bytes())


def hostile_tree(case: Case, draw: Callable[..., Any]) -> None:
    for _ in range(draw(st.integers(1, 3))):
        paths = [path for path in sorted(case.run.rglob("*")) if not path.is_symlink()]
        path = draw(st.sampled_from(paths))
        how = draw(st.sampled_from(["link", "link", "moved", "odd", "pipe", "code"]))
        if how == "odd":
            name = draw(st.sampled_from(["\x1b[2J", "\udc80", "a\nb", "-rf", "step_²", "x" * 250]))
            os.makedirs(path.parent / name, exist_ok=True)  # noqa: PTH103  surrogates
        elif how == "code":
            (path.parent / "modeling_mine.py").write_bytes(CODE)
        else:
            if how == "moved":
                target = case.run.parent / f"moved{len(list(case.run.parent.iterdir()))}"
                shutil.move(path, target)
            else:
                target = case.outside / draw(st.sampled_from(["", "secret", "secret.json"]))
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            os.mkfifo(path) if how == "pipe" else path.symlink_to(target)


def hostile_config(case: Case, draw: Callable[..., Any]) -> None:
    path = case.run.parent / "config.yaml"
    config = mutate(json.loads(Config().model_dump_json()), draw)
    text = json.dumps(config, ensure_ascii=draw(st.booleans()))
    text += draw(st.sampled_from(["", "\n&a *a", "\n!!python/name:os.system", "\n- &a [*a]"]))
    path.write_bytes(text.encode(errors="surrogatepass"))
    override = f"{draw(st.sampled_from(list(Config.model_fields)))}={draw(st.text())}"
    for overrides in ((), (override,)):
        try:
            load_config(path, overrides)
        except UserError as error:
            assert len(str(error)) < 3000


@pytest.fixture
def warm(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    """Libraries create their own caches at first use."""
    assert any("model: " in line for line in try_all(str(case.run), case.run / "model", capsys))


KINDS = [hostile_state, hostile_file, hostile_bytes, hostile_tree, hostile_config]


@settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],  # shrinking would take minutes
    suppress_health_check=list(HealthCheck),
)
@given(st.data())
def test_300_random_hostile_artefacts_are_contained(
    warm: None,
    tmp_path_factory: pytest.TempPathFactory,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    data: st.DataObject,
) -> None:
    folder = tmp_path_factory.mktemp("hostile").resolve()
    case = Case(folder)
    make = data.draw(st.sampled_from(KINDS))
    odd = data.draw(st.lists(st.sampled_from(ODD_KEYS) | st.text(min_size=1), max_size=3))
    in_bucket = data.draw(st.integers(0, 3)) == 0
    try:
        with time_limit(60):
            make(case, data.draw)
            watch.seen.clear()
            watch.folder = case.run.parent
            if in_bucket and make is not hostile_tree:
                with bucket_of(case, odd, monkeypatch) as (url, _):
                    try_all(url, case.run.parent / "out", capsys)
            else:
                try_all(str(case.run), case.run.parent / "out", capsys)
            watch.folder = None
        assert watch.seen == []
        case.check()
    finally:
        watch.folder = None
        MARKER.unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
