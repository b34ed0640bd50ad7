"""Structured codecs, whose codes do not stand for one weight each: their names and what a Format of them may be.

vector   a code stands for `dim` weights along K, a row of a table that is fitted to the weight
e8p      a code stands for 8 weights: a point of the lattice E8 (QuIP#, https://arxiv.org/abs/2402.04396), of 16 bits,
         or 24 and 32 bits where a second point stands for what the first one leaves (residual vector quantization)
trellis  a weight is a function of 16 bits from its own code on (QTIP, https://arxiv.org/abs/2406.11235)
iq...    a code stands for 256 weights: a block of GGUF as it is, with numbers of vectors of 8 or 4 values, signs, and
         two levels of scales (`reference/blocks.py`)
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from lowbit.files import shown

# Codecs of blocks by the bytes of one, and the weights of all of them.
BLOCK_BYTES = {
    "iq1_s": 50, "iq1_m": 56, "iq2_xxs": 66, "iq2_xs": 74, "iq2_s": 82, "iq3_xxs": 98, "iq3_s": 110,
}  # fmt: skip
BLOCK_WEIGHTS = 256
CODECS = ("vector", "e8p", "trellis", *BLOCK_BYTES)
BITS = {
    "vector": tuple(range(1, 17)),
    "e8p": (16, 24, 32),
    "trellis": (2, 3, 4),
    **{codec: (8 * size,) for codec, size in BLOCK_BYTES.items()},
}
DIMS = {"vector": (2, 4, 8), "e8p": (8,), **dict.fromkeys(BLOCK_BYTES, (BLOCK_WEIGHTS,))}
STATE_BITS = 16  # of the stream that a weight of a trellis is a function of
GROUP_UNIT = 8  # groups are multiples of it
_SCALES = (None, "fp32", "fp16", "bf16")
_NAMES: dict[str, dict[str, Any]] = {
    "e8p": {"codec": "e8p", "bits": 16, "dim": 8},
    "e8p_rvq3": {"codec": "e8p", "bits": 24, "dim": 8},
    "e8p_rvq4": {"codec": "e8p", "bits": 32, "dim": 8},
    **{f"trellis{b}": {"codec": "trellis", "bits": b} for b in BITS["trellis"]},
    **{
        name: {"codec": name, "bits": 8 * size, "dim": BLOCK_WEIGHTS, "scale": None}
        for name, size in BLOCK_BYTES.items()
    },
}
# Names of vectors that lists show; others of the form are formats, too.
_VECTORS = ("vq8_d4", "vq12_d4", "vq16_d8")
NAMES = (*_NAMES, *_VECTORS)
_VECTOR = re.compile(r"vq(\d+)_d(\d+)")


def fields_of(name: str) -> dict[str, Any] | None:
    """The fields of the format of a name without suffixes; None if it is none of these.

    Raises:
        ValueError: it is `vqB_dD` with other B or D than there are.

    Example:
        >>> fields_of("vq12_d4")["bits"]
        12
    """
    match = _VECTOR.fullmatch(name)
    if match is None:
        fields = _NAMES.get(name)
    else:
        bits, dim = (int(part) for part in match.groups())
        if bits not in BITS["vector"] or dim not in DIMS["vector"]:
            raise ValueError(
                f"format {shown(name)}: vqB_dD takes B from 1 to {BITS['vector'][-1]} bits for D of {DIMS['vector']} "
                "weights"
            )
        fields = {"codec": "vector", "bits": bits, "dim": dim}
    return None if fields is None else {"group": None, "scale_rule": "rms", **fields}


def check_fields(format: Any, check: Callable[[bool, str, str], None]) -> None:
    """Checks what a Format with one of `CODECS` may be beside its bits; `check` raises unless its first
    argument is true.
    """
    given = f"with codec {format.codec!r}"
    if format.codec in BLOCK_BYTES:
        check(format.group is None, "group", f"None {given}: blocks hold their scales")
        check(format.scale is None, "scale", f"None {given}: blocks hold their scales")
    check(
        format.group is None or (format.group % GROUP_UNIT == 0),
        "group",
        f"None or a multiple of {GROUP_UNIT} {given}",
    )
    check(format.scale in _SCALES, "scale", f"one of {_SCALES} {given}")
    check(format.scale_rule == "rms", "scale_rule", f"'rms' {given}")
    for field, value in (
        ("zero", None),
        ("table", None),
        ("table_scope", "tensor"),
        ("packing", "bits"),
        ("activation", None),
    ):
        check(getattr(format, field) == value, field, f"{value!r} {given}")
