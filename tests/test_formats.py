"""Formats are data: their values equal those of other libraries bit for bit, their specs are read
back as they were, and nothing else is accepted.
"""

from __future__ import annotations

import dataclasses
import json

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit.codebooks.tables import E2M1_TABLE, IQ4_NL_TABLE, NF4_TABLE, float8_values, normal_float
from lowbit.float8 import e8m0_values
from lowbit.formats import (
    FORMATS,
    INTEGER_SCALES,
    Format,
    as_format,
    parse,
)
from lowbit.reference import dynamic_map, effective_scales, effective_zeros
from lowbit.weights.quantized import QuantTensor, tensor_specs
from weights import ALL_FORMATS

BYTES = np.arange(256, dtype=np.uint8)
AFFINE = {"name": "x", "codec": "affine", "bits": 4}
LUT = {"name": "x", "codec": "lut", "bits": 2}
CODES = {**AFFINE, "group": 32, "scale": "int8", "scale2": "fp16"}


@pytest.mark.parametrize("format", ALL_FORMATS, ids=lambda f: f.name)
def test_spec_round_trip(format: Format):
    assert parse(format.spec) == format
    assert as_format(format) is format
    assert parse(json.dumps(dataclasses.asdict(format))) == format


@pytest.mark.parametrize("name", FORMATS)
def test_builtin_spec_is_its_name(name: str):
    assert FORMATS[name].spec == name
    assert parse(name) is FORMATS[name]


@pytest.mark.parametrize("group", ["_g7", "_g64", "_row", ""])
@pytest.mark.parametrize("scale", ["_fp32", "_bf16", "_dq8", ""])
@pytest.mark.parametrize("base", ["nf4", "int3", "kmeans4", "binary"])
def test_suffixes(base: str, group: str, scale: str):
    for name in {base + group + scale, base + scale + group}:
        format = parse(name)
        assert (format.name, format.spec) == (name, name)
        wanted_group = {"_row": None, "": FORMATS[base].group}.get(group, group[2:])
        assert format.group == (wanted_group and int(wanted_group))
        assert format.scale == (scale[1:] or FORMATS[base].scale)


@pytest.mark.parametrize(
    ("name", "scale", "scale2", "size"),
    [
        ("nf4_g32_int8", "int8", "fp32", None),
        ("nf4_int8bf16_g32", "int8", "bf16", None),
        ("int3_g16_int8s256", "int8", "fp16", 256),
        ("int8_int8s256fp32", "int8", "fp32", 256),
        ("int6_g16_int6s256", "int6", "fp16", 256),
        ("uint4_g32_uint6", "uint6", "fp32", None),
        ("uint2_g16_uint4s64bf16", "uint4", "bf16", 64),
    ],
)
def test_suffixes_of_two_levels(name: str, scale: str, scale2: str, size: int | None):
    format = parse(name)
    assert format.spec == name
    assert format.scale == scale
    assert (format.scale2, format.scale2_group) == (scale2, size)
    assert parse("q4_k_bf16").scale2 is None


def test_a_name_that_is_taken_by_another_format_gives_json():
    mine = dataclasses.replace(FORMATS["nf4"], group=17)
    assert mine.spec.startswith("{")
    assert parse(mine.spec) == mine


@pytest.mark.parametrize(
    ("codec", "torch_dtype", "other"),
    [
        ("e4m3", torch.float8_e4m3fn, ml_dtypes.float8_e4m3fn),
        ("e5m2", torch.float8_e5m2, ml_dtypes.float8_e5m2),
    ],
)
def test_float8_values(codec, torch_dtype, other):
    """Bit patterns, so that -0.0, NaN and inf count."""
    ours = np.array(float8_values(codec), dtype=np.float32)
    finite_or_inf = ~np.isnan(ours)
    from_torch = torch.from_numpy(BYTES).view(torch_dtype).float().numpy()
    from_ml_dtypes = BYTES.view(other).astype(np.float32)
    for theirs in (from_torch, from_ml_dtypes):
        assert (np.isnan(theirs) == ~finite_or_inf).all()
        bits = ours.view(np.uint32) == theirs.view(np.uint32)
        assert bits[finite_or_inf].all()


def test_e2m1_and_e8m0_values():
    codes = BYTES[:16].view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    assert (np.array(E2M1_TABLE, np.float32).view(np.uint32) == codes.view(np.uint32)).all()
    ours = e8m0_values(torch.from_numpy(BYTES)).numpy()
    theirs = BYTES.view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    np.testing.assert_array_equal(ours, theirs)


