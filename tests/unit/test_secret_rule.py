"""The secret rule: each kind is found and redacted; ordinary code is left alone."""

from __future__ import annotations

import random
import string
import sysconfig
from pathlib import Path

import pytest

from lwo_dist import secret_rule
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


# Kind -> the prefixes of its tokens, and the shortest of what may follow.
_PREFIXES = {
    "GitHub token": {"ghp_ gho_ ghu_ ghs_ ghr_": word(36), "github_pat_": word(22)},
    "Hugging Face token": {"hf_": word(30), "api_org_": word(30, string.ascii_letters)},
    "npm token": {"npm_": word(36)},
    "Stripe key": {"sk_live_ rk_live_ sk_test_ rk_test_ whsec_": word(16)},
    "Docker token": {"dckr_pat_ dckr_oat_": word(24)},
    "DigitalOcean token": {"doo_v1_ dop_v1_ dor_v1_": word(64, HEX)},
    "Shopify token": {"shpat_ shpca_ shppa_ shpss_": word(32, HEX)},
    "Grafana token": {"glsa_ glc_": word(32)},
    "Sentry token": {"sntrys_ sntryu_": word(40)},
    "Groq key": {"gsk_": word(40)},
    "Replicate token": {"r8_": word(37)},
    "RubyGems key": {"rubygems_": word(48, HEX)},
    "Linear key": {"lin_api_": word(32)},
    "GitLab token": {"glpat- gldt- glrt- glft- glptt- glcbt- glimt- glsoat- glagent-": word(20)},
    "Slack token": {
        "xoxa- xoxb- xoxc- xoxe- xoxo- xoxp- xoxr- xoxs-": word(12),
        "xapp-1-": word(10),
    },
    "Anthropic key": {"sk-ant-": word(20)},
    "OpenAI key": {"sk-proj- sk-svcacct- sk-admin- sk-or-": word(20), "sk-": word(32)},
    "Google token": {"GOCSPX- ya29.": word(20)},
    "PyPI token": {"pypi-Ag": word(16)},
    "New Relic key": {"NRAK-": word(27, string.ascii_uppercase)},
    "Mailgun key": {"key-": word(32, HEX)},
    "Tailscale key": {"tskey-auth-": word(16)},
    "Vault token": {"hvs. hvb. hvr.": word(24)},
    "AWS key": {"AKIA ASIA ABIA ACCA A3TX": word(16, string.ascii_uppercase)},
    "Google API key": {"AIza": word(35)},
    "Atlassian token": {"ATATT3": word(50)},
    "age key": {"AGE-SECRET-KEY-1": word(58, string.ascii_uppercase)},
    "Databricks token": {"dapi": word(32, HEX)},
}
PREFIXES = [
    (kind, prefix, rest)
    for kind, tokens in _PREFIXES.items()
    for prefixes, rest in tokens.items()
    for prefix in prefixes.split()
]
# Without a prefix of their own: kind, a secret, and what only looks like it.
FORMS = [
    ("JSON web token", f"eyJ{word(9)}.eyJ{word(9)}.", word(10), word(9)),
    ("Terraform token", f"{word(14)}.atlasv1.", word(60), word(59)),
    ("Azure client secret", f"{word(3)}8Q~", word(31), word(30)),
    ("Slack webhook", "hooks.slack.com/services/", word(20), word(19)),
    ("Slack webhook", "hooks.slack.com/workflows/", word(20), word(19)),
    ("Slack webhook", "hooks.slack.com/triggers/", word(20), word(19)),
    ("Google service account", '"type":', '"service_account"', '"service-account"'),
    ("Google service account", '"type": ', '"service_account"', '"service-account"'),
    ("private key", "PuTTY-User-Key-File-3: ", "ecdsa-sha2-nistp256", "none"),
]


@pytest.mark.parametrize(
    ("kind", "prefix", "rest"), PREFIXES, ids=[prefix for _, prefix, _ in PREFIXES]
)
def test_a_token_is_known_by_its_prefix_and_length(kind: str, prefix: str, rest: str) -> None:
    token = prefix + rest
    assert str(find_secret(f"x = '{token}'".encode())) == f"{kind}, line 1"
    assert rest not in without_secrets(token)
    assert find_secret(token[:-1].encode()) is None
    assert find_secret(f"x{token}".encode()) is None


@pytest.mark.parametrize(
    ("kind", "start", "end", "other_end"),
    FORMS,
    ids=[f"{form[0]} {len(form[1])}" for form in FORMS],
)
def test_so_are_other_forms(kind: str, start: str, end: str, other_end: str) -> None:
    assert str(find_secret(f"x = '{start}{end}'".encode())) == f"{kind}, line 1"
    assert find_secret(f"x = '{start}{other_end}'".encode()) is None


@pytest.mark.parametrize(
    ("literal", "rule"),
    [(literal, rule) for literal, (_, rules) in secret_rule._TOKENS.items() for rule in rules],
)
def test_no_rule_is_without_an_example(
    literal: str, rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, rules = secret_rule._TOKENS[literal]
    examples = [around.format(secret) for around, secret, kind in SECRETS.values() if kind == rule]
    examples += [prefix + rest for kind, prefix, rest in PREFIXES if kind == rule]
    examples += [start + end for kind, start, end, _ in FORMS if kind == rule]
    left = {name: pattern for name, pattern in rules.items() if name != rule}
    tokens = {key: value for key, value in secret_rule._TOKENS.items() if key != literal}
    monkeypatch.setattr(secret_rule, "_TOKENS", tokens | ({literal: (gate, left)} if left else {}))
    monkeypatch.setattr(secret_rule, "_patterns", secret_rule._patterns.__wrapped__)
    found = [find_secret(example.encode()) for example in examples]
    assert any(secret is None or secret.rule != rule for secret in found)


VALUE = word(30) + "07"


@pytest.mark.parametrize(
    "name",
    [
        *("token", "MY_SECRET", "passwd", "password", "passphrase", "credential", "credentials"),
        *("api_key", "api-key", "apikey", "auth_key", "access_key", "account_key", "AccountKey"),
        *("private_key", "secret_key", "signing_key", "shared_key", "SharedAccessKey"),
        *("storage_key", "encryption_key", "master_key", "secret_access_key", "x?sig", "x&sig"),
    ],
)
def test_a_long_value_of_such_a_name_is_a_secret(name: str) -> None:
    for text in (
        f"{name}={VALUE}",
        f"{name}: {VALUE}",
        f'"{name}" : "{VALUE}"',
        f"{name} => {VALUE}",
    ):
        assert str(find_secret(text.encode())) == "assigned secret, line 1"
        assert VALUE not in without_secrets(text)


@pytest.mark.parametrize(
    "text",
    [
        f"key = {VALUE}",
        f"monkey_key = {VALUE}",
        f"my_design = {VALUE}",
        f"token = {VALUE[1:]}",
        f"token = {word(31, string.ascii_letters)}7",  # a name, with one digit
        f"token == {VALUE}",
        f"token != {VALUE}",
        f"token = {VALUE}(text)",
        f"token = {VALUE}.attribute",
        f"token = {VALUE}[0]",
    ],
)
def test_any_other_value_is_none(text: str) -> None:
    assert find_secret(text.encode()) is None


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
