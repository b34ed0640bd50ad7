"""Formats: what the bits of a quantized weight mean. Pure data; no kernel knows these names.

Words: N = out features, K = in features, G = group (weights along K that share one scale).
    W[n, k] = scale[n, k // G] * table[code]                     codec "lut", "e4m3", "e5m2"
    W[n, k] = scale[n, k // G] * (code - zero)                   codec "affine", zero None | "int" | "float"
    W[n, k] = scale[n, k // G] * code + zero[n, k // G]          codec "affine", zero "min"
A symmetric affine format (zero None) has the constant zero 2^(bits - 1). A format without a scale has scale 1.
With outliers, W is this plus a sparse matrix that has the same number of entries in every row; with a rank, plus L R.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import struct
from dataclasses import dataclass
from typing import Any

from lowbit import format_aliases, format_names, structured
from lowbit.codebooks import tables
from lowbit.format_checks import (
    BITS,
    DIGIT_BASES,
    DQ_BLOCK,
    FACTOR_DTYPES,
    INTEGER_SCALES,
    SECOND_LEVELS,
    check_factor,
    check_format,
)

__all__ = [
    "BITS", "DIGIT_BASES", "DQ_BLOCK", "FACTOR_DTYPES", "FORMATS", "INTEGER_SCALES", "SECOND_LEVELS", "Format",
    "all_formats", "as_format", "parse",
]  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """One way to write a weight matrix in few bits.

    Attributes:
        name: the string that selects it.
        codec: how a code becomes a value: "affine", "lut", "e4m3", "e5m2", or one of `structured.py`.
        bits: bits of one code, one of 1, 2, 3, 4, 5, 6, 8; of structured codecs as said there.
        group: weights along K that share a scale; None means one scale per output row.
        scale: how scales are stored: "fp32", "fp16", "bf16", "e8m0" (a power of two in a byte),
            "e4m3" (with one fp32 factor per tensor), "dq8" (QLoRA double quantization: 8-bit dynamic
            code, one fp32 factor per 256 scales, one fp32 offset per tensor), "int8", "int6", "uint6" or "uint4" (an
            integer times `scale2`, as in GGUF's K-quants: the product in fp32, rounded once), "int7" (likewise, twice
            the integer plus the number of the group's table in a byte), or None (scale 1).
        scale2: with an integer scale, the dtype of its second level: "fp32", "fp16" or "bf16"; else None.
        scale2_group: weights along K that share one of `scale2`, a multiple of `group`; None means the whole row.
        scale_rule: what round-to-nearest fits the scale to: "absmax", "rms" or "mean" of |w|, or "minmax"
            (the range of an asymmetric affine group).
        zero: "int" (uint8 code), "float" or "min" (in the scale's dtype; with an integer scale an integer times a
            second level of its own), or None.
        table: values of the codes of a "lut" codec, 2 .. 2^bits of them; None means that the table is fitted
            to the weight and stored beside it.
        table_scope: one table per "tensor", per output "row", or per row and "group"; or a "pair" of tables for the
            tensor, of which the scale of each group, an "int7", says the group's: fitted, of 2, 3 or 4 bits.
        packing: "bits" (little-endian bit stream), or codes as digits of bytes: "trits" (base 3, five per
            byte), "base5" and "base6" (three per byte), for tables of no more values than the base.
        activation: None takes activations as given. "int8" quantizes x to int8 (absmax / 127) and
            sums exactly in int32; the table must be exact in int8 up to one factor. "int8_table" does so with
            the table itself rounded to int8: an entry moves by at most max |table| / 254.
        activation_group: values of a row of x that share a scale with int8 activations, from its first on: it divides
            `group` or is a multiple of it, as every int32 sum meets one scale of each. None means the whole row.
        outliers: weights of each row, at most K, whose rest W - W^ is stored beside the codes and added in fp32: the
            sparse part of SqueezeLLM's dense-and-sparse decomposition (arXiv 2306.07629). Interpretation: a
            fixed number in each row instead of one threshold for the matrix, so that shapes follow from the format.
        outlier_dtype: how that rest is stored, "fp16" or "fp32".
        rank: columns of L (N, rank) and rows of R (rank, K), whose product is added: CALDERA's low-rank term (arXiv
            2405.18886). Below N and K; 0 means none.
        factor: how L and R are stored: "fp32", "fp16", "bf16", or the name of a format, in which each is a quantized
            matrix of its own, with groups along its rows.
        dim: weights along K of one code, 1 but with codecs "vector" and "e8p"; K is filled up to whole codes.
    """

    name: str
    codec: str
    bits: int
    group: int | None = None
    scale: str | None = "fp16"
    scale_rule: str = "absmax"
    zero: str | None = None
    table: tuple[float, ...] | None = None
    table_scope: str = "tensor"
    packing: str = "bits"
    activation: str | None = None
    outliers: int = 0
    outlier_dtype: str = "fp16"
    rank: int = 0
    factor: str = "bf16"
    scale2: str | None = None
    scale2_group: int | None = None
    activation_group: int | None = None
    dim: int = 1

    def __hash__(self) -> int:
        # Equal formats have equal names; hashing a table of 256 values takes longer than a small product.
        return hash((self.name, self.bits, self.group))

    def __post_init__(self) -> None:
        check_format(self)
        if self.rank and self.factor not in FACTOR_DTYPES:
            check_factor(self, parse(self.factor))

    @classmethod
    def lut(
        cls,
        *,
        bits: int,
        table: object | None = None,
        group: int | None = 64,
        scale: str | None = "fp16",
        scale_rule: str = "absmax",
        table_scope: str = "tensor",
        activation: str | None = None,
        activation_group: int | None = None,
        outliers: int = 0,
        name: str | None = None,
    ) -> Format:
        """Makes a codebook format of one's own.

        Args:
            bits: bits of one code.
            table: 2 .. 2^bits finite values (any sequence, array or 1-D tensor), or None to fit the table to
                each weight (`method="kmeans"`).
            group, scale, scale_rule, table_scope, activation, activation_group, outliers: as in `Format`.
            name: a name for reports; by default one that says bits, group and outliers.
        """
        if table is not None:
            values = table.tolist() if hasattr(table, "tolist") else table
            if not isinstance(values, (list, tuple)) or not all(
                isinstance(v, (int, float)) for v in values
            ):
                raise TypeError(f"table must be a flat sequence of numbers, got {table!r}")
            table = tuple(tables.to_fp32(v) for v in values)
        suffix = "row" if group is None else f"g{group}"
        suffix += f"_o{outliers}" if outliers else ""
        kind = "lut" if table is not None else "kmeans"
        return cls(
            name=name or f"{kind}{bits}_{suffix}",
            codec="lut",
            bits=bits,
            group=group,
            scale=scale,
            scale_rule=scale_rule,
            table=table,
            table_scope=table_scope,
            activation=activation,
            activation_group=activation_group,
            outliers=outliers,
        )

    @property
    def structured(self) -> bool:
        """Whether codes stand for several weights, or weights for several codes (`structured.py`)."""
        return self.codec in structured.CODECS

    @property
    def fitted(self) -> bool:
        """Whether the table is fitted to each weight and stored beside it."""
        return self.codec in ("lut", "vector") and self.table is None

    def num_vectors(self, k: int) -> int:
        """Codes of a row of k weights."""
        return -(-k // self.dim)

    @property
    def num_codes(self) -> int:
        """How many codes are valid: a code at or above this is damage."""
        return len(self.table) if self.table is not None else 2**self.bits

    @property
    def base(self) -> int:
        """The base of the digits that codes are packed as; 0 with the packing "bits"."""
        return DIGIT_BASES.get(self.packing, 0)

    @property
    def stored_bits(self) -> float:
        """Bits of the code of a weight as packed (1.6 for five trits per byte)."""
        return 8 / tables.digits_per_byte(self.base) if self.base else self.bits / self.dim

    def values(self) -> tuple[float, ...] | None:
        """The value of every code with scale 1 and zero 0; None if the table is fitted.

        Symmetric affine codes are centred: code - 2^(bits - 1).
        """
        if self.codec == "affine":
            offset = 2 ** (self.bits - 1) if self.zero is None else 0
            return tuple(float(c - offset) for c in range(2**self.bits))
        if self.codec in ("e4m3", "e5m2"):
            return tables.float8_values(self.codec)
        return self.table

    @property
    def int8_step(self) -> float | None:
        """The f with table = f * integers in -128 .. 127, or None: what makes int8 products exact."""
        return 1.0 if self.codec == "affine" else tables.int8_step(self.values())

    @property
    def exact_in_bf16(self) -> bool:
        """Whether every value of the table is a bf16 number; False if the table is fitted."""
        # A bf16 number is an fp32 whose low 16 bits are zero.
        values = self.values()
        return values is not None and all(struct.pack("<f", v)[:2] == b"\0\0" for v in values)

    def num_groups(self, k: int) -> int:
        """Groups in a row of k weights; the last may be short."""
        return 1 if self.group is None else -(-k // self.group)

    def num_supers(self, k: int) -> int:
        """Super-blocks of a row of k weights, which share a second level of scales; the last may be short."""
        return 1 if self.scale2_group is None else -(-k // self.scale2_group)

    def num_outliers(self, k: int) -> int:
        """Outliers in a row of k weights."""
        return min(self.outliers, k)

    @property
    def integer_scales(self) -> bool:
        """Whether scales, and zeros "min", are integers times a second level."""
        return self.scale in INTEGER_SCALES

    @property
    def more_terms(self) -> str:
        """What is added to the codes, scales, zeros and table: "outliers", "a low-rank term", or ""."""
        return "outliers" if self.outliers else "a low-rank term" if self.rank else ""

    @property
    def matrix(self) -> Format:
        """The format of the codes, scales, zeros and table alone; this one if nothing is added to them."""
        return _matrix_of(self) if self.more_terms else self

    @property
    def factor_format(self) -> Format | None:
        """The format of L and R; None if they are dense, or there are none."""
        return parse(self.factor) if self.rank and self.factor not in FACTOR_DTYPES else None

    def with_rank(self, rank: int, factor: str = "bf16") -> Format:
        """This format with a low-rank term."""
        name = format_names.with_rank(self.name, rank, factor)
        return dataclasses.replace(self, name=name, rank=rank, factor=factor)

    def with_activation(self, activation: str | None, group: int | None = None) -> Format:
        """This format with other activations, and the suffix of its name that says so."""
        return _with_activation(self, activation, group)

    def num_blocks(self, k: int) -> int:
        """Scales of a row of k int8 activations; the last may be of fewer."""
        return 1 if self.activation_group is None else -(-k // self.activation_group)

    def row_bytes(self, k: int) -> int:
        """Bytes of one canonical row of k codes (layout: `packing.py`)."""
        if self.base:
            return -(-k // tables.digits_per_byte(self.base))
        return -(-self.num_vectors(k) * self.bits // 8)

    @property
    def spec(self) -> str:
        """The string that `parse` turns back into an equal format: the name if built in, else JSON."""
        return _spec(self)


@functools.lru_cache(maxsize=4096)
def _matrix_of(f: Format) -> Format:
    none = {"outliers": 0, "outlier_dtype": "fp16", "rank": 0, "factor": "bf16"}
    return dataclasses.replace(f, name=format_names.without_terms(f.name), **none)  # type: ignore[arg-type]


@functools.lru_cache(maxsize=4096)
def _with_activation(f: Format, activation: str | None, group: int | None) -> Format:
    name = format_names.with_activation(f.name, activation, group)
    return dataclasses.replace(f, name=name, activation=activation, activation_group=group)


@functools.lru_cache(maxsize=4096)
def _spec(f: Format) -> str:
    try:
        if parse(f.name) == f:
            return f.name
    except ValueError:
        pass
    return json.dumps(dataclasses.asdict(f), separators=(",", ":"), sort_keys=True)


def _builtin() -> dict[str, Format]:
    affine = functools.partial(Format, codec="affine")
    formats = []
    for b in (2, 3, 4, 5, 6, 8):
        uint = functools.partial(affine, bits=b, scale_rule="minmax")
        formats += [
            affine(name=f"int{b}", bits=b, group=128),
            uint(name=f"uint{b}", group=128, zero="int"),
            uint(name=f"uint{b}_zfloat", group=64, zero="float"),
        ]
    lut = functools.partial(Format, codec="lut")
    formats += [
        lut(name="nf4", bits=4, group=64, table=tables.NF4_TABLE),
        lut(name="nf3", bits=3, group=64, table=tables.normal_float(3)),
        lut(name="fp4", bits=4, group=32, table=tables.E2M1_TABLE),
        lut(name="binary", bits=1, group=128, table=(-1.0, 1.0), scale_rule="mean"),
        lut(name="ternary", bits=2, group=128, table=(-1.0, 0.0, 1.0), scale_rule="mean"),
        lut(name="ternary_trits", bits=2, group=128, table=(-1.0, 0.0, 1.0), scale_rule="mean",
            packing="trits"),
        Format(name="e4m3", codec="e4m3", bits=8, group=None, scale="fp32"),
        Format(name="e5m2", codec="e5m2", bits=8, group=None, scale="fp32"),
        lut(name="mxfp4", bits=4, group=32, scale="e8m0", table=tables.E2M1_TABLE),
        lut(name="nvfp4", bits=4, group=16, scale="e4m3", table=tables.E2M1_TABLE),
    ]  # fmt: skip
    for b in (1, 2, 3, 4, 5, 6, 8):
        formats.append(lut(name=f"kmeans{b}", bits=b, group=64))
        # SqueezeLLM's form: the table of a row holds its scale.
        formats.append(lut(name=f"kmeans{b}_pr", bits=b, group=None, scale=None, table_scope="row"))
    # A table of the weight, a signed integer of a byte per group, found by search, and a factor per row.
    for b in (2, 3, 4):
        km = functools.partial(lut, bits=b, scale="int8", scale2="bf16")
        formats += [km(name=f"km{b}", group=32), km(name=f"km{b}_g16", group=16)]
        # And a bit of that byte chooses one of two tables.
        two = functools.partial(km, scale="int7", table_scope="pair")
        formats += [two(name=f"km{b}x2", group=32), two(name=f"km{b}x2_g16", group=16)]
    # GGUF block types (ggml-common.h), as stored.
    formats += [affine(name=f"q{b}_0", bits=b, group=32) for b in (4, 5, 8)]
    q_1 = functools.partial(affine, group=32, zero="min", scale_rule="minmax")
    formats += [q_1(name="q4_1", bits=4), q_1(name="q5_1", bits=5)]
    formats.append(lut(name="iq4_nl", bits=4, group=32, table=tables.IQ4_NL_TABLE))
    ternary = functools.partial(lut, bits=2, group=256, table=(-1.0, 0.0, 1.0))
    formats += [ternary(name="tq2_0"), ternary(name="tq1_0", packing="trits")]
    two_levels: dict[str, Any] = {"scale2": "fp16", "scale2_group": 256}
    minima: dict[str, Any] = {"zero": "min", "scale_rule": "minmax", **two_levels}
    formats += [
        affine(name="q2_k", bits=2, group=16, scale="uint4", **minima),
        affine(name="q3_k", bits=3, group=16, scale="int6", **two_levels),
        affine(name="q4_k", bits=4, group=32, scale="uint6", **minima),
        affine(name="q5_k", bits=5, group=32, scale="uint6", **minima),
        affine(name="q6_k", bits=6, group=16, scale="int8", **two_levels),
        lut(name="iq4_xs", bits=4, group=32, table=tables.IQ4_NL_TABLE, scale="int6", **two_levels),
    ]
    return {f.name: f for f in formats}


FORMATS: dict[str, Format] = _builtin()


@functools.lru_cache(maxsize=4096)
def parse(spec: str) -> Format:
    """Turns a name or a spec into a Format.

    A name is one of `FORMATS`, optionally followed by the suffixes of `format_names.py`: "nf4", "int3_g64",
    "uint4_g32_bf16", "nf4_g64_dq8", "int4_g32_a8b32", "int3_g64_o16", "int2_g64_r64int4",
    "int4_g16_int6s256".
    A spec that starts with "{" is the JSON of `Format.spec`.

    Raises:
        ValueError: the name is unknown or a part of it is out of range.
    """
    if not isinstance(spec, str):
        raise TypeError(f"format must be a Format or a string, got {type(spec).__name__}")
    if spec in FORMATS:
        return FORMATS[spec]
    if spec.startswith("{"):
        return Format(**format_names.fields_of(spec, [f.name for f in dataclasses.fields(Format)]))
    base, changes = format_names.split(spec, FORMATS, INTEGER_SCALES)
    fields = structured.fields_of(base)
    found = Format(name=base, **fields) if fields else FORMATS.get(base)
    if found is None:
        return parse(format_aliases.resolve(spec, base, all_formats()))
    return dataclasses.replace(found, name=spec, **changes)


def all_formats() -> dict[str, Format]:
    """`FORMATS` and the structured ones that have names of their own."""
    return FORMATS | {name: parse(name) for name in structured.NAMES}


def as_format(format: Format | str) -> Format:
    """Returns the Format that a name, a spec or a Format stands for."""
    return format if isinstance(format, Format) else parse(format)
