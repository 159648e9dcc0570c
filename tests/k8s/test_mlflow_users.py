"""The users of MLflow's server, as its pod's init container sets them from the Secrets."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from .mlflow_pod import ADMIN, SECRETS, TRAINING, MlflowPod


@pytest.fixture
def pod(tmp_path: Path) -> MlflowPod:
    return MlflowPod(tmp_path)


def secrets(
    *, admin: tuple[str, str] = ADMIN, training: tuple[str, str] = TRAINING
) -> dict[str, dict[str, str]]:
    names = ("lwo-dist-mlflow", "lwo-dist-mlflow-training")
    return {
        secret: {**SECRETS[secret], "username": user, "password": password}
        for secret, (user, password) in zip(names, (admin, training), strict=True)
    }


def users(pod: MlflowPod) -> dict[str, tuple[bool, str]]:
    """Name -> whether it is an admin, and the hash of its password."""
    with sqlite3.connect(pod.data / "basic_auth.db") as database:
        rows = database.execute("SELECT username, is_admin, password_hash FROM users").fetchall()
    return {name: (bool(is_admin), password) for name, is_admin, password in rows}


def fits(password: str, user: tuple[bool, str]) -> bool:
    from werkzeug.security import check_password_hash

    return check_password_hash(user[1], password)


def test_training_gets_its_own_user_and_a_second_start_is_harmless(pod: MlflowPod) -> None:
    for _ in range(2):
        done = pod.make_users()
        assert done.returncode == 0, done.stderr
        made = users(pod)
        assert {name: is_admin for name, (is_admin, _) in made.items()} == {
            ADMIN[0]: True,
            TRAINING[0]: False,
        }
        assert fits(ADMIN[1], made[ADMIN[0]]) and fits(TRAINING[1], made[TRAINING[0]])


@pytest.mark.long
def test_passwords_follow_the_secrets_and_training_never_is_admin(pod: MlflowPod) -> None:
    assert pod.make_users().returncode == 0
    with sqlite3.connect(pod.data / "basic_auth.db") as database:
        database.execute("UPDATE users SET is_admin = 1 WHERE username = ?", [TRAINING[0]])
    new = secrets(
        admin=(ADMIN[0], "a new password of the admin"),
        training=(TRAINING[0], "a new password of training"),
    )
    assert pod.make_users(new).returncode == 0
    made = users(pod)
    assert fits("a new password of the admin", made[ADMIN[0]])
    assert fits("a new password of training", made[TRAINING[0]])
    assert not fits(ADMIN[1], made[ADMIN[0]]) and not fits(TRAINING[1], made[TRAINING[0]])
    assert made[TRAINING[0]][0] is False


@pytest.mark.long
@pytest.mark.parametrize(
    ("given", "message"),
    [
        (secrets(training=(ADMIN[0], TRAINING[1])), "training must not be the admin"),
        (
            secrets(training=(TRAINING[0], "short")),
            "Secret lwo-dist-mlflow-training: Password must be at least 12 characters.",
        ),
        (
            secrets(admin=(ADMIN[0], "short")),
            "Secret lwo-dist-mlflow: Password must be at least 12 characters.",
        ),
    ],
)
def test_bad_secrets_get_one_line(
    pod: MlflowPod, given: dict[str, dict[str, str]], message: str
) -> None:
    done = pod.make_users(given)
    assert done.returncode != 0
    assert message in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
