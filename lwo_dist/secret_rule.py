"""The definition of a secret: file names, key blocks and token formats.

Reading sources, packing jobs and redaction all use this module and no other rule.

The patterns are our own, based on the default rules of gitleaks 8 and the token formats that the
services document. No maintained detector library fits. Measured on 500 files of the standard
library (12.9 kB each, 0.26 ms to read and judge one) and 24 kinds of secrets: detect-secrets 1.5.0
takes 57 ms per file, finds 14 of the 24 and has had no release since May 2024; kingfisher 1.5.0
takes 0.14 ms and finds 18, and betterleaks 2.0.0 finds 21, but both are new native wheels of 60 to
70 MB, and kingfisher takes 4 s to start. Redaction is also part of the core, which depends on torch
and pydantic only. This table takes 0.1 ms per file and finds all 24.

Each pattern begins with a literal that is rare in code, and checks the text before it with a
lookbehind: Python searches for such a pattern ten times as fast as for an alternation of words.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

__all__ = ["Secret", "find_secret", "is_secret_file", "is_secret_name", "without_secrets"]

# KEY as a word or at the end of one: API_KEY, ACCESS_KEY_ID; not KEYBOARD.
_SECRET_NAME = re.compile(r"token|secret|passw|credential|keys?(?![a-z])", re.IGNORECASE)

# Matched against the file name; with a slash, against the end of the path.
_FILES = (
    *(".env", ".env.*", "*.env", ".envrc", ".secrets", "secrets.json", "secrets.toml"),
    *("secrets.yaml", "secrets.yml", "id_rsa*", "id_dsa*", "id_ecdsa*", "id_ed25519*"),
    *("*.pem", "*.key", "*.p8", "*.p12", "*.pfx", "*.ppk", "*.jks", "*.keystore", "*.keytab"),
    *("*.kdbx", ".netrc", "_netrc", ".npmrc", ".pypirc", ".pgpass", ".my.cnf", ".htpasswd"),
    *(".git-credentials", "credentials", "credentials.json", "credentials.toml", "auth_token"),
    *("kubeconfig", "*.kubeconfig", ".kube/config", ".docker/config.json", ".dockercfg"),
    *("*service-account*.json", "*service_account*.json", "application_default_credentials.json"),
    *("*.tfstate", "*.tfstate.*", "*.tfvars", "*.tfvars.json", ".terraformrc", "terraform.rc"),
    *(".databrickscfg", ".s3cfg", ".boto", "rclone.conf", ".vault_pass*", "vault_pass.txt"),
    *("auth.json", ".huggingface/token"),
)
# Meant to be shared: public keys and templates. Code about keys is judged by its content.
_NO_SECRET = ("*.pub", "*.example", "*.sample", "*.template", "*.tmpl", "*.dist", "*.md", "*.rst")
_NO_SECRET_CODE = ("*.py", "*.js", "*.ts", "*.go", "*.rs", "*.java", "*.c", "*.h", "*.rb", "*.sh")

# Literal -> what must follow it, and name -> pattern from there on. Lookbehinds repeat the literal.
_TOKENS: dict[str, tuple[str, dict[str, str]]] = {
    "-----BEGIN": (
        "",
        {
            # A constant in code ends here; a key continues.
            "private key": (
                r" [A-Z0-9 ]*PRIVATE KEY(?: BLOCK)?-----(?![\"'`])"
                r"(?:(?s:.{0,20000}?)-----END [A-Z0-9 ]+-----|(?:[\s\\nr]*[A-Za-z0-9+/=]{16,})*+)"
            )
        },
    ),
    "PuTTY-User-Key-File-": (
        "",
        {"private key": r"\d: ?(?:ssh|ecdsa)-(?s:.*?Private-MAC: \w+|.*)"},
    ),
    "_": (
        "(?=[A-Za-z0-9]{12})",
        {
            "GitHub token": r"(?<=\bgh[pousr]_)[A-Za-z0-9]{36,}|(?<=\bgithub_pat_)\w{22,}",
            "Hugging Face token": r"(?<=\bhf_)[A-Za-z0-9]{30,}|(?<=\bapi_org_)[A-Za-z]{30,}",
            "npm token": r"(?<=\bnpm_)[A-Za-z0-9]{36,}",
            "Stripe key": (
                r"(?:(?<=\b[rs]k_live_)|(?<=\b[rs]k_test_)|(?<=\bwhsec_))[A-Za-z0-9]{16,}"
            ),
            "Docker token": r"(?<=\bdckr_pat_)[\w-]{24,}|(?<=\bdckr_oat_)[\w-]{24,}",
            "DigitalOcean token": r"(?<=\bdo[opr]_v1_)[0-9a-f]{64}",
            "Shopify token": r"(?<=\bshp(?:at|ca|pa|ss)_)[0-9a-fA-F]{32}",
            "Grafana token": r"(?<=\bglsa_)\w{32,}|(?<=\bglc_)[A-Za-z0-9+/]{32,}",
            "Sentry token": r"(?<=\bsntry[su]_)[\w+/=]{40,}",
            "Groq key": r"(?<=\bgsk_)[A-Za-z0-9]{40,}",
            "Replicate token": r"(?<=\br8_)[A-Za-z0-9]{37}",
            "RubyGems key": r"(?<=\brubygems_)[0-9a-f]{48}",
            "Linear key": r"(?<=\blin_api_)[A-Za-z0-9]{32,}",
        },
    ),
    "-": (
        r"(?<=\w-)(?=[\w-]{12})",
        {
            "GitLab token": (
                r"(?:(?<=\bglpat-)|(?<=\bgldt-)|(?<=\bglrt-)|(?<=\bglft-)|(?<=\bglptt-)"
                r"|(?<=\bglcbt-)|(?<=\bglimt-)|(?<=\bglsoat-)|(?<=\bglagent-))[\w.-]{20,}"
            ),
            "Slack token": r"(?<=\bxox[abceoprs]-)[\w-]{10,}|(?<=\bxapp-)\d-[\w-]{10,}",
            "Anthropic key": r"(?<=\bsk-)ant-[\w-]{20,}",
            "OpenAI key": (r"(?<=\bsk-)(?:(?:proj|svcacct|admin|or)-[\w-]{20,}|[A-Za-z0-9]{32,})"),
            "Google token": r"(?<=\bGOCSPX-)[\w-]{20,}",
            "PyPI token": r"(?<=\bpypi-)Ag[\w-]{16,}",
            "New Relic key": r"(?<=\bNRAK-)[A-Z0-9]{27}",
            "Mailgun key": r"(?<=\bkey-)[0-9a-f]{32}\b",
            "Tailscale key": r"(?<=\btskey-)[a-z]+-[\w-]{16,}",
        },
    ),
    ".": (
        r"(?=[\w-]{12})",
        {
            "JSON web token": r"(?<=[\w-]\.)eyJ[\w-]{8,}\.[\w-]{10,}",
            "SendGrid key": r"(?<=\bSG\.)[\w-]{16,32}\.[\w-]{32,}",
            "Vault token": r"(?<=\bhv[sbr]\.)[\w-]{24,}",
            "Google token": r"(?<=\bya29\.)[\w-]{20,}",
            "Terraform token": r"(?<=\.atlasv1\.)[\w-]{60,}",
        },
    ),
    "A": (
        "",
        {
            "AWS key": r"(?<=\bA)(?:KIA|SIA|BIA|CCA|3T[A-Z0-9])[A-Z0-9]{16}\b",
            "Google API key": r"(?<=\bA)Iza[\w-]{35}",
            "Atlassian token": r"(?<=\bA)TATT3[\w=-]{50,}",
            "age key": r"(?<=\bA)GE-SECRET-KEY-1[A-Z0-9]{58}",
        },
    ),
    "dapi": ("", {"Databricks token": r"(?<=\bdapi)[0-9a-f]{32}(?:-\d)?\b"}),
    "Q~": ("", {"Azure client secret": r"(?<=[\w~.]{3}\dQ~)[\w~.-]{31,34}"}),
    '"service_account"': (
        "",
        {
            "Google service account": (
                r'(?:(?<="type": "service_account")|(?<="type":"service_account"))'
            )
        },
    ),
    "hooks.slack.com/": (
        "",
        {"Slack webhook": r"(?:services|workflows|triggers)/[\w/+-]{20,}"},
    ),
    "://": (
        "",
        {
            # Not if user and password are the same word, as for local databases, or the
            # password is a placeholder.
            "URL with a password": (
                r"(?P<user>[^\s/:@\"'`<>{}$%()\[\]\\*]{0,64}):"
                r"(?!(?:(?P=user)|(?i:password|passwd|pass|pwd|pw|x+|\.+|changeme))@)"
                r"[^\s/@\"'`<>{}$%()\[\]\\*]{3,256}(?=@[\w\[])"
            )
        },
    ),
}

# `name = value` and `name: value`, found by the value, which is rarer than the name. It is long,
# has two digits, and is not a call or an attribute.
_VALUE = (
    r"(?=[\w+/%-]{32})(?=[A-Za-z+/_%-]*+\d[A-Za-z+/_%-]*+\d)"
    r"(?P<value>[\w+/%-]{32,}+={0,2})(?![(.\[])"
)
_ASSIGNED = (rf"=(?<![=!<>]=)>?[ \t]?[\"']?{_VALUE}", rf":[ \t]?[\"']?{_VALUE}")
_NAMED_SECRET = (
    r"(?i:token|secret|passwd|password|passphrase|credentials?|[?&;]sig"
    r"|(?:api|auth|access|account|accesskey|private|secret|signing|shared|sharedaccess|storage"
    r"|encryption|master)[_-]?(?:access[_-]?)?key)[\"']?[ \t]{0,8}:?\Z"
)
_NAME_LENGTH = 64


@dataclass(frozen=True)
class Secret:
    """The kind and place of a secret; never its value."""

    rule: str
    """The kind, such as "GitHub token"."""
    line: int
    """Of its first character, counted from 1."""

    def __str__(self) -> str:
        return f"{self.rule}, line {self.line}"


def is_secret_name(name: str) -> bool:
    """Whether a variable or setting of this name holds a secret."""
    return _SECRET_NAME.search(name) is not None


def is_secret_file(name: str) -> bool:
    """Whether a file of this name usually holds a secret.

    Args:
        name: with or without its folders, separated by `/`.
    """
    name = f"/{name.lower()}"
    return _SECRET_FILE.search(name) is not None and _SHARED_FILE.search(name) is None


def find_secret(data: bytes) -> Secret | None:
    """A secret in the content of a file, in UTF-16 or any superset of ASCII; None without one."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        data = data.decode("utf-16", "replace").encode("utf-8", "replace")
    for start, _, rule in _find(data):
        return Secret(rule, data.count(b"\n", 0, start) + 1)
    return None


