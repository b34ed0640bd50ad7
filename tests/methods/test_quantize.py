"""Quantizers: every code is the best one (brute force over all codes), scales follow their rules
(written out again, group by group), and k-means tables are optimal (brute force over partitions,
scikit-learn).
"""

from __future__ import annotations

import itertools
import math

import ml_dtypes
import numpy as np
import pytest
import torch
from oracle import assert_codes_are_best, normal

from lowbit import reference
from lowbit.formats import FORMATS, Format
from lowbit.methods import grid, nearest, quantize
from weights import ALL_FORMATS, random_weight

FIXED = [f for f in ALL_FORMATS if not f.fitted]
FITTED = [f for f in ALL_FORMATS if f.fitted]
SHAPES = ((1, 1), (3, 33), (2, 130), (5, 300))
ids = {"ids": lambda f: f.name}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("format", FIXED, **ids)
def test_codes_are_the_best_for_the_stored_scale(format: Format, dtype: torch.dtype):
    for n, k in SHAPES:
        weight = normal(n, k, seed=k).to(dtype)
        assert_codes_are_best(quantize(weight, format).validate(), weight)


@pytest.mark.parametrize("format", FITTED, **ids)
def test_fitted_codes_are_the_best_for_a_given_table(format: Format):
    """In any order and with equal entries, too."""
    for n, k in SHAPES:
        weight = normal(n, k, seed=k)
        table = random_weight(format, n, k).table
        table[..., -1] = table[..., 0]
        qt = quantize(weight, format, table=table, method="rtn").validate()
        assert torch.equal(qt.table, table)
        assert_codes_are_best(qt, weight)
        assert qt.unpack().max() < 2**format.bits - 1, "of equal entries the first is chosen"


def test_ties():
    """Halfway between two entries the lower value wins; between two integers the even one."""
    table = Format.lut(bits=2, table=[4.0, -1.0, 1.0, 0.0], scale=None, group=None)
    weight = torch.tensor([[2.5, 0.5, -0.5, 9.0, -9.0, 2.5000002, 0.49999997]])
    assert quantize(weight, table).dequantize().tolist() == [[1, 0, -1, 4, -1, 4, 0]]
    integers = Format(name="i", codec="affine", bits=3, scale="fp32")
    # absmax 3.5 makes the scale 1.
    weight = torch.tensor([[-3.5, -2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 3.5]])
    assert quantize(weight, integers).dequantize().tolist() == [[-4, -2, -2, 0, 0, 2, 2, 3]]
    # 1.4999999 + 128 would be 129.5 in fp32, and 130 after rounding.
    weight = torch.tensor([[127.5, 1.4999999, -1.4999999]])
    deq = quantize(weight, "int8_fp32").dequantize()
    assert deq.tolist() == [[127, 1, -1]]


def test_a_boundary_is_exact_when_it_is_no_fp32_number():
    """The middle of 1 and 1 + 2^-23 lies between two fp32 values: neither may change sides."""
    numbers = [1.0, 1 + 2**-23, 1 + 2**-22, 1 + 3 * 2**-23]
    for table in (torch.tensor(pair) for pair in itertools.pairwise(numbers)):
        assert nearest.nearest_codes(table.unsqueeze(0), table).tolist() == [[0, 1]]


def group_scale(w: np.ndarray, f: Format) -> float:
    """The scale of one group by its rule, before it is stored."""
    magnitude = np.abs(w.astype(np.float64))
    if f.scale_rule == "minmax":
        with_zero = w if f.zero == "min" else np.append(w, 0)
        return float(np.float64(with_zero.max()) - np.float64(with_zero.min())) / (2**f.bits - 1)
    if f.scale_rule != "absmax":
        return float(magnitude.mean() if f.scale_rule == "mean" else np.sqrt((magnitude**2).mean()))
    if f.codec == "affine":
        return magnitude.max() / (2 ** (f.bits - 1) - 0.5)
    return magnitude.max() / (
        1 if f.fitted else np.nanmax(np.abs(np.array(f.values())[np.isfinite(f.values())]))
    )


