"""What the fields of a Format may be; `Format` itself calls it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from lowbit import structured
from lowbit.files import shown

CODECS = ("affine", "lut", "e4m3", "e5m2", *structured.CODECS)
BITS = (1, 2, 3, 4, 5, 6, 8)
# Scales that are integers times a second level, and the least and the largest.
INTEGER_SCALES = {
    "int8": (-128, 127), "int7": (-64, 63), "int6": (-32, 31), "uint6": (0, 63), "uint4": (0, 15),
}  # fmt: skip
SCALES = (None, "fp32", "fp16", "bf16", "e8m0", "e4m3", "dq8", *INTEGER_SCALES)
SECOND_LEVELS = ("fp32", "fp16", "bf16")
SCALE_RULES = ("absmax", "rms", "mean", "minmax")
ZEROS = (None, "int", "float", "min")
SCOPES = ("tensor", "row", "group", "pair")
PAIR_BITS = (2, 3, 4)
# The bases whose digits take less than whole bits.
DIGIT_BASES = {"trits": 3, "base5": 5, "base6": 6}
PACKINGS = ("bits", *DIGIT_BASES)
ACTIVATIONS = (None, "int8", "int8_table")
OUTLIER_DTYPES = ("fp16", "fp32")
FACTOR_DTYPES = ("fp32", "fp16", "bf16")
MAX_NAME = 200  # errors repeat the name of a format
DQ_BLOCK = 256  # scales that share one second-level fp32 factor in "dq8" (QLoRA section 3)

Check = Callable[[bool, str, str], None]


def check_format(f: Any) -> None:
    """Raises ValueError that names the format, the field, what it must be and what it is."""

    def check(ok: bool, field: str, expected: str) -> None:
        if not ok:
            raise ValueError(
                f"format {shown(f.name)}: {field} must be {expected}, got {shown(getattr(f, field))}"
            )

    check(
        isinstance(f.name, str) and 0 < len(f.name) <= MAX_NAME,
        "name",
        f"a non-empty string of at most {MAX_NAME} characters",
    )
    check(f.codec in CODECS, "codec", f"one of {CODECS}")
    bits, dims = structured.BITS.get(f.codec, BITS), structured.DIMS.get(f.codec, (1,))
    check(_is_int(f.bits) and f.bits in bits, "bits", f"one of {bits}")
    check(_is_int(f.dim) and f.dim in dims, "dim", f"one of {dims}")
    check(
        f.group is None or (_is_int(f.group) and 0 < f.group < 2**31),
        "group",
        "a positive integer below 2^31, or None for the whole row",
    )
    check(f.scale in SCALES, "scale", f"one of {SCALES}")
    check(f.scale_rule in SCALE_RULES, "scale_rule", f"one of {SCALE_RULES}")
    check(f.zero in ZEROS, "zero", f"one of {ZEROS}")
    check(f.table_scope in SCOPES, "table_scope", f"one of {SCOPES}")
    check(f.packing in PACKINGS, "packing", f"one of {PACKINGS}")
    if f.codec != "affine":
        check(f.zero is None, "zero", f"None with codec {f.codec!r}")
    else:
        check(f.bits > 1, "bits", "2 or more with codec 'affine' (a 1-bit format is a 'lut')")
        check(f.scale is not None, "scale", "a scale dtype with codec 'affine'")
    if f.zero in ("float", "min"):
        integers = f.zero == "min" and f.scale in INTEGER_SCALES
        check(integers or f.scale in SECOND_LEVELS, "scale", "a float dtype with a float zero")
    _check_second_level(f, check)
    if f.table_scope == "pair":
        check(f.scale == "int7", "scale", "'int7' with table_scope 'pair'")
        check(f.bits in PAIR_BITS, "bits", f"one of {PAIR_BITS} with table_scope 'pair'")
    else:
        check(f.scale != "int7", "scale", "another one than 'int7' without table_scope 'pair'")
    if f.codec in ("e4m3", "e5m2"):
        check(f.bits == 8, "bits", f"8 with codec {f.codec!r}")
    if f.codec != "lut":
        check(f.table is None, "table", f"None with codec {f.codec!r}")
        check(f.table_scope == "tensor", "table_scope", "'tensor' without a table")
    if f.table is not None:
        check(
            isinstance(f.table, tuple) and 2 <= len(f.table) <= 2**f.bits,
            "table",
            f"a tuple of 2 to {2**f.bits} values",
        )
        check(all(math.isfinite(v) for v in f.table), "table", "finite values")
        check(max(map(abs, f.table)) > 0, "table", "not all zero")
        check(
            f.table_scope == "tensor",
            "table_scope",
            "'tensor' when the format carries the table",
        )
    if base := f.base:
        size = (base - 1).bit_length()
        check(
            f.bits == size and f.table is not None and len(f.table) <= base,
            "packing",
            f"'bits' unless the format is {size}-bit with a table of at most {base} values",
        )
    check(f.activation in ACTIVATIONS, "activation", f"one of {ACTIVATIONS}")
    if f.structured:
        structured.check_fields(f, check)
    if f.activation is not None:
        check(f.table_scope == "tensor", "table_scope", "'tensor' with int8 activations")
    _check_activation_group(f, check)
    if f.activation == "int8":
        _check_exact_in_int8(f)
    if f.activation == "int8_table":
        check(f.codec != "affine", "activation", "'int8' with integers: they are exact")
    check(
        _is_int(f.outliers) and 0 <= f.outliers < 2**31,
        "outliers",
        "an integer from 0 to 2^31 - 1",
    )
    check(f.outlier_dtype in OUTLIER_DTYPES, "outlier_dtype", f"one of {OUTLIER_DTYPES}")
    check(_is_int(f.rank) and 0 <= f.rank < 2**31, "rank", "an integer from 0 to 2^31 - 1")
    check(not (f.rank and f.outliers), "rank", "0 with outliers")
    check(isinstance(f.factor, str), "factor", f"one of {FACTOR_DTYPES} or the name of a format")
    check(f.rank > 0 or f.factor == "bf16", "factor", "'bf16' without a rank")


def check_factor(f: Any, factor: Any) -> None:
    """Raises ValueError unless the factors of a low-rank term can have the format `factor`: one level of scales, no
    term of its own, activations as they are.
    """
    plain = not factor.more_terms and factor.activation is None
    if not plain or factor.scale not in (None, *SECOND_LEVELS):
        raise ValueError(
            f"format {shown(f.name)}: factor must be one of {FACTOR_DTYPES}, or a format with scales in "
            f"{SECOND_LEVELS}, no term of its own and activations as they are, got {shown(factor.name)}"
        )


def _check_second_level(f: Any, check: Check) -> None:
    given = f"with scale {f.scale!r}"
    if not f.integer_scales:
        check(f.scale2 is None, "scale2", f"None {given}")
        check(f.scale2_group is None, "scale2_group", f"None {given}")
        return
    check(f.scale2 in SECOND_LEVELS, "scale2", f"one of {SECOND_LEVELS} {given}")
    group, size = f.group or 0, f.scale2_group
    check(group > 0, "group", f"a number of weights {given}")
    check(
        size is None or (_is_int(size) and 0 < size < 2**31 and size % group == 0),
        "scale2_group",
        f"a multiple of the group ({f.group}) below 2^31, or None for the whole row",
    )


def _check_activation_group(f: Any, check: Check) -> None:
    size = f.activation_group
    if size is None:
        return
    check(f.activation is not None, "activation_group", "None without int8 activations")
    check(_is_int(size) and 0 < size < 2**31, "activation_group", "a positive integer below 2^31")
    check(
        f.group is None or f.group % size == 0 or size % f.group == 0,
        "activation_group",
        f"a multiple of the group ({f.group}), or divide it",
    )


def _check_exact_in_int8(f: Any) -> None:
    if f.int8_step is None:
        raise ValueError(
            f"format {f.name!r}: its table is not exact in int8; activation 'int8_table' (suffix _a8t) "
            "rounds it"
        )


def _is_int(v: object) -> bool:
    return isinstance(v, int) and not isinstance(v, bool)
