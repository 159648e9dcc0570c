"""The text in the bytes of a file: its encoding, and the code of a notebook."""

from __future__ import annotations

import codecs
import json
import re
from typing import Any

__all__ = ["NotTextError", "decode"]

# UTF-32's mark begins with UTF-16's.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
# PEP 263's pattern behind any comment sign, as Emacs and Vim have it, and XML's declaration.
_COOKIE = re.compile(rb"^[ \t\f]*(?:#|//|/\*|--|;|%|<!--|\").*?coding[:=][ \t]*([-\w.]+)", re.ASCII)
_XML = re.compile(rb"^<\?xml[^>]*?\sencoding=[\"']([-\w.]+)[\"']", re.ASCII)
_COOKIE_LINES = 2
_ASCII = bytes(range(32, 127))


class NotTextError(Exception):
    """The reason why a file holds no text to use."""


def decode(data: bytes, name: str = "") -> str:
    """The text of a file, with "\\n" at the end of each line; of a notebook, its code cells.

    A byte order mark says the encoding, or else a declaration in the first two lines (PEP 263, or
    XML's), or else it is UTF-8.

    Args:
        name: of the file; "*.ipynb" is a notebook.

    Raises:
        NotTextError: "binary", "not UTF-8" (nor what it declares), or "notebook without code".
    """
    text = _decoded(data)
    if "\0" in text:
        raise NotTextError("binary")
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if name.lower().endswith(".ipynb"):
        text = _code_of(text)
    return text if not text or text.endswith("\n") else text + "\n"


def _decoded(data: bytes) -> str:
    mark = next((encoding for mark, encoding in _MARKS if data.startswith(mark)), None)
    for encoding in (mark, None if mark else _declared(data), "utf-8"):
        if encoding is not None:
            try:
                text = data.decode(encoding)
                text.encode()  # no lone surrogates
                return text
            except (UnicodeError, LookupError):
                pass
    raise NotTextError("binary" if b"\0" in data else "not UTF-8")


def _declared(data: bytes) -> str | None:
    """The encoding that the first lines declare, if it is one of text that holds ASCII as it is."""
    lines = data[:1000].splitlines()[:_COOKIE_LINES]
    found = _XML.match(data[:1000]) or next(filter(None, map(_COOKIE.match, lines)), None)
    if found is None:
        return None
    name = found.group(1).decode()
    try:
        # Not unicode_escape and the like; nor UTF-16, which these bytes, read as ASCII, are not.
        if "escape" in name.lower() or _ASCII.decode(name).encode() != _ASCII:
            return None
    except (UnicodeError, LookupError):
        return None
    return name


def _code_of(text: str) -> str:
    """The code cells of a Jupyter notebook (nbformat 3 and 4), with an empty line between them.

    Raises: NotTextError.
    """
    try:
        notebook = json.loads(text)
        sheets = notebook.get("worksheets", [notebook])
        cells = [cell for sheet in sheets for cell in sheet["cells"]]
        code = [_source(cell) for cell in cells if cell["cell_type"] == "code"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise NotTextError("notebook without code") from None
    code = [source for source in code if source.strip()]
    if not code:
        raise NotTextError("notebook without code")
    return "\n\n".join(code)


def _source(cell: Any) -> str:
    lines = cell.get("source", cell.get("input", ""))
    source = lines if isinstance(lines, str) else "".join(lines)
    return source.replace("\r\n", "\n").replace("\r", "\n").rstrip("\n")
