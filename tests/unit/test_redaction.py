"""What counts as a secret, and that no text shows one."""

import pytest

from lwo_dist.errors import UserError
from lwo_dist.redaction import (
    credentials_in,
    holds_password,
    redact,
    redact_values,
    refuse_password,
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
        ("s3://KEY:SE/CR+ET@bucket/runs", True),
        ("s3://bucket/runs?access_key=AB&secret_key=CD", True),
        ("https://host/a.git?private_token=abc", True),
        ("https://account.blob.core.windows.net/c?sv=1&sig=abc", True),
        (f"https://ghp_{'a1' * 18}@github.com/a/b", True),
        ("https://0123456789abcdef0123@host/a.git", True),
        ("https://hooks.slack.com/services/" + "T0/B1/" + "a1" * 12, True),
        ("https://:token@host/a.git", True),
        ("oauth2:token@host:a/b.git", True),
        ("https://me@host", False),
        ("https://a-long-name-of-a-team-of-ours@host", False),
        ("https://team@dev.azure.com/team/_git/code", False),
        ("abfs://my-training-data-2026-of-the-team@account.dfs.core.windows.net/x", False),
        ("ssh://git@host:22/a.git", False),
        ("git@host:a/b", False),
        ("http://host:5000/a@b", False),
        ("http://[::1]:5000/a@b", False),
        ("postgresql://host/db?sslkey=/etc/key", False),
        ("s3://bucket/runs?region=eu-west-1", False),
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


def test_credentials_of_an_environment() -> None:
    long = "0123456789ab"
    environment = {
        "SOME_API_KEY": long,
        "SOME_TOKEN": long[:-1],  # too short to be told from ordinary words
        "TOKEN_FILE": f"/run/{long}",  # a path
        "NCCL_DEBUG": long,
    }
    assert credentials_in(environment) == {"SOME_API_KEY": long}


def test_a_password_is_refused_without_being_shown() -> None:
    with pytest.raises(UserError) as error:
        refuse_password("storage", "s3://AKIA:hunter2@bucket/x", "use the environment")
    assert str(error.value) == "storage = s3://bucket/x contains a password; use the environment"
    with pytest.raises(UserError) as error:
        refuse_password("data.source", "me:hunter2@host:x", "use a key")
    assert str(error.value) == "data.source contains a password; use a key"
    refuse_password("storage", "s3://bucket/x", "")


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMI/K7MDENG"),
        ("AZURE_STORAGE_KEY", "Zm9vYmFyYmF6cXV4"),
        ("DATABRICKS_TOKEN", "some-databricks-token"),
        ("RAY_AUTH_TOKEN", "fedcba9876543210"),
    ],
)
def test_credentials_of_the_environment_are_redacted(
    variable: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    assert redact(f"refused: {value}, sorry") == "refused: ***, sorry"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("RAY_AUTH_TOKEN=abc123 ray start", "RAY_AUTH_TOKEN=*** ray start"),
        ("export AWS_SECRET_ACCESS_KEY='a b c' x", "export AWS_SECRET_ACCESS_KEY=*** x"),
        ("Authorization: Bearer fedcba9876543210", "Authorization: Bearer ***"),
        ("dapi" + "0123456789abcdef" * 2, "dapi***"),
        ("at ASIA0123456789ABCDEF:", "at A***:"),
        ("https://h/c?sv=1&sig=a%2Fb&x=2", "https://h/c?sv=1&sig=&x=2"),
        ("h?X-Amz-Signature=ab&X-Amz-Date=2", "h?X-Amz-Signature=&X-Amz-Date=2"),
        ("AccountName=x;AccountKey=abc==;y", "AccountName=x;AccountKey=;y"),
        ("Basic authentication failed", "Basic authentication failed"),
        ("NCCL_DEBUG=INFO", "NCCL_DEBUG=INFO"),
    ],
)
def test_tokens_are_redacted(text: str, expected: str) -> None:
    assert redact(text) == expected
