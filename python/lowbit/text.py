"""What is printed: strings of files and users made safe for a terminal, and data as valid JSON."""

from __future__ import annotations

import difflib
import html
import json
import math
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

# Control characters, line and paragraph separators, halves of surrogates, and what turns the
# direction of the text around it.
_CATEGORIES = frozenset({"Cc", "Cs", "Zl", "Zp"})
_DIRECTIONS = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def printable(text: str, keep: str = "") -> str:
    """`text` with every character that a terminal would obey instead of showing it, but for those in
    `keep`, as an escape of Python's string literals.
    """
    return "".join(
        c.encode("unicode_escape").decode()
        if (unicodedata.category(c) in _CATEGORIES or c in _DIRECTIONS) and c not in keep
        else c
        for c in text
    )


def did_you_mean(word: str, known: Iterable[str], count: int = 3) -> str:
    """ "; did you mean 'a' or 'b'?" of the known words that look most like one; nothing if none does.

    >>> did_you_mean("gtpq", ["gptq", "rtn"])
    "; did you mean 'gptq'?"
    """
    close = difflib.get_close_matches(word, list(known), count, 0.6)
    if not close:
        return ""
    *first, last = map(repr, close)
    return f"; did you mean {', '.join(first)}{' or ' if first else ''}{last}?"


def one_line(text: str, limit: int = 2000) -> str:
    """`text` in one printable line of at most `limit` characters, cut in the middle."""
    line = printable(" ".join(text.split()))
    half = (limit - 5) // 2
    return line if len(line) <= limit else f"{line[:half]} ... {line[-half:]}"


def html_table(head: Sequence[str], rows: Iterable[Sequence[str]], caption: str) -> str:
    """A table for a notebook; every text is escaped."""

    def cells(tag: str, texts: Sequence[str]) -> str:
        return "".join(f"<{tag}>{html.escape(printable(text))}</{tag}>" for text in texts)

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    title = html.escape(printable(caption))
    return f"<table><caption>{title}</caption><tr>{cells('th', head)}</tr>{body}</table>"


def as_json(value: object) -> str:
    """JSON on one line. It has no names for NaN and infinities: they become null."""
    return json.dumps(_finite(value), allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