STORED = {"fp32": np.float32, "fp16": np.float16, "bf16": ml_dtypes.bfloat16}
RULES = [
    *(f for f in ALL_FORMATS if f.scale in STORED),
    Format.lut(bits=2, table=(-1.5, -0.5, 0.5, 1.5), scale_rule="rms", group=20),
    Format.lut(bits=2, table=(-1.5, -0.5, 0.5, 1.5), scale_rule="mean", group=None, scale="fp32"),
    Format.lut(bits=3, scale_rule="rms", group=20, scale="bf16"),
]


@pytest.mark.parametrize("format", RULES, **ids)
def test_scales_follow_their_rule(format: Format):
    """The last group is short: its padding, if there were any, must not count."""
    weight = normal(3, 150)
    got = quantize(weight, format).scales
    group = format.group or 150
    expected = [
        [group_scale(row[i : i + group], format) for i in range(0, 150, group)]
        for row in weight.numpy()
    ]
    stored = np.array(expected, np.float32).astype(STORED[format.scale])
    if format.scale_rule in ("absmax", "minmax"):
        np.testing.assert_array_equal(got.float().numpy(), stored.astype(np.float32))
    else:
        # A sum in another order: float64 errors can only show through a rounding boundary, one ulp.
        ulp = torch.finfo(got.dtype).eps
        np.testing.assert_allclose(got.float().numpy(), stored.astype(np.float32), rtol=ulp)


def test_integer_zeros():
    """The range includes 0, which is then a code and stays exact."""
    for name in ("uint2", "uint3", "uint4", "uint8"):
        top = 2 ** FORMATS[name].bits - 1
        for weight, zero in (
            (normal(1, 128).abs() + 1, 0),
            (-normal(1, 128).abs() - 1, top),
        ):
            qt = quantize(weight, name).validate()
            assert qt.zeros.tolist() == [[zero]]
        weight = normal(4, 300)
        weight[:, ::3] = 0
        deq = quantize(weight, name).dequantize()
        assert (deq[:, ::3] == 0).all()


def test_min_zeros_are_the_minimum():
    weight = normal(4, 70) + 5
    qt = quantize(weight, "q4_1")
    parts = [weight[:, :32], weight[:, 32:64], weight[:, 64:]]
    assert torch.equal(qt.zeros, torch.stack([p.amin(1) for p in parts], 1).half())


def test_a_zero_without_minmax_centres_the_grid():
    symmetric = quantize(normal(3, 70), Format(name="s", codec="affine", bits=4, group=32))
    for zero in ("int", "float", "min"):
        f = Format(name="a", codec="affine", bits=4, group=32, zero=zero)
        qt = quantize(normal(3, 70), f)
        assert torch.equal(qt.unpack(), symmetric.unpack())
        # "min": scale * code + zero is exact in fp32 for a 4-bit code, an fp16 scale and zero = -8
        # * scale.
        assert torch.equal(qt.dequantize(), symmetric.dequantize())


@pytest.mark.parametrize(
    ("name", "dtype"), [("e4m3", ml_dtypes.float8_e4m3fn), ("e5m2", ml_dtypes.float8_e5m2)]
)
def test_fp8_codes_are_those_of_ml_dtypes(name: str, dtype: type):
    weight = normal(4, 300) * torch.logspace(-6, 3, 300)
    qt = quantize(weight, name)
    ratio = weight.numpy() / qt.scales.numpy()
    np.testing.assert_array_equal(qt.codes.numpy(), ratio.astype(dtype).view(np.uint8))


@pytest.mark.parametrize("spread", [1e-3, 1.0, 1e3])
def test_mxfp4_is_that_of_gguf(spread: float):
    gguf = pytest.importorskip("gguf")
    weight = normal(8, 256) * spread
    weight[0, :32] = 0
    blocks = gguf.quants.quantize(weight.numpy(), gguf.GGMLQuantizationType.MXFP4)
    theirs = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType.MXFP4)
    np.testing.assert_array_equal(quantize(weight, "mxfp4").dequantize().numpy(), theirs)


