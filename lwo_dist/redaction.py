"""Redaction of secrets in texts, and refusal of URLs with a password.

Redacted are credentials in URLs, everything that `secret_rule` recognises, and credentials found in
the environment.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

from .errors import UserError
from .secret_rule import is_secret_name, without_secrets

__all__ = [
    "credentials_in",
    "holds_password",
    "redact",
    "redact_values",
    "refuse_password",
    "without_credentials",
]

# A password may contain an unescaped slash. A port is not a password.
_PASSWORD = r"[^/\s:\[\"'<>,]*:(?!\d+(?:[/?#]|\Z))[^\s@\"'<>,]+@"
_USERINFO = re.compile(rf"(?<=://)(?:[^/\s]+@|{_PASSWORD})")
_HOLDS_PASSWORD = re.compile(rf"://{_PASSWORD}|^[^\s/:@]+:[^\s/@]+@[\w.-]+[:/]")
_LONE_USER = re.compile(r"https?://([^/\s:@]+)@")
_PARAMETER = re.compile(r"(?<=[?&;])(?:amp;)?([\w.-]+)=([^&;\s\"'<>]+)")
_SIGNATURES = frozenset({"sig", "signature", "x-amz-signature", "pwd", "sas"})
_VARIABLE = re.compile(r"\b([A-Z][A-Z0-9_]{2,})=([^\s\"',;&]{4,}|\"[^\"]{4,}\"|'[^']{4,}')")
_BEARER = re.compile(r"\b(bearer|basic) +(?=\S*\d)[\w.~+/=-]{12,}", re.IGNORECASE)
_REDACTED_VARIABLES = ("MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "HF_TOKEN")
_MIN_REDACTED_LENGTH = 4  # a shorter value would blank out ordinary words
_MIN_CREDENTIAL_LENGTH = 12  # a shorter value is found in ordinary code
_MIN_TOKEN_LENGTH = 20


def without_credentials(text: str) -> str:
    """`text` without user names, passwords and the values of secret parameters in its URLs.

    >>> without_credentials("https://me:secret@github.com/a/b?token=1&x=2")
    'https://github.com/a/b?token=&x=2'
    """
    text = _USERINFO.sub("", text)
    return _PARAMETER.sub(
        lambda match: f"{match[1]}=" if _is_secret_parameter(match) else match[0], text
    )


def holds_password(uri: str) -> bool:
    """Whether `uri` holds a password: `user:password@`, a token in place of the user, or a
    parameter such as `password=`.
    """
    user = _LONE_USER.match(uri)
    return (
        _HOLDS_PASSWORD.search(uri) is not None
        or any(map(_is_secret_parameter, _PARAMETER.finditer(uri)))
        or (user is not None and _is_token(user[1]))
        or without_secrets(uri) != uri
    )


def refuse_password(setting: str, uri: str, remedy: str) -> None:
    """Refuse a URL with a password: settings are stored, sent, and shown by `ps`.

    Args:
        setting: its name, for the message.
        remedy: the end of the message; where the password belongs.

    Raises:
        UserError
    """
    if holds_password(uri):
        shown = f" = {redact(uri)}" if "://" in uri else ""
        raise UserError(f"{setting}{shown} contains a password; {remedy}")


def redact(text: str) -> str:
    """`text` without credentials in URLs, tokens, key blocks and the environment's credentials."""
    values = {os.environ.get(name, "") for name in _REDACTED_VARIABLES}
    held = {value for value in values if len(value) >= _MIN_REDACTED_LENGTH}
    for value in sorted(held | set(credentials_in(os.environ).values()), key=len, reverse=True):
        text = text.replace(value, "***")
    text = without_secrets(without_credentials(text))
    text = _VARIABLE.sub(lambda m: f"{m[1]}=***" if is_secret_name(m[1]) else m[0], text)
    return _BEARER.sub(r"\1 ***", text)


def redact_values(value: Any) -> Any:
    """`redact` every string in nested mappings and sequences; keys become strings."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, Mapping):
        return {str(key): redact_values(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [redact_values(item) for item in value]
    return value


def credentials_in(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables of `environment` that hold credentials, by name.

    Short values are left out, because any text may contain them, and so are paths, which only
    point to a credential.
    """
    return {
        name: value
        for name, value in environment.items()
        if is_secret_name(name)
        and len(value) >= _MIN_CREDENTIAL_LENGTH
        and not value.startswith("/")
    }


def _is_secret_parameter(match: re.Match[str]) -> bool:
    name, value = match.groups()
    # A path only points to a secret: sslkey=/etc/...
    return (is_secret_name(name) or name.lower() in _SIGNATURES) and not value.startswith("/")


def _is_token(user: str) -> bool:
    return len(user) >= _MIN_TOKEN_LENGTH and any(map(str.isdigit, user))