def without_secrets(text: str) -> str:
    """`text` with `***` in place of every token, key block and assigned secret. A prefix that
    identifies the kind stays.

    >>> without_secrets("refused: glpat-" + "0" * 20)
    'refused: glpat-***'
    """
    data = text.encode("utf-8", "surrogatepass")
    parts = []
    done = 0
    for start, end, _ in sorted(_find(data)):
        if start >= done:
            parts += [data[done:start], b"***"]
        done = max(done, end)
    return b"".join([*parts, data[done:]]).decode("utf-8", "surrogatepass")


def _find(data: bytes) -> Iterator[tuple[int, int, str]]:
    """(start, end, rule) of every secret, rule by rule; `start` is after the prefix."""
    tokens, assigned, named_secret = _patterns()
    for literal, pattern in tokens.items():
        names = list(_TOKENS[literal][1])
        for match in pattern.finditer(data):
            index = next(i for i in range(len(names)) if match[f"rule{i}"] is not None)
            yield match.start() + len(literal), match.end(), names[index]
    for pattern in assigned:
        for match in pattern.finditer(data):
            if named_secret.search(data, max(0, match.start() - _NAME_LENGTH), match.start()):
                yield match.start("value"), match.end("value"), "assigned secret"


@cache
def _patterns() -> tuple[dict[str, re.Pattern[bytes]], list[re.Pattern[bytes]], re.Pattern[bytes]]:
    tokens = {}
    for literal, (gate, rules) in _TOKENS.items():
        choice = "|".join(f"(?P<rule{i}>{rule})" for i, rule in enumerate(rules.values()))
        tokens[literal] = re.compile(f"{re.escape(literal)}{gate}(?:{choice})".encode())
    assigned = [re.compile(pattern.encode()) for pattern in _ASSIGNED]
    return tokens, assigned, re.compile(_NAMED_SECRET.encode())


def _file_pattern(names: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(f"/{fnmatch.translate(name)}" for name in names))


_SECRET_FILE = _file_pattern(_FILES)
_SHARED_FILE = _file_pattern((*_NO_SECRET, *_NO_SECRET_CODE))