@pytest.mark.parametrize("name", ["q4_1", "q5_1", "tq2_0"])
def test_no_worse_than_gguf_with_the_same_scales(name: str):
    """gguf stores the same scale and minimum, but chooses codes for the scale before it was
    rounded.
    """
    gguf = pytest.importorskip("gguf")
    kind = gguf.GGMLQuantizationType[name.upper()]
    weight = normal(8, 512)
    theirs = gguf.quants.dequantize(gguf.quants.quantize(weight.numpy(), kind), kind)
    qt = quantize(weight, name)
    ours = qt.dequantize()
    group = qt.format.group
    error = (ours - weight).unflatten(1, (-1, group)).square().sum(-1)
    their_error = (torch.from_numpy(theirs) - weight).unflatten(1, (-1, group)).square().sum(-1)
    assert (error <= their_error * (1 + 1e-6)).all()


def test_integers_are_those_of_torch():
    """torch's own fake quantization, on a range whose scale is a power of two: no rounding
    differs.
    """
    weight = normal(6, 100).clamp(-1.9, 1.9)
    weight[:, 0], weight[:, 1] = -2.0, 255 / 64 - 2.0
    qt = quantize(weight, "uint8_row_fp32")
    assert (qt.scales == 2**-6).all()
    theirs = torch.fake_quantize_per_channel_affine(
        weight, qt.scales[:, 0], qt.zeros[:, 0].to(torch.int32), 0, 0, 255
    )
    assert torch.equal(qt.dequantize(), theirs)


def test_ternary_is_that_of_bitnet():
    """b1.58: RoundClip(W / mean|W|, -1, 1) * mean|W|."""
    weight = normal(5, 256)
    scale = weight.abs().double().mean(1, keepdim=True).float()
    expected = scale * (weight / scale).round().clamp(-1, 1)
    assert torch.equal(quantize(weight, "ternary_row_fp32").dequantize(), expected)


def test_binary_is_that_of_bwn():
    """sign(W) * mean|W|, which leaves 1 - 2/pi of the variance of a normal weight."""
    weight = normal(64, 1024)
    scale = weight.abs().double().mean(1, keepdim=True).float()
    qt = quantize(weight, "binary_row_fp32")
    assert torch.equal(qt.dequantize(), scale * weight.sign())


SAME_AGAIN = ["nf4", "nf3", "fp4", "mxfp4", "binary", "e4m3_bf16", "e5m2_bf16", "nf4_g7_bf16"]


@pytest.mark.parametrize("name", SAME_AGAIN)
def test_quantizing_again_changes_nothing(name: str):
    """Where the products with the scale are exact in fp32 and the largest weight gets the largest
    code.
    """
    first = quantize(normal(5, 200), name)
    again = quantize(first.dequantize(), name)
    for key, t in first.tensors.items():
        assert torch.equal(again.tensors[key].view(torch.uint8), t.view(torch.uint8)), key


@pytest.mark.parametrize("name", ["nf4_dq8", "kmeans4_dq8", "uint4_dq8"])
def test_double_quantized_scales(name: str):
    weight = normal(40, 700) * torch.linspace(0.1, 3, 40).unsqueeze(1)
    qt = quantize(weight, name)
    single = quantize(weight, name.replace("dq8", "fp32")).scales.flatten()
    assert math.isclose(qt.scales2_offset, single.mean(), rel_tol=1e-6)
    error = (reference.effective_scales(qt).flatten() - single).abs()
    # The largest gap of the dynamic map, near 1, is 0.9 / 64; half of it, times the absmax of the
    # block.
    bound = qt.scales2.repeat_interleave(256)[: error.numel()] * (0.9 / 64 / 2 + 1e-6)
    assert (error <= bound).all()
    blocks = (single - qt.scales2_offset).abs().split(256)
    assert torch.equal(qt.scales2, torch.stack([b.max() for b in blocks]))


