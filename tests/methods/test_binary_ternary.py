"""TWN, BitNet and multi-bit binary weights: their formulas, published distortions, and least squares by brute force."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from oracle import assert_codes_are_best, normal

import lowbit
from lowbit.explanation import REFERENCE
from lowbit.formats import Format
from lowbit.methods import quantize
from lowbit.ptq.report import measure

TERNARY = ("ternary_fp32", "ternary_trits_g64_bf16", "tq2_0", "ternary_row_dq8", "ternary_g32_e8m0")


def quantiles(count: int = 1 << 14) -> torch.Tensor:
    """N(0, 1) without the noise of a sample: its quantiles in random order."""
    points = (torch.arange(count).double() + 0.5) / count
    values = torch.distributions.Normal(0, 1).icdf(points).float()
    return values[torch.randperm(count)].view(64, -1)


def distortion(format: str | Format, method: str, **options) -> float:
    weight = quantiles()
    return measure("", weight, quantize(weight, format, method, **options)).relative_error ** 2


@pytest.mark.parametrize(
    ("format", "method", "options", "published"),
    [
        ("ternary_fp32", "twn", {"granularity": "tensor"}, 0.1919),
        ("ternary_fp32", "twn", {"granularity": "tensor", "threshold": None}, 0.1902),
        ("ternary_fp32", "bitnet", {}, 0.2641),
        ("ternary_fp32", "rtn", {"granularity": "tensor"}, 0.2641),
        ("binary_fp32", "bitnet", {}, 1 - 2 / math.pi),
        ("binary_fp32", "rtn", {"granularity": "tensor"}, 1 - 2 / math.pi),
        (Format.lut(bits=1, scale=None, group=None), "multibit", {}, 1 - 2 / math.pi),
        (Format.lut(bits=2, scale=None, group=None), "multibit", {}, 0.1175),
    ],
    ids=str,
)
def test_published_distortions(format, method, options, published):
    """Of 2^14 quantiles; what they stand for differs from the density by less than 0.5 %."""
    assert math.isclose(distortion(format, method, **options), published, rel_tol=0.01)


def test_zeros_of_absmean():
    qt = quantize(quantiles(), "ternary_fp32", "bitnet")
    assert math.isclose((qt.unpack() == 1).double().mean(), 0.31, abs_tol=0.005)


@pytest.mark.parametrize("name", TERNARY)
@pytest.mark.parametrize("granularity", ["group", "tensor"])
def test_twn_is_its_formula(name: str, granularity: str):
    weight = normal(3, 300)
    qt = quantize(weight, name, "twn", granularity=granularity).validate()
    group = qt.format.group or 300
    w = weight.double().numpy()
    groups = [w[:, i : i + group] for i in range(0, 300, group)]
    if granularity == "tensor":
        delta = np.broadcast_to(0.7 * np.abs(w).mean(), w.shape)
        kept = np.abs(w) > delta
        alpha = np.broadcast_to(np.abs(w)[kept].mean(), (3, len(groups)))
    else:
        per_group = [0.7 * np.abs(g).mean(1, keepdims=True) for g in groups]
        delta = np.concatenate(
            [np.broadcast_to(d, g.shape) for d, g in zip(per_group, groups, strict=True)], 1
        )
        alpha = np.stack(
            [
                (np.abs(g) * (np.abs(g) > d)).sum(1) / (np.abs(g) > d).sum(1)
                for g, d in zip(groups, per_group, strict=True)
            ],
            1,
        )
    ternary = np.sign(w) * (np.abs(w) > delta)
    np.testing.assert_array_equal(qt.unpack().numpy().astype(int) - 1, ternary)
    scales = lowbit.reference.effective_scales(qt).numpy()
    # e8m0 rounds to a power of two, dq8 (whose scales differ little here) to 1 %, bf16 to 2^-9.
    bound = {"e8m0": 0.5, "dq8": 0.02, "bf16": 2**-8, "fp16": 2**-10}.get(qt.format.scale, 1e-6)
    np.testing.assert_allclose(scales, alpha, rtol=bound)


def test_the_best_threshold_is_the_best():
    """Against every number of weights that may be kept."""
    weight = normal(6, 45)
    weight[5, 7:] = weight[5, 0]
    qt = quantize(weight, "ternary_g15_fp32", "twn", threshold=None)
    assert_codes_are_best(qt, weight)
    for n, g in itertools.product(range(6), range(3)):
        part = weight[n, 15 * g : 15 * g + 15].double()
        magnitude = part.abs().sort(descending=True).values
        best = min(
            float(
                (magnitude[:m] - magnitude[:m].mean()).square().sum() + magnitude[m:].square().sum()
            )
            for m in range(1, 16)
        )
        got = (qt.dequantize()[n, 15 * g : 15 * g + 15] - part).square().sum()
        assert math.isclose(got, best, rel_tol=1e-5, abs_tol=1e-12)


def test_bitnet_is_its_formula():
    weight = normal(4, 100) + 0.2
    w = weight.double()
    beta = w.abs().mean()
    qt = quantize(weight, "binary_row_fp32", "bitnet")
    assert torch.equal(qt.unpack() == 1, w > w.mean())
    torch.testing.assert_close(qt.scales, beta.float().expand(4, 1))
    qt = quantize(weight, "ternary_row_fp32", "bitnet")
    assert torch.equal(qt.unpack().double() - 1, (w / beta).round().clamp(-1, 1))
    torch.testing.assert_close(qt.scales, beta.float().expand(4, 1))
    # Two groups of 64 and 36: each has its own mean.
    qt = quantize(weight, "binary_g64_fp32", "bitnet", granularity="group")
    center = torch.stack([w[:, :64].mean(1), w[:, 64:].mean(1)], 1)
    assert torch.equal(qt.unpack() == 1, w > center.repeat_interleave(64, 1)[:, :100])
    # A tie is even, so 0; rtn on the same table takes the lower value.
    ties = torch.tensor([[-0.5, 0.5, 1.5, -1.5]])
    assert quantize(ties, "ternary_fp32", "bitnet").dequantize().tolist() == [[0, 0, 1, -1]]


@pytest.mark.parametrize("scope", ["tensor", "row", "group"])
@pytest.mark.parametrize("scale", [None, "fp16"])
def test_multibit_gets_better_with_bits_and_is_a_sum_of_signs(scope: str, scale: str | None):
    weight = torch.distributions.StudentT(5.0).sample((8, 200)) * torch.logspace(-1, 1, 8)[:, None]
    errors = []
    for bits in (1, 2, 3, 4):
        format = Format.lut(bits=bits, group=100, scale=scale, table_scope=scope)
        qt = quantize(weight, format, "multibit").validate()
        assert_codes_are_best(qt, weight)
        table = qt.table.double()
        # Entry 2^i minus entry 0 is 2 a_i; entry 0 is minus the sum of all.
        a = torch.stack([table[..., 1 << i] - table[..., 0] for i in range(bits)], -1) / 2
        signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=bits))).flip(1).double()
        torch.testing.assert_close(a @ signs.T, table, rtol=1e-6, atol=1e-6)
        assert (a >= 0).all()
        assert (a.diff(dim=-1) <= 1e-7).all()
        errors.append(measure("", weight, qt).relative_error)
        best = measure("", weight, quantize(weight, format, "kmeans")).relative_error
        assert best <= errors[-1] * (1 + 1e-6)
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_multibit_is_a_least_squares_solution_for_its_signs(bits: int):
    weight = normal(3, 500)
    importance = torch.rand(3, 500) + 0.1
    format = Format.lut(bits=bits, group=None, scale=None, table_scope="row")
    qt = quantize(weight, format, "multibit", weights=importance, iterations=500)
    codes = qt.unpack().long()
    for n in range(3):
        b = ((codes[n][:, None] >> torch.arange(bits) & 1) * 2 - 1).double().numpy()
        root = importance[n].double().sqrt().numpy()
        a = np.linalg.lstsq(b * root[:, None], weight[n].double().numpy() * root, rcond=None)[0]
        got = [float(qt.table[n, 1 << i] - qt.table[n, 0]) / 2 for i in range(bits)]
        np.testing.assert_allclose(got, a, rtol=1e-4, atol=1e-5)
    greedy = quantize(weight, format, "multibit", weights=importance, iterations=0)
    first = (importance * weight.abs()).sum(1) / importance.sum(1)
    got = (greedy.table[:, 1] - greedy.table[:, 0]) / 2
    torch.testing.assert_close(got, first)
    errors = [float((importance * (q.dequantize() - weight).square()).sum()) for q in (qt, greedy)]
    assert errors[0] < errors[1]


def test_multibit_with_few_values():
    """Rows of zeros, constants and two values; importance of 0 counts as 1."""
    weight = torch.tensor([[0.0] * 8, [2.0] * 8, [3.0, -1.0] * 4, [1.0, 0.0] * 4])
    format = Format.lut(bits=2, group=None, scale=None, table_scope="row")
    for weights in (None, torch.zeros(4, 8)):
        made = quantize(weight, format, "multibit", weights=weights).dequantize()
        torch.testing.assert_close(made, weight, rtol=1e-5, atol=1e-5)
    assert torch.equal(quantize(weight[:1], "kmeans2", "multibit").dequantize(), weight[:1])
    for name, method in (("ternary", "twn"), ("binary", "bitnet"), ("ternary", "bitnet")):
        assert not quantize(torch.zeros(2, 200), name, method).dequantize().any()
        made = quantize(torch.full((2, 200), 3.0), name, method).dequantize()
        # BitNet's signs are those of w - mean w, and -1 for 0.
        assert torch.equal(made, torch.full((2, 200), -3.0 if name == "binary" else 3.0))


BAD = [
    ("binary", "twn", {}, r"table \(-1.0, 0.0, 1.0\) and scales, such as 'ternary', got 'binary'"),
    ("ternary", "twn", {"threshold": -1.0}, "threshold must be finite and not negative, got -1.0"),
    ("ternary", "twn", {"granularity": "x"}, "granularity must be one of"),
    ("int4", "bitnet", {}, "such as 'binary' or 'ternary', got 'int4'"),
    ("nf4", "multibit", {}, "fits tables of 1 to 4 bits, such as 'kmeans2', got format 'nf4'"),
    ("kmeans5", "multibit", {}, "fits tables of 1 to 4 bits"),
    ("kmeans2", "multibit", {"iterations": -1}, "iterations must be at least 0, got -1"),
    (Format.lut(bits=2, table=(-1, 0, 1), scale=None), "twn", {}, "and scales"),
]


@pytest.mark.parametrize(("format", "method", "options", "message"), BAD, ids=lambda v: str(v)[:30])
def test_bad_arguments(format, method, options, message):
    with pytest.raises(ValueError, match=message):
        quantize(normal(2, 100), format, method, **options)


@pytest.mark.parametrize(
    ("format", "method"), [("ternary", "twn"), ("binary", "bitnet"), ("kmeans2", "multibit")]
)
def test_weights_must_be_finite(format: str, method: str):
    with pytest.raises(ValueError, match="is not finite"):
        quantize(torch.full((2, 3), torch.nan), format, method)


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("ternary", "twn"),
        ("ternary_trits", "bitnet"),
        ("binary", "bitnet"),
        ("binary", "rtn"),
        ("kmeans2", "multibit"),
        ("kmeans3_pr", "multibit"),
    ],
)
def test_the_kernels_run_it(name: str, method: str):
    qt = quantize(normal(48, 256), name, method)
    eye = torch.eye(256)
    assert torch.equal(lowbit.linear(eye, qt).T, qt.dequantize())
    assert lowbit.explain(eye, qt).selected != REFERENCE
