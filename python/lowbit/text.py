"""What is printed: strings of files and users made safe for a terminal, and data as valid JSON."""

from __future__ import annotations

import json
import math
import unicodedata
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


def one_line(text: str, limit: int = 2000) -> str:
    """`text` in one printable line of at most `limit` characters, cut in the middle."""
    line = printable(" ".join(text.split()))
    half = (limit - 5) // 2
    return line if len(line) <= limit else f"{line[:half]} ... {line[-half:]}"


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
