"""What counts as a secret, and how a text is shown without one.

Three kinds are known: credentials inside a URL, values of variables whose name says so, and files
that hold keys or passwords.
"""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Mapping
from typing import Any

__all__ = [
    "credentials_in",
    "holds_password",
    "holds_private_key",
    "is_secret_name",
    "looks_secret",
    "redact",
    "redact_values",
    "without_credentials",
]

# KEY as a word of its own or at the end of one: API_KEY, ACCESS_KEY_ID; not KEYBOARD.
_SECRET_NAME = re.compile(r"token|secret|passw|credential|keys?(?![a-z])", re.IGNORECASE)
_USERINFO = re.compile(r"(?<=://)[^/\s]+@|(?<=[?&]password=)[^&\s]+")
_PASSWORD = re.compile(r"://[^/\s]*:[^/\s]*@|[?&]password=[^&\s]")
_PRIVATE_KEY = re.compile(rb"-----BEGIN [A-Z ]*PRIVATE KEY-----")
_REDACTED_VARIABLES = ("MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "HF_TOKEN")
_MIN_REDACTED_LENGTH = 4  # a shorter value would blank out ordinary words
_MIN_CREDENTIAL_LENGTH = 12  # a shorter value is found in ordinary code
_SECRET_FILES = (
    ".env",
    ".env.*",
    "*.pem",
    "*.key",
    "*.p12",
    "*.pfx",
    "*.jks",
    "id_rsa*",
    "id_dsa*",
    "id_ecdsa*",
    "id_ed25519*",
    ".netrc",
    ".npmrc",
    ".pypirc",
    ".git-credentials",
    ".htpasswd",
    "auth_token",
    "credentials",
    "credentials.json",
    "kubeconfig",
    "*.kubeconfig",
    "service-account*.json",
)


def without_credentials(text: str) -> str:
    """`text` with user name and password removed from every URL in it.

    >>> without_credentials("https://me:secret@github.com/a/b")
    'https://github.com/a/b'
    """
    return _USERINFO.sub("", text)


def holds_password(uri: str) -> bool:
    """Whether `uri` holds a password: `user:password@`, or a parameter `password=`."""
    return _PASSWORD.search(uri) is not None


def redact(text: str) -> str:
    """`text` without the credentials in its URLs and without those that the environment holds."""
    text = without_credentials(text)
    for name in _REDACTED_VARIABLES:
        value = os.environ.get(name, "")
        if len(value) >= _MIN_REDACTED_LENGTH:
            text = text.replace(value, "***")
    return text


def redact_values(value: Any) -> Any:
    """`redact` for every text in nested mappings and sequences; keys become texts."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, Mapping):
        return {str(key): redact_values(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [redact_values(item) for item in value]
    return value


def is_secret_name(name: str) -> bool:
    """Whether a variable or setting of this name holds a secret."""
    return _SECRET_NAME.search(name) is not None


def credentials_in(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables of `environment` that hold credentials, by name.

    Left out are short values, which any text may contain, and paths, which only lead to a
    credential.
    """
    return {
        name: value
        for name, value in environment.items()
        if is_secret_name(name)
        and len(value) >= _MIN_CREDENTIAL_LENGTH
        and not value.startswith("/")
    }


def looks_secret(file_name: str) -> bool:
    """Whether a file of this name (without folders) usually holds a secret."""
    return any(fnmatch.fnmatch(file_name.lower(), pattern) for pattern in _SECRET_FILES)


def holds_private_key(data: bytes) -> bool:
    """Whether `data` contains a private key in PEM form."""
    return _PRIVATE_KEY.search(data) is not None
