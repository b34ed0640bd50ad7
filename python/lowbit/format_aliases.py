"""What people type for formats: other names of the built-in ones, and what may have been meant by an unknown one."""

from __future__ import annotations

import re
from collections.abc import Collection

from lowbit.files import shown
from lowbit.format_names import EXPECTED
from lowbit.text import did_you_mean

# Names that other programs have for formats, in small letters with underscores.
ALIASES = {
    "1.58bit": "ternary", "b1.58": "ternary", "bnb_nf4": "nf4", "bnb_fp4": "fp4",
    "float8": "e4m3", "float8_e4m3": "e4m3", "float8_e4m3fn": "e4m3", "float8_e5m2": "e5m2",
    "fp8": "e4m3", "fp8_e4m3": "e4m3", "fp8_e4m3fn": "e4m3", "fp8_e5m2": "e5m2",
    "iq4nl": "iq4_nl", "iq4xs": "iq4_xs", "mx4": "mxfp4",
    # The type of most of the weights in a mixture of llama.cpp.
    "q2_k_s": "q2_k", "q3_k_l": "q3_k", "q3_k_m": "q3_k", "q3_k_s": "q3_k", "q4_k_m": "q4_k", "q4_k_s": "q4_k",
    "q5_k_m": "q5_k", "q5_k_s": "q5_k",
    **{f"{b}bit": f"int{b}" for b in (2, 3, 4, 5, 6, 8)},
    **{f"w{b}a16": f"int{b}" for b in (2, 3, 4, 5, 6, 8)},
    **{f"w{b}a8": f"int{b}_a8" for b in (2, 3, 4, 5, 6)}, "w8a8": "int8_row_a8",
}  # fmt: skip
# What people take for a format and is a method, or another library's name of one.
_METHODS = ("awq", "bitnet", "distq", "gptq", "hqq", "kde", "lloyd", "search", "smoothquant", "twn")
_LONGEST = sorted(ALIASES, key=len, reverse=True)


def known_name(name: str) -> str:
    """The name of this package for one that other programs have, with what follows it; else the name in small letters.

    >>> known_name("FP8"), known_name("w4a16-g64"), known_name("Q4_K_M")
    ('e4m3', 'int4_g64', 'q4_k')
    """
    plain = re.sub(r"^(\d)_bit", r"\1bit", name.strip().lower().replace("-", "_"))
    for alias in _LONGEST:
        if plain == alias or plain.startswith(f"{alias}_"):
            return _joined(ALIASES[alias], plain[len(alias) :])
    return plain


def _joined(base: str, suffix: str) -> str:
    """A base with what follows: a group that is given takes the place of that of the base."""
    grouped = re.search(r"_(?:g\d+|row)(?=_|$)", suffix)
    return (base.replace("_row", "") if grouped else base) + suffix


def resolve(spec: str, base: str, known: Collection[str]) -> str:
    """Another name for a format that `formats.parse` does not know, whose name without suffixes is `base`.

    Raises:
        ValueError: there is none; the message says what may have been meant.
    """
    other = known_name(spec)
    if other != spec and any(f"{other}_".startswith(f"{name}_") for name in known):
        return other
    words = base.split("_")
    if method := next((word for word in words if word in _METHODS), None):
        hint = f"; {method!r} is a method: give it as method={method!r}, beside a format such as 'int4'"
    else:
        every = [*known, *ALIASES]
        hint = did_you_mean(base, every) or did_you_mean(words[0], every)
    raise ValueError(
        f"unknown format {shown(spec)}; expected a name of lowbit.formats(), {EXPECTED}{hint}"
    )
