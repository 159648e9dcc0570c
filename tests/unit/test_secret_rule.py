"""The secret rule: each kind is found and redacted; ordinary code is left alone."""

from __future__ import annotations

import random
import string
import sysconfig
from pathlib import Path

import pytest

from lwo_dist.secret_rule import find_secret, is_secret_file, is_secret_name, without_secrets

ALPHANUMERIC = string.ascii_letters + string.digits
HEX = "0123456789abcdef"
_draw = random.Random(5)


def word(length: int, alphabet: str = ALPHANUMERIC) -> str:
    """Random, so that no scanner finds a secret in this repository."""
    return "".join(_draw.choice(alphabet) for _ in range(length))


def _key_block(kind: str) -> str:
    lines = "\n".join(word(64) for _ in range(8))
    return f"-----BEGIN {kind}-----\n{lines}\n-----END {kind}-----"


# Kind -> (surrounding text, the secret, name of the rule).
SECRETS = {
    "github": ("x = '{}'", "ghp_" + word(36), "GitHub token"),
    "github fine-grained": ("x = '{}'", f"github_pat_{word(22)}_{word(59)}", "GitHub token"),
    "gitlab": ("x = '{}'", "glpat-" + word(20), "GitLab token"),
    "aws id": ("x = '{}'", "AKIA" + word(16, string.ascii_uppercase), "AWS key"),
    "aws secret": (
        'aws_secret_access_key = "{}"',
        word(40, ALPHANUMERIC + "+/"),
        "assigned secret",
    ),
    "aws json": ('{{"SecretAccessKey": "{}"}}', word(40, ALPHANUMERIC + "+/"), "assigned secret"),
    "azure storage": (
        "DefaultEndpointsProtocol=https;AccountName=x;AccountKey={};EndpointSuffix=y",
        word(86) + "==",
        "assigned secret",
    ),
    "azure sas": ("https://x.blob.core.windows.net/c?sv=2022&sig={}", word(43) + "%3D", "assigned"),
    "azure client": ("x = '{}'", f"{word(3)}8Q~{word(34)}", "Azure client secret"),
    "google": ("x = '{}'", "AIza" + word(35), "Google API key"),
    "google account": ('{{{} , "x": 1}}', '"type": "service_account"', "Google service account"),
    "slack": ("x = '{}'", f"xoxb-{word(12, string.digits)}-{word(24)}", "Slack token"),
    "slack hook": ("'https://{}'", f"hooks.slack.com/services/{word(30)}", "Slack webhook"),
    "stripe": ("x = '{}'", "sk_live_" + word(24), "Stripe key"),
    "databricks": ("x = '{}'", "dapi" + word(32, HEX), "Databricks token"),
    "hugging face": ("x = '{}'", "hf_" + word(34, string.ascii_letters), "Hugging Face token"),
    "npm": ("//registry.npmjs.org/:_authToken={}", "npm_" + word(36), "npm token"),
    "pypi": ("password = {}", "pypi-AgEIcHlwaS5vcmc" + word(120), "PyPI token"),
    "openai": ("x = '{}'", f"sk-proj-{word(40)}", "OpenAI key"),
    "anthropic": ("x = '{}'", f"sk-ant-api03-{word(93)}", "Anthropic key"),
    "jwt": ("x = '{}'", f"eyJ{word(30)}.eyJ{word(60)}.{word(43)}", "JSON web token"),
    "sendgrid": ("x = '{}'", f"SG.{word(22)}.{word(43)}", "SendGrid key"),
    "vault": ("x = '{}'", f"hvs.{word(90)}", "Vault token"),
    "url": ("postgresql://{}@db.corp/x", "admin:" + word(12), "URL with a password"),
    "ray": ("export RAY_AUTH_TOKEN={}", word(64, HEX), "assigned secret"),
    "yaml": ("client_secret: {}", word(40), "assigned secret"),
    "pem": ("{}", _key_block("RSA PRIVATE KEY"), "private key"),
    "openssh": ("{}", _key_block("OPENSSH PRIVATE KEY"), "private key"),
    "pgp": ("{}", _key_block("PGP PRIVATE KEY BLOCK"), "private key"),
    "putty": (
        "{}",
        f"PuTTY-User-Key-File-3: ssh-ed25519\n{word(64)}\nPrivate-MAC: {word(64)}",
        "private key",
    ),
}