def test_double_quantized_equal_scales():
    weight = torch.ones(30, 640)
    qt = quantize(weight, "nf4_dq8")
    assert (reference.dynamic_map()[qt.scales.long()] == 0).all()
    assert torch.equal(qt.dequantize(), weight)


def test_double_quantization_may_turn_a_small_scale_negative():
    """The zero is then at the other end, and the codes still cover the range."""
    weight = torch.rand(2, 640, generator=torch.Generator().manual_seed(0)) + 0.5
    weight[0, :128] *= 10
    weight[1, 512:] *= 1e-3
    qt = quantize(weight, "uint4_dq8")
    assert reference.effective_scales(qt)[1, 4] < 0
    assert_codes_are_best(qt, weight)
    small = qt.dequantize()[1, 512:]
    assert (small >= 0).all()
    assert (small > 0).any()


def test_nvfp4_scales():
    weight = normal(4, 100)
    qt = quantize(weight, "nvfp4")
    wanted = torch.stack([g.abs().amax(1) / 6 for g in weight.split(16, 1)], 1)
    assert qt.scales2.item() == (wanted.max() / 448).item()
    assert qt.scales.float().max() == 448
    # e4m3 has 3 bits after the leading one.
    effective = reference.effective_scales(qt)
    assert ((effective - wanted).abs() <= wanted * 2**-4 + 2**-10 * qt.scales2).all()


def test_e8m0_scales():
    weight = torch.tensor([[6.0], [7.99], [8.0], [3.0], [2.0**-149], [8e37], [0.0]])
    exponents = quantize(weight, "mxfp4").scales.flatten().int() - 127
    assert exponents.tolist() == [0, 0, 1, -1, -127, 123, -127]
    nearest = Format.lut(bits=1, table=[-1, 1], scale="e8m0", scale_rule="mean", group=None)
    weight = torch.tensor([[1.0, -1.0], [1.4, 1.4], [1.42, -1.42], [2.8, 2.8], [0.0, 0.0]])
    assert (quantize(weight, nearest).scales.flatten().int() - 127).tolist() == [0, 0, 1, 1, -127]
    rounded_up = Format(
        name="u", codec="affine", bits=2, scale="e8m0", zero="int", scale_rule="minmax"
    )
    weight = torch.tensor([[3.0, 0.0], [3.01, 0.0], [-6.0, 0.0]])
    assert (quantize(weight, rounded_up).scales.flatten().int() - 127).tolist() == [0, 1, 1]


@pytest.mark.parametrize("format", ALL_FORMATS, **ids)
def test_zeros_stay_zero(format: Format):
    weight = normal(4, 260)
    weight[1] = 0
    # Fitted tables have no entry at 0 unless there is a point for it, and a scale of 0 needs a
    # dtype with 0.
    entries = format.values() or (1.0,)
    single = format.integer_scales or format.scale in ("fp32", "fp16", "bf16")
    if not (single or 0.0 in entries or format.codec == "affine"):
        assert format.fitted
        return
    deq = quantize(weight, format).validate().dequantize()
    assert (deq[1] == 0).all()
    assert (quantize(torch.zeros(2, 70), format).dequantize() == 0).all()


@pytest.mark.parametrize("value", [1.0, -1.0, 3.7, -0.01])
@pytest.mark.parametrize(
    "name",
    ["uint2", "uint4", "uint4_zfloat", "q4_1", "nf4", "fp4", "binary", "kmeans4", "kmeans2_pr"],
)
def test_constant_weights(name: str, value: float):
    """Every one of these formats can hold a constant, up to the roundings of scale and zero to
    fp16.
    """
    deq = quantize(torch.full((3, 150), value), name).dequantize()
    # One rounding of 2^-11 in the scale or the minimum, a second one in a float zero.
    assert (deq - value).abs().max() <= 2 * 2**-11 * abs(value)


