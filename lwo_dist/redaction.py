"""How a text is shown without the secrets in it, and which addresses are refused for theirs.

Gone are the credentials of URLs, what `secret_rule` knows by its form, and the credentials that the
environment holds.
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

# A password may contain a slash where nobody has escaped it; a port is no password.
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
    """`text` with user name and password removed from every URL in it, and the values of those
    parameters whose names say that they are secret.

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
    """Refuse an address with a password in it: settings are kept, sent, and shown by `ps`.

    Args:
        setting: its name, for the message.
        remedy: where the password belongs, for the end of the message.

    Raises:
        UserError
    """
    if holds_password(uri):
        shown = f" = {redact(uri)}" if "://" in uri else ""
        raise UserError(f"{setting}{shown} was given with a password; {remedy}")


def redact(text: str) -> str:
    """`text` without credentials in URLs, without tokens and key blocks, and without the
    credentials that the environment holds.
    """
    values = {os.environ.get(name, "") for name in _REDACTED_VARIABLES}
    held = {value for value in values if len(value) >= _MIN_REDACTED_LENGTH}
    for value in sorted(held | set(credentials_in(os.environ).values()), key=len, reverse=True):
        text = text.replace(value, "***")
    text = without_secrets(without_credentials(text))
    text = _VARIABLE.sub(lambda m: f"{m[1]}=***" if is_secret_name(m[1]) else m[0], text)
    return _BEARER.sub(r"\1 ***", text)


def redact_values(value: Any) -> Any:
    """`redact` for every text in nested mappings and sequences; keys become texts."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, Mapping):
        return {str(key): redact_values(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [redact_values(item) for item in value]
    return value


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


def _is_secret_parameter(match: re.Match[str]) -> bool:
    name, value = match.groups()
    # A path only leads to a secret: sslkey=/etc/...
    return (is_secret_name(name) or name.lower() in _SIGNATURES) and not value.startswith("/")


def _is_token(user: str) -> bool:
    return len(user) >= _MIN_TOKEN_LENGTH and any(map(str.isdigit, user))