@pytest.mark.parametrize("kind", SECRETS)
def test_each_kind_is_found_and_redacted(kind: str) -> None:
    around, secret, name = SECRETS[kind]
    text = f"# first line\n{around.format(secret)}\nlast line\n"
    found = find_secret(text.encode())
    assert found is not None and found.line == 2
    assert name in found.rule
    assert secret[-10:] not in str(found)
    shown = without_secrets(text)
    assert "***" in shown and "first line" in shown and "last line" in shown
    if kind != "google account":  # a form of a file, whose secret is a key block
        assert not any(part in shown for part in (secret[-12:], secret[len(secret) // 2 :]))


def test_a_key_is_found_in_utf_16_and_in_any_ascii_encoding() -> None:
    text = f"é = 'ghp_{word(36)}'\n"
    for encoding in ("utf-8", "utf-16", "latin-1"):
        assert str(find_secret(text.encode(encoding))) == "GitHub token, line 1"


@pytest.mark.parametrize(
    "text",
    [
        "if '-----BEGIN RSA PRIVATE KEY-----' in text: ...",
        "-----BEGIN PUBLIC KEY-----\nMIIB\n-----END PUBLIC KEY-----",
        "-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----",
        "postgresql://postgres:postgres@localhost/test",
        "https://user:password@example.com",
        "https://{user}:{token}@{host}/",
        "https://$USER:$TOKEN@host/",
        "http://host:5000/a@b",
        "ssh://git@github.com/a/b",
        "token = tokenizer.encode_the_whole_text_in_2_parts_of_40(text)",
        "api_key = os.environ['MY_SERVICE_API_KEY_WITH_A_LONG_NAME_20']",
        f"sha256: {word(64, HEX)}",
        f"commit = '{word(40, HEX)}'",
        "hf_hub_download_with_a_long_name_of_forty_characters",
        "task-0123456789012345678901234567890123456789",
        "=" * 80,
        "key-value-store-of-the-first-generation",
        "pytest --token=short",
    ],
)
def test_ordinary_code_is_left_alone(text: str) -> None:
    assert find_secret(text.encode()) is None
    assert without_secrets(text) == text


def test_no_secret_is_found_in_the_standard_library() -> None:
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    assert len(files) > 100
    assert [file.name for file in files if find_secret(file.read_bytes())] == []
    assert not any(is_secret_file(file.name) for file in files)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (".env", True),
        (".env.local", True),
        ("deploy/production.env", True),
        ("server.PEM", True),
        ("id_ed25519", True),
        ("ID_RSA.old", True),
        (".npmrc", True),
        (".git-credentials", True),
        ("home/.netrc", True),
        (".pypirc", True),
        ("store.p12", True),
        ("store.jks", True),
        (".htpasswd", True),
        ("service-account-x.json", True),
        ("my_service_account.json", True),
        ("kubeconfig", True),
        ("home/.kube/config", True),
        ("home/.aws/credentials", True),
        (".docker/config.json", True),
        ("infra/terraform.tfstate", True),
        ("infra/prod.tfvars", True),
        # Meant to be shared.
        ("id_rsa.pub", False),
        (".env.example", False),
        ("infra/prod.tfvars.example", False),
        # Code about keys, judged by its content.
        ("id_rsa_keys.py", False),
        ("environment.py", False),
        ("keys.py", False),
        ("credentials.py", False),
        ("config.json", False),
        ("docker/config.json", False),
        (".env/readme.txt", False),
    ],
)
def test_which_file_names_are_secret(name: str, expected: bool) -> None:
    assert is_secret_file(name) is expected


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
def test_which_variable_names_are_secret(name: str, expected: bool) -> None:
    assert is_secret_name(name) is expected


@pytest.mark.parametrize(
    "piece", ["-----BEGIN PRIVATE KEY-----\n", "=a1", "glpat-", "a.eyJ", "://a:b", "n" * 40, "="]
)
def test_time_is_linear_in_the_text(piece: str) -> None:
    """Quadratic time would take hours."""
    data = piece.encode() * (4_000_000 // len(piece))
    find_secret(data)
    without_secrets(data[:200_000].decode())