@pytest.mark.filterwarnings("ignore:weight. .* (groups|super-blocks) .* so small:UserWarning")
@pytest.mark.parametrize("tiny", [1e-45, 1e-40, 1e-8, 6e-8])
@pytest.mark.parametrize("format", ALL_FORMATS, **ids)
def test_tiny_weights(format: Format, tiny: float):
    """A scale that would vanish is the smallest one instead; never NaN, and with a 0 never worse
    than 0.
    """
    weight = normal(3, 100) * tiny
    qt = quantize(weight, format).validate()
    error = (qt.dequantize().double() - weight.double()).abs()
    assert error.isfinite().all()
    # A float zero or a minimum keeps 0 in the range, but need not give it a code.
    if not format.fitted and 0.0 in format.values() and format.zero not in ("float", "min"):
        assert (error <= weight.abs() * (1 + 2**-20)).all()
    if "fp16" in (format.scale, format.scale2):
        assert error.max() <= 2**-24 * 64


@pytest.mark.filterwarnings("ignore:weight. .* groups .* so small:UserWarning")
@pytest.mark.parametrize("name", ["int4", "uint4", "q4_1", "nf4", "binary", "nvfp4", "kmeans4"])
def test_no_scale_vanishes(name: str):
    """Next to a large group, too, where a scale in e4m3 is relative to the largest."""
    weight = normal(2, 256) * 1e-8
    weight[0, :128] *= 1e7
    scales = quantize(weight, name).scales
    smallest = torch.finfo(scales.dtype).smallest_normal * torch.finfo(scales.dtype).eps
    assert scales.float().min() == smallest


@pytest.mark.filterwarnings("ignore:weight. .* groups .* so small:UserWarning")
def test_scales_that_overflow():
    weight = torch.ones(4, 300)
    weight[2, 140] = 1e6
    message = (
        r"row 2, group 1 needs the scale 666667, which does not fit fp16: use a format with "
        r"fp32 or bf16 scales"
    )
    with pytest.raises(ValueError, match=message):
        quantize(weight, "int2")
    for name in ("int2_fp32", "int2_bf16", "int2_e8m0", "int2_e4m3", "int2_dq8"):
        assert quantize(weight, name).validate().dequantize()[2, 140] > 3e5
    weight = torch.full((1, 160), 60000.0)
    weight[0, 128:] = -70000
    with pytest.raises(ValueError, match="group 4 needs the zero -70000, which does not fit fp16"):
        quantize(weight, "q4_1")


@pytest.mark.parametrize("format", ALL_FORMATS, **ids)
def test_the_largest_weights(format: Format):
    """2^126 is quantized to something finite or does not fit fp16."""
    weight = normal(2, 128).clamp(-1, 1) * 2.0**126
    weight[:, 0], weight[:, 1] = 2.0**126, -(2.0**126)
    if "fp16" in (format.scale, format.scale2):
        with pytest.raises(ValueError, match="does not fit fp16"):
            quantize(weight, format)
    else:
        assert quantize(weight, format).validate().dequantize().isfinite().all()


@pytest.mark.parametrize("format", ALL_FORMATS, **ids)
def test_slices_do_not_show(format: Format, monkeypatch: pytest.MonkeyPatch):
    weight = normal(7, 150)
    whole = quantize(weight, format)
    for size in (1, 320):
        monkeypatch.setattr(grid, "_SLICE_WEIGHTS", size)
        for key, t in quantize(weight, format).tensors.items():
            assert torch.equal(
                t.view(-1).view(torch.uint8), whole.tensors[key].view(-1).view(torch.uint8)
            )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["int4", "uint3", "nf4", "kmeans3", "e4m3"])
def test_dtypes_and_strides(name: str, dtype: torch.dtype):
    weight = torch.nn.Parameter(normal(60, 40).to(dtype).t()[:, ::2])
    expected = quantize(weight.detach().float().contiguous(), name)
    got = quantize(weight, name)
    assert all(torch.equal(t, expected.tensors[key]) for key, t in got.tensors.items())
    assert not any(t.requires_grad for t in got.tensors.values())
