"""Relative paths: the driver makes them absolute, as workers run in folders of their own."""

from __future__ import annotations

from pathlib import Path

import pytest

from lwo_dist.cluster.jobs import _checked
from lwo_dist.cluster.ray_train import _passed_on
from lwo_dist.config.reading import load_config
from lwo_dist.driver import _with_absolute_paths, prepare
from lwo_dist.errors import UserError
from lwo_dist.files import absolute_uri
from tests.code_samples import code, write_tree
from tests.models import save_tiny_model


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("sqlite:///x.db", "sqlite:///{here}/x.db"),
        ("sqlite+pysqlite:///sub/x.db", "sqlite+pysqlite:///{here}/sub/x.db"),
        ("sqlite:////srv/x.db", "sqlite:////srv/x.db"),
        ("sqlite:///:memory:", "sqlite:///:memory:"),
        ("mlruns", "{here}/mlruns"),
        ("./mlruns", "{here}/mlruns"),
        ("file:mlruns", "file:{here}/mlruns"),
        ("file:///srv/mlruns", "file:///srv/mlruns"),
        ("http://host:5000/a", "http://host:5000/a"),
        ("postgresql://user@host/db", "postgresql://user@host/db"),
        ("databricks", "databricks"),
        ("databricks://profile", "databricks://profile"),
    ],
)
def test_local_uris_become_absolute(here: Path, uri: str, expected: str) -> None:
    assert absolute_uri(uri) == expected.format(here=here)


def test_every_path_that_a_worker_opens_is_absolute(here: Path) -> None:
    write_tree(here / "source")
    save_tiny_model(here / "model", [code(0)])
    settings = {
        "data.source": "source",
        "model.name": "model",
        "data.cache": "cache",
        "tracking.uri": "sqlite:///points.db",
        "storage": "runs",
        "tracking.enabled": "false",
        "train.sequence_length": "48",
        "eval.max_new_tokens": "8",
    }
    config = prepare(load_config(None, [f"{name}={value}" for name, value in settings.items()]))
    assert config.data.source == f"{here}/source"
    assert config.model.name == f"{here}/model"
    assert config.data.cache == f"{here}/cache"
    assert config.tracking.uri == f"sqlite:///{here}/points.db"
    assert config.storage == f"{here}/runs"


def test_what_is_no_path_stays_as_it_is(here: Path) -> None:
    settings = ["data.source=git@host:team/repo.git", "model.name=org/model"]
    config = load_config(None, settings)
    assert _with_absolute_paths(config) == config


def test_paths_in_the_environment_of_the_workers_are_absolute(here: Path) -> None:
    found = _passed_on(
        {
            "MLFLOW_TRACKING_URI": "sqlite:///x.db",
            "MLFLOW_REGISTRY_URI": "https://host/",
            "HF_HOME": "cache",
            "HF_TOKEN": "relative/looking",
            "GOOGLE_APPLICATION_CREDENTIALS": "keys/me.json",
            "AWS_CA_BUNDLE": "/etc/ca.pem",
            "HF_HUB_CACHE": "",
            "PATH": "bin",
        }
    )
    assert found == {
        "MLFLOW_TRACKING_URI": f"sqlite:///{here}/x.db",
        "MLFLOW_REGISTRY_URI": "https://host/",
        "HF_HOME": f"{here}/cache",
        "HF_TOKEN": "relative/looking",
        "GOOGLE_APPLICATION_CREDENTIALS": f"{here}/keys/me.json",
        "AWS_CA_BUNDLE": "/etc/ca.pem",
        "HF_HUB_CACHE": "",
    }


SUBMITTED = ("storage=/shared/runs", "run_name=r", "model.name=tiny-code")


@pytest.mark.parametrize("user", ["git", "gitea", "first.last", "me+x"])
def test_any_user_s_repository_is_one_on_another_machine_too(user: str) -> None:
    source = f"{user}@host.example:team/repo.git"
    config, _ = _checked(None, [*SUBMITTED, f"data.source={source}"])
    assert config.data.source == source


@pytest.mark.parametrize("setting", ["data.cache=cache", "tracking.uri=sqlite:///x.db"])
def test_a_relative_path_is_refused_on_another_machine(setting: str) -> None:
    with pytest.raises(UserError, match=f"^{setting.replace('=', ' = ')}: would be deleted with"):
        _checked(None, [*SUBMITTED, "data.source=/shared/code", setting])
