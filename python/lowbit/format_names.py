"""The names of formats: what the suffixes of a name say (`split`), and the JSON of what has no name. `formats.parse`
puts a Format together from them.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Collection
from typing import Any

from lowbit.codebooks.tables import to_fp32
from lowbit.files import shown

EXPECTED = (
    "optionally followed by _gN or _row, a scale dtype, _a8 or _a8t or _a8bN, _oP, _rR: "
    "'int3_g64_bf16'"
)
# The suffix of an activation, and the word for it where it stands alone.
_ACTIVATION_SUFFIXES = {"int8": "a8", "int8_table": "a8t"}
_ACTIVATION = re.compile(r"(int8|int8_table)(?:_b(\d+))?")
_SECOND = r"(?:s(?P<second>\d+))?(?P<dtype>fp32|fp16|bf16)?"


@functools.cache
def _suffix(integers: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile(
        r"_(?:g(?P<group>\d+)|(?P<row>row)|(?P<scale>fp32|fp16|bf16|e8m0|e4m3|dq8)"
        r"|(?P<activation>a8t?)(?:b(?P<block>\d+))?"
        rf"|(?P<integers>{'|'.join(integers)}){_SECOND}|o(?P<outliers>\d+)(?P<wide>fp32)?"
        r"|r(?P<rank>\d+)(?P<factor>[a-z]+\d+)?)$"
    )


def split(
    name: str, bases: Collection[str], integer_scales: Collection[str]
) -> tuple[str, dict[str, Any]]:
    """The built-in name that a name begins with, and the fields of Format that its suffixes change.

    The suffixes, in any order and of each kind one:
        _gN, _row               the group: N weights, or the whole row
        _fp16, _dq8, ...        a scale dtype of one level
        _int8[sN][dtype]        an integer scale: its second level is fp32 per row, or with sN fp16 per N weights, or
                                `dtype`
        _a8[bN], _a8t[bN]       int8 activations, with t the table rounded to int8: a scale of x per row, or with bN
                                per N values of one
        _oP[fp32]               P outliers a row, in fp16 or fp32
        _rR[factor]             a term of rank R with factors in bf16, another dtype or a built-in format
    "nf4", "int3_g64", "uint4_g32_bf16", "nf4_g64_dq8", "int4_g32_a8", "int4_g32_a8b32", "int3_g64_o16",
    "int2_g64_r32", "int2_g64_r64int4", "nf4_g32_int8", "int4_g16_int6s256", "int4_g16_int8s256fp32".

    What is left may be none of `bases`.

    Raises:
        ValueError: two suffixes say the same thing.
    """
    base, suffix = name, _suffix(tuple(integer_scales))
    changes: dict[str, Any] = {}
    said: set[str] = set()
    while (match := suffix.search(base)) and base not in bases:
        base = base[: match.start()]
        what, fields = _meaning(match)
        if what in said:
            raise ValueError(f"format {shown(name)} gives its {what} twice")
        said.add(what)
        changes |= fields
    return base, changes


def _meaning(match: re.Match[str]) -> tuple[str, dict[str, Any]]:
    """What a suffix is about, and the fields that it sets."""
    if match["group"] or match["row"]:
        return "group", {"group": int(match["group"]) if match["group"] else None}
    if match["activation"]:
        kind = {v: k for k, v in _ACTIVATION_SUFFIXES.items()}[match["activation"]]
        block = int(match["block"]) if match["block"] else None
        return "activation", {"activation": kind, "activation_group": block}
    if match["outliers"]:
        dtype = match["wide"] or "fp16"
        return "outliers", {"outliers": int(match["outliers"]), "outlier_dtype": dtype}
    if match["rank"]:
        return "rank", {"rank": int(match["rank"]), "factor": match["factor"] or "bf16"}
    size = match["second"]
    second = match["dtype"] or ("fp16" if size else "fp32")
    return "scale", {
        "scale": match["integers"] or match["scale"],
        "scale2": second if match["integers"] else None,
        "scale2_group": int(size) if size else None,
    }


def without_terms(name: str) -> str:
    """The name without its outliers and its low-rank term; as it is if nothing else is left."""
    return re.sub(r"_(o\d+(fp32)?|r\d+([a-z]+\d+)?)(?=_|$)", "", name) or name


def with_group(name: str, group: int | None) -> str:
    """The name with this group in place of that which it may say."""
    return _with_suffix(name, r"g\d+|row", "row" if group is None else f"g{group}")


def with_scale(name: str, scale: str) -> str:
    """The name with scales of one level in this dtype in place of those which it may say."""
    return _with_suffix(name, r"fp32|fp16|bf16|e8m0|e4m3|dq8", scale)


def with_outliers(name: str, outliers: int, dtype: str) -> str:
    """The name with so many outliers in place of those which it may say."""
    said = "fp32" if dtype == "fp32" else ""
    return _with_suffix(name, r"o\d+(?:fp32)?", f"o{outliers}{said}")


def _with_suffix(name: str, known: str, suffix: str) -> str:
    made, found = re.subn(rf"_(?:{known})(?=_|$)", f"_{suffix}", name, count=1)
    return made if found else f"{name}_{suffix}"


def with_rank(name: str, rank: int, factor: str) -> str:
    """The name with a low-rank term, whose factors it says if it can."""
    said = factor if factor != "bf16" and re.fullmatch(r"[a-z]+\d+", factor) else ""
    return f"{name}_r{rank}{said}"


def with_activation(name: str, activation: str | None, group: int | None) -> str:
    """The name with a suffix for these activations in place of that which it may have."""
    plain = re.sub(r"_a8t?(b\d+)?(?=_|$)", "", name) or name
    if activation is None:
        return plain
    block = "" if group is None else f"b{group}"
    return f"{plain}_{_ACTIVATION_SUFFIXES[activation]}{block}"


def activation_of(word: str) -> tuple[str, int | None]:
    """The fields `activation` and `activation_group` of "int8", "int8_b32", "int8_table" or "int8_table_b32".

    Raises:
        ValueError: the word is none of that form.
    """
    match = _ACTIVATION.fullmatch(word)
    if match is None:
        raise ValueError(
            f"activations must be int8 or int8_table, or int8_bN or int8_table_bN for a scale per N values, "
            f"got {shown(word)}"
        )
    return match[1], int(match[2]) if match[2] else None


def fields_of(spec: str, known: Collection[str]) -> dict[str, Any]:
    """The fields of Format that a JSON spec holds.

    Raises:
        ValueError: it is no JSON object of such fields, or one that must be there is missing.
    """
    try:
        fields: dict[str, Any] = json.loads(spec)
    except json.JSONDecodeError as e:
        raise ValueError(f"format spec is not JSON ({e}): {shown(spec)}") from None
    if unknown := sorted(set(fields) - set(known)):
        raise ValueError(
            f"format spec has unknown fields {shown(unknown)}; expected {sorted(known)}"
        )
    if missing := sorted({"name", "codec", "bits"} - set(fields)):
        raise ValueError(f"format spec lacks {missing}: {shown(spec)}")
    table = fields.get("table")
    if table is not None:
        if not isinstance(table, list) or not all(isinstance(v, (int, float)) for v in table):
            raise ValueError(f"format spec: table must be a list of numbers, got {shown(table)}")
        fields["table"] = tuple(to_fp32(v) for v in table)
    return fields