def test_normal_float():
    """Against torch's normal quantiles: QLoRA's levels, 0 among them, scaled to [-1, 1]."""
    for bits in (2, 3, 4, 8):
        levels = 2**bits
        offset = 1 - 0.5 * (1 / (2 * (levels - 1)) + 1 / (2 * levels))
        normal = torch.distributions.Normal(torch.tensor(0.0).double(), torch.tensor(1.0).double())
        high = normal.icdf(torch.linspace(offset, 0.5, levels // 2 + 1, dtype=torch.double)[:-1])
        low = -normal.icdf(torch.linspace(offset, 0.5, levels // 2, dtype=torch.double)[:-1])
        values = torch.cat([high, low, torch.zeros(1, dtype=torch.double)]).sort().values
        values /= values.abs().max()
        ours = torch.tensor(normal_float(bits), dtype=torch.double)
        # Two implementations of the normal quantile in float64, then one rounding to fp32.
        assert (ours - values).abs().max() < 2**-24
    # The published constants were computed in fp32 steps.
    assert np.abs(np.array(NF4_TABLE) - np.array(normal_float(4))).max() < 1e-6


def test_gguf_tables():
    quants = pytest.importorskip("gguf").quants
    assert tuple(quants.IQ4_NL.kvalues) == IQ4_NL_TABLE
    assert tuple(v / 2 for v in quants.MXFP4.kvalues) == E2M1_TABLE


@pytest.mark.parametrize("format", ALL_FORMATS, ids=lambda f: f.name)
def test_derived_numbers(format: Format):
    values = format.values()
    if format.fitted:
        assert values is None
        assert format.num_codes == 2**format.bits
    else:
        assert len(values) == format.num_codes <= 2**format.bits
        # Tables are stored as fp32 wherever they are stored.
        np.testing.assert_array_equal(np.array(values), np.array(values, dtype=np.float32))
    for k in (1, 5, 8, 63, 64, 65, 1000):
        group = format.group or k
        assert format.num_groups(k) == len(range(0, k, group))
        digits = {"trits": 5, "base5": 3, "base6": 3}.get(format.packing)
        whole_bits = -(-k // digits) * 8 if digits else k * format.bits
        assert format.row_bytes(k) == len(range(0, whole_bits, 8))


@pytest.mark.parametrize(
    "table",
    [
        [-1, 0.25, 1],
        (-1.0, 0.25, 1.0),
        np.array([-1, 0.25, 1]),
        torch.tensor([-1, 0.25, 1], dtype=torch.bfloat16),
    ],
    ids=["list", "tuple", "numpy", "bf16 tensor"],
)
def test_lut_takes_any_sequence(table):
    format = Format.lut(bits=2, table=table, group=32)
    assert format.table == (-1.0, 0.25, 1.0)
    assert format.name == "lut2_g32"
    assert not format.fitted
    assert Format.lut(bits=2, group=None).fitted


def test_lut_rounds_its_table_to_fp32():
    assert Format.lut(bits=1, table=[0.1, 0.2]).table == tuple(np.float32([0.1, 0.2]).tolist())


BAD_FIELDS = [
    ({**AFFINE, "name": ""}, "name must be a non-empty string"),
    ({**AFFINE, "codec": "vq"}, "codec must be one of .* got 'vq'"),
    ({**AFFINE, "bits": 7}, "bits must be one of .* got 7"),
    ({**AFFINE, "bits": 0}, "bits must be"),
    ({**AFFINE, "bits": True}, "bits must be"),
    ({**AFFINE, "bits": 4.0}, "bits must be"),
    ({**AFFINE, "bits": 1}, "bits must be 2 or more"),
    ({**AFFINE, "group": 0}, "group must be a positive integer .* got 0"),
    ({**AFFINE, "group": -32}, "group must be"),
    ({**AFFINE, "group": 2**31}, "group must be"),
    ({**AFFINE, "group": "64"}, "group must be"),
    ({**AFFINE, "scale": "fp64"}, "scale must be one of .* got 'fp64'"),
    ({**AFFINE, "scale": None}, "scale must be a scale dtype"),
    ({**AFFINE, "scale_rule": "max"}, "scale_rule must be"),
    ({**AFFINE, "zero": "uint"}, "zero must be"),
    ({**AFFINE, "zero": "min", "scale": "e8m0"}, "scale must be a float dtype"),
    ({**AFFINE, "table": (1.0, 2.0)}, "table must be None"),
    ({**LUT, "zero": "int"}, "zero must be None"),
    ({**LUT, "table": ()}, "table must be a tuple of 2 to 4 values"),
    ({**LUT, "table": (1.0,)}, "table must be a tuple of 2 to 4"),
    ({**LUT, "table": (1.0, 2.0, 3.0, 4.0, 5.0)}, "table must be a tuple of 2 to 4"),
    ({**LUT, "table": (1.0, float("nan"))}, "table must be finite"),
    ({**LUT, "table": (1.0, float("inf"))}, "table must be finite"),
    ({**LUT, "table": (0.0, -0.0)}, "table must be not all zero"),
    ({**LUT, "table": (0.0, 1.0), "table_scope": "row"}, "table_scope must be 'tensor'"),
    ({**LUT, "table_scope": "column"}, "table_scope must be"),
    ({**LUT, "packing": "trits"}, "packing must be 'bits'"),
    (
        {**LUT, "packing": "base5", "table": (1.0, 2.0)},
        "packing must be 'bits' unless the format is 3-bit",
    ),
    (
        {**LUT, "bits": 3, "packing": "base5", "table": (0.0, 1, 2, 3, 4, 5)},
        "a table of at most 5 values",
    ),
    ({"name": "x", "codec": "e4m3", "bits": 4}, "bits must be 8"),
    ({**AFFINE, "scale2": "fp16"}, "scale2 must be None with scale 'fp16', got 'fp16'"),
    ({**AFFINE, "scale2_group": 64}, "scale2_group must be None with scale 'fp16'"),
    ({**CODES, "scale2": None}, "scale2 must be one of .* with scale 'int8', got None"),
    ({**CODES, "scale2": "e8m0"}, "scale2 must be one of"),
    ({**CODES, "group": None}, "group must be a number of weights with scale 'int8', got None"),
    (
        {**CODES, "scale2_group": 80},
        r"scale2_group must be a multiple of the group \(32\).* got 80",
    ),
    ({**CODES, "scale2_group": 0}, "scale2_group must be"),
    ({**CODES, "zero": "float"}, "scale must be a float dtype with a float zero"),
]


@pytest.mark.parametrize(("fields", "message"), BAD_FIELDS, ids=lambda v: str(v)[:60])
def test_bad_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        Format(**fields)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("int7", "unknown format 'int7'; expected a name of"),
        ("", "unknown format"),
        ("nf4_g0", "group must be a positive integer"),
        ("nf4_g64_g32", "gives its group twice"),
        ("nf4_g64_row", "gives its group twice"),
        ("nf4_fp16_fp16", "gives its scale twice"),
        ("nf4_int8_fp16", "gives its scale twice"),
        ("nf4_int8s100", "scale2_group must be a multiple of the group"),
        ("nf4_row_int8", "group must be a number of weights"),
        ("kmeans4_pr_g99999999999", "group must be"),
        ("q4_1_e8m0", "scale must be a float dtype"),
        ("{", "not JSON"),
        ("{}", r"lacks \['bits', 'codec', 'name'\]"),
        ('{"name": "x", "codec": "lut", "bits": 2, "colour": 1}', r"unknown fields \['colour'\]"),
        ('{"name": "x", "codec": "lut", "bits": 2, "table": "0, 1"}', "table must be a list"),
        ('{"name": "x", "codec": "lut", "bits": 2, "table": [0, "1"]}', "table must be a list"),
        ('{"name": "x", "codec": "lut", "bits": 2, "table": [0, 1e39]}', "does not fit fp32"),
        ('{"name": "x", "codec": "lut", "bits": 2, "table": [0, 1%s]}' % ("0" * 400), "fit fp32"),
        ('{"name": 3, "codec": "lut", "bits": 2}', "name must be"),
        ('{"name": "x", "codec": ["lut"], "bits": 2}', "codec must be"),
    ],
)
def test_bad_specs(spec, message):
    with pytest.raises(ValueError, match=message):
        parse(spec)


@pytest.mark.parametrize("spec", [None, 4, b"nf4", ["nf4"]])
def test_specs_of_another_type(spec):
    with pytest.raises(TypeError):
        as_format(spec)


@pytest.mark.parametrize("table", [3, "abc", [[0, 1]], [0, "1"], np.zeros((2, 2))])
def test_lut_refuses_other_tables(table):
    with pytest.raises(TypeError, match="table must be a flat sequence of numbers"):
        Format.lut(bits=2, table=table)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(
    fields=st.fixed_dictionaries(
        {
            "name": json_values | st.just("x"),
            "codec": st.sampled_from(["lut", "affine"]) | json_values,
        },
        optional={f.name: json_values for f in dataclasses.fields(Format)[2:]},
    ),
    text=st.text(max_size=30),
)
def test_any_spec_is_a_format_or_a_value_error(fields, text):
    for spec in (json.dumps(fields), text, "{" + text, "nf4_" + text):
        try:
            format = parse(spec)
        except ValueError:
            continue
        assert parse(format.spec) == format


# Bits, group, scale and zero as papers, OCP MX, NVIDIA and ggml-common.h have them.
STATED = {
    "nf4": (4, 64, "fp16", None),
    "mxfp4": (4, 32, "e8m0", None),
    "nvfp4": (4, 16, "e4m3", None),
    "q4_0": (4, 32, "fp16", None),
    "q5_0": (5, 32, "fp16", None),
    "q8_0": (8, 32, "fp16", None),
    "q4_1": (4, 32, "fp16", "min"),
    "q5_1": (5, 32, "fp16", "min"),
    "iq4_nl": (4, 32, "fp16", None),
    "tq2_0": (2, 256, "fp16", None),
    "q2_k": (2, 16, "uint4", "min"),
    "q3_k": (3, 16, "int6", None),
    "q4_k": (4, 32, "uint6", "min"),
    "q5_k": (5, 32, "uint6", "min"),
    "q6_k": (6, 16, "int8", None),
    "iq4_xs": (4, 32, "int6", None),
}


@pytest.mark.parametrize("name", STATED)
def test_formats_of_others_are_as_they_state_them(name: str):
    format = FORMATS[name]
    assert (format.bits, format.group, format.scale, format.zero) == STATED[name]
    two_levels = ("fp16", 256) if format.integer_scales else (None, None)
    assert (format.scale2, format.scale2_group) == two_levels


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_symmetric_integers_are_those_of_twos_complement(bits: int):
    values = FORMATS[f"int{bits}"].values()
    assert values == tuple(map(float, range(-(2 ** (bits - 1)), 2 ** (bits - 1))))
    assert FORMATS[f"uint{bits}"].values() == tuple(map(float, range(2**bits)))


def test_int8_activations_need_a_table_in_the_range_of_int8():
    assert Format.lut(bits=1, table=(-128.0, 127.0), activation="int8").int8_step == 1
    for table in ((1.0, 128.0), (-129.0, 2.0)):
        assert Format.lut(bits=1, table=table).int8_step is None
        with pytest.raises(ValueError, match="its table is not exact in int8"):
            Format.lut(bits=1, table=table, activation="int8")


def test_double_quantized_scales():
    """QLoRA: the 8-bit code times the factor of 256 scales, plus the mean."""
    n, groups = 5, 130
    g = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (n, groups), generator=g, dtype=torch.uint8)
    factors, offset = torch.rand(-(-n * groups // 256), generator=g), torch.tensor(0.75)
    format = parse("nf4_g8_dq8")
    tensors = {
        name: torch.zeros(shape, dtype=dtype)
        for name, (shape, dtype) in tensor_specs(format, n, 8 * groups).items()
    }
    tensors |= {"scales": codes, "scales2": factors, "scales2_offset": offset}
    found = effective_scales(QuantTensor(format, (n, 8 * groups), tensors))
    table = dynamic_map().numpy()
    block = np.arange(n * groups) // 256
    wanted = table[codes.numpy().ravel()] * factors.numpy()[block] + np.float32(0.75)
    assert np.array_equal(found.numpy().ravel(), wanted)


@pytest.mark.parametrize("name", ["q4_k", "q4_k_int8fp32", "q4_k_int6", "q4_k_uint4s64"])
def test_scales_and_minima_of_two_levels(name: str):
    """A code times the number of its super-block, rounded once; the last super-block is short."""
    n, k = 3, 512 + 96
    format = parse(name)
    low, high = INTEGER_SCALES[format.scale]
    g = torch.Generator().manual_seed(0)
    tensors = {}
    for key, (shape, dtype) in tensor_specs(format, n, k).items():
        codes = torch.randint(low, high + 1, shape, generator=g).to(dtype)
        tensors[key] = torch.randn(shape, generator=g).to(dtype) if key[-1] == "2" else codes
    qt = QuantTensor(format, (n, k), tensors).validate()
    super_of = np.arange(k // 32) * 32 // (format.scale2_group or k)
    for key, found in (("scales", effective_scales(qt)), ("zeros", effective_zeros(qt))):
        second = tensors[key + "2"].float().numpy()[:, super_of]
        assert np.array_equal(found.numpy(), tensors[key].numpy().astype(np.float32) * second)
    w = qt.dequantize().numpy()
    group = np.arange(k) // 32
    codes, scale = qt.unpack().numpy().astype(np.float32), effective_scales(qt).numpy()[:, group]
    assert np.array_equal(w, scale * codes + effective_zeros(qt).numpy()[:, group])
    for key, bad in (("scales", high + 1), ("zeros", low - 1)):
        if -128 <= bad < 128:
            damaged = tensors[key].clone()
            damaged[1, 2] = bad
            with pytest.raises(
                ValueError, match=rf"{key} must be in \[{low}, {high}\] .* got {bad}"
            ):
                QuantTensor(format, (n, k), {**tensors, key: damaged}).validate()
