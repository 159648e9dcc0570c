"""What counts as a secret, and that no text shows one."""

import pytest

from lwo_dist.redaction import (
    credentials_in,
    holds_password,
    holds_private_key,
    is_secret_name,
    looks_secret,
    redact,
    redact_values,
    without_credentials,
)

PLAIN = (
    "http://host:5000/a@b",
    "sqlite:////a/b.db",
    "git@github.com:a/b",
    "max_new_tokens=48",
)


def test_redact_strips_credentials_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "tok-123456")
    assert (
        redact("postgresql://me:s3@cret@db:5432/x?password=abc&y=1")
        == "postgresql://db:5432/x?password=&y=1"
    )
    assert redact("Bearer tok-123456 refused") == "Bearer *** refused"
    for plain in PLAIN:
        assert redact(plain) == plain


def test_a_short_value_of_the_environment_blanks_no_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "the")
    assert redact("the run") == "the run"


def test_without_credentials_leaves_the_rest_of_a_url() -> None:
    assert without_credentials("https://oauth2:ghp_abc@github.com/a/b") == "https://github.com/a/b"
    assert without_credentials("https://me:p@ss@github.com/a/b") == "https://github.com/a/b"
    assert without_credentials("fatal: 'https://t@h/a' and 'ssh://git@h/b'") == (
        "fatal: 'https://h/a' and 'ssh://h/b'"
    )
    for plain in PLAIN:
        assert without_credentials(plain) == plain


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("https://me:secret@host", True),
        ("postgresql://host/db?password=secret", True),
        ("postgresql://host/db?a=1&password=secret", True),
        ("https://me@host", False),
        ("http://host:5000", False),
        ("postgresql://host/db?password=", False),
        ("sqlite:////a/b.db", False),
    ],
)
def test_which_uri_holds_a_password(uri: str, expected: bool) -> None:
    assert holds_password(uri) is expected


def test_nested_values_are_redacted_and_other_values_stay() -> None:
    values = {"a": {"uri": "https://me:x@h"}, "b": ["https://me:x@h", 1], 3: (True, None)}
    assert redact_values(values) == {
        "a": {"uri": "https://h"},
        "b": ["https://h", 1],
        "3": [True, None],
    }


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("HF_TOKEN", True),
        ("AWS_SECRET_ACCESS_KEY", True),
        ("AWS_ACCESS_KEY_ID", True),
        ("WANDB_API_KEY", True),
        ("apikey", True),
        ("API_KEYS", True),
        ("KEY", True),
        ("DB_PASSWORD", True),
        ("GIT_CREDENTIALS", True),
        ("NCCL_DEBUG", False),
        ("KEYBOARD_LAYOUT", False),
        ("OMP_NUM_THREADS", False),
    ],
)
def test_which_name_says_secret(name: str, expected: bool) -> None:
    assert is_secret_name(name) is expected


def test_credentials_of_an_environment() -> None:
    long = "0123456789ab"
    environment = {
        "SOME_API_KEY": long,
        "SOME_TOKEN": long[:-1],  # too short to be told from ordinary words
        "TOKEN_FILE": f"/run/{long}",  # a path
        "NCCL_DEBUG": long,
    }
    assert credentials_in(environment) == {"SOME_API_KEY": long}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (".env", True),
        (".env.local", True),
        ("server.PEM", True),
        ("id_ed25519", True),
        ("ID_RSA.old", True),
        ("service-account-x.json", True),
        ("kubeconfig", True),
        ("environment.py", False),
        ("keys.py", False),
        ("credentials.py", False),
    ],
)
def test_which_file_looks_secret(name: str, expected: bool) -> None:
    assert looks_secret(name) is expected


def test_a_private_key_in_a_file() -> None:
    assert holds_private_key(b"a\n-----BEGIN OPENSSH PRIVATE KEY-----\nb")
    assert holds_private_key(b"-----BEGIN PRIVATE KEY-----")
    assert not holds_private_key(b"-----BEGIN PUBLIC KEY-----")
