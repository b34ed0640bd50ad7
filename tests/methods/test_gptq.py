"""GPTQ against a plain loop over columns in float64, round to nearest and its own dequantized weight; HQQ."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from oracle import assert_codes_are_best, normal

import lowbit
from lowbit import reference
from lowbit.formats import FORMATS, Format
from lowbit.methods import gptq, hqq, quantize
from weights import ALL_FORMATS, assert_close

ids = {"ids": lambda f: f.name}
# Tables with nearly an entry for each of the few weights here hold the weights before the updates.
COARSE = [f for f in ALL_FORMATS if f.name not in ("kmeans6_pr", "kmeans8_pr")]
# A whole-row scale, groups below, equal to, above and not dividing a block, every kind of table.
KINDS = [
    FORMATS["uint4"],
    Format(name="i4", codec="affine", bits=4, group=None),
    Format(name="i3", codec="affine", bits=3, group=200),
    Format(name="z3", codec="affine", bits=3, group=20, zero="float", scale_rule="minmax"),
    *(f for f in ALL_FORMATS if f.name in ("nf4", "mxfp4", "nvfp4", "e5m2", "ternary_trits")),
    *(
        f
        for f in ALL_FORMATS
        if f.name in ("kmeans3", "kmeans4_pr", "row_tables_g32", "km3", "km3x2")
    ),
    *(f for f in ALL_FORMATS if f.name in ("group_tables_g32", "affine3_int_dq8_g7", "q4_1")),
]


def inputs(k: int, samples: int = 800) -> torch.Tensor:
    """Correlated: a few directions carry most of it."""
    g = torch.Generator().manual_seed(1)
    mix = torch.randn(k, k, generator=g) * torch.linspace(0.05, 2, k)[:, None] / k**0.5
    return torch.randn(samples, k, generator=g) @ mix + 0.1 * torch.randn(samples, k, generator=g)


def second_moment(x: torch.Tensor) -> torch.Tensor:
    return (x.double().T @ x.double() / len(x)).float()


def loss(weight: torch.Tensor, qt: lowbit.QuantTensor, x: torch.Tensor) -> float:
    return float(((weight - qt.dequantize()).double() @ x.double().T).norm())


def same(a: lowbit.QuantTensor, b: lowbit.QuantTensor) -> bool:
    raw = [[t.view(-1).view(torch.uint8) for t in qt.tensors.values()] for qt in (a, b)]
    return all(torch.equal(x, y) for x, y in zip(*raw, strict=True))


@pytest.mark.parametrize("format", COARSE, **ids)
def test_outputs_are_nearer_than_with_round_to_nearest(format: Format):
    x, weight = inputs(200), normal(12, 200) * 0.02
    qt = quantize(weight, format, "gptq", hessian=second_moment(x)).validate()
    assert loss(weight, qt, x) < 0.9 * loss(weight, quantize(weight, format), x)


@pytest.mark.parametrize("act_order", (False, True))
@pytest.mark.parametrize("format", [f for f in ALL_FORMATS if f.fitted], **ids)
def test_tables_weigh_columns_by_their_inputs(format: Format, act_order: bool):
    """Of independent inputs the mean square is what an error in a column counts: the format's own method with that
    importance.
    """
    square = torch.logspace(-3, 3, 200)[torch.randperm(200)]
    weight = normal(12, 200) * 0.02
    hessian = torch.diag(square)
    options = {"hessian": hessian, "damping": 0.0, "act_order": act_order}
    made = quantize(weight, format, "gptq", **options)
    expected = quantize(weight, format, weights=square)
    torch.testing.assert_close(made.table, expected.table, rtol=1e-4, atol=1e-6)
    error = [
        (weight - qt.dequantize()).double().square() @ square.double() for qt in (made, expected)
    ]
    torch.testing.assert_close(*error, rtol=1e-3, atol=0)


@pytest.mark.parametrize("name", ("kmeans2", "kmeans3", "kmeans3_pr"))
def test_importance_points_the_right_way(name: str, monkeypatch: pytest.MonkeyPatch):
    """Its inverse makes outputs worse where inputs differ much."""
    x, weight = inputs(200) * torch.logspace(-2, 2, 200), normal(12, 200) * 0.02
    hessian = second_moment(x)
    right = loss(weight, quantize(weight, name, "gptq", hessian=hessian), x)
    importance = gptq._Sweep.importance
    monkeypatch.setattr(gptq._Sweep, "importance", lambda self: importance(self).reciprocal())
    assert right < 0.95 * loss(weight, quantize(weight, name, "gptq", hessian=hessian), x)


@pytest.mark.parametrize("format", ALL_FORMATS, **ids)
def test_independent_inputs_give_round_to_nearest(format: Format):
    """Codes, scales and tables, bit for bit."""
    weight = normal(5, 70)
    assert same(quantize(weight, format, "gptq", hessian=torch.eye(70)), quantize(weight, format))


@pytest.mark.parametrize("format", KINDS, **ids)
def test_act_order_with_independent_inputs_gives_round_to_nearest(format: Format):
    """In falling order, and in another one: the sweep may go through the columns as it likes."""
    weight, h = normal(5, 150), torch.linspace(1, 3, 150)[torch.randperm(150)].diag()
    if not format.fitted:
        qt = quantize(weight, format, "gptq", hessian=h, act_order=True)
        assert same(qt, quantize(weight, format))
    qt = quantize(weight, format, "gptq", hessian=torch.eye(150), act_order=True)
    assert same(qt, quantize(weight, format))


def column_by_column(
    weight: torch.Tensor, format: Format, hessian: torch.Tensor, qt: lowbit.QuantTensor
) -> torch.Tensor:
    """The paper's algorithm with the inverse Hessian's Cholesky factor and no blocks. The scales of `qt` are
    checked against those that the updated weights of a group would get. Returns the weight (N, K) fp64.
    """
    k = weight.shape[1]
    h = hessian.double()
    h = h + 0.01 * h.diagonal().mean() * torch.eye(k)
    upper = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    w = weight.double().clone()
    scales, result = reference.effective_scales(qt), torch.zeros_like(w)
    chosen = reference.chosen_tables(qt.scales, format)
    group = format.group or k
    follows = format.group is not None and format.scale not in ("e4m3", "dq8", "int8", "int7")
    for j in range(k):
        if follows and j % group == 0:
            part = w[:, j : j + group].float()
            wanted = quantize(
                part,
                dataclasses.replace(format, table=(-1.0, 1.0), table_scope="tensor")
                if format.fitted
                else format,
            )
            assert torch.equal(scales[:, j // group], reference.effective_scales(wanted)[:, 0])
            if qt.zeros is not None:
                assert torch.equal(qt.zeros[:, j // group], wanted.zeros[:, 0])
        candidates = []
        for code in range(format.num_codes):
            codes = torch.full(w.shape, code, dtype=torch.uint8)
            values = reference.code_values(codes, format, qt.table, chosen)
            candidates.append(reference.apply_scales(values, format, scales, qt.zeros)[:, j])
        table = torch.stack(candidates, 1).double().nan_to_num(nan=torch.inf)
        q = table.gather(1, (table - w[:, j, None]).abs().argmin(1, keepdim=True))[:, 0]
        error = (w[:, j] - q) / upper[j, j]
        w[:, j:] -= error[:, None] * upper[j, j:]
        result[:, j] = q
    return result


@pytest.mark.parametrize("format", [f for f in KINDS if f.codec != "e5m2"], **ids)
def test_against_a_loop_over_columns(format: Format):
    """Weights within 2^-24 of a tie may fall to either side; with this seed none does."""
    h, weight = second_moment(inputs(220)), normal(4, 220) * 0.02
    qt = quantize(weight, format, "gptq", hessian=h)
    assert torch.equal(qt.dequantize().double(), column_by_column(weight, format, h, qt))


def test_act_order_is_the_same_sweep_over_permuted_columns():
    """With one scale per row that is fixed either way."""
    h, weight = second_moment(inputs(200)), normal(6, 200)
    h = h * torch.linspace(0.5, 1.5, 200).outer(torch.linspace(0.5, 1.5, 200))
    order = h.diagonal().argsort(descending=True, stable=True)
    got = quantize(weight, "int3_row", "gptq", hessian=h, act_order=True).dequantize()
    permuted = quantize(weight[:, order], "int3_row", "gptq", hessian=h[order][:, order])
    assert torch.equal(got[:, order], permuted.dequantize())


@pytest.mark.parametrize("format", KINDS, **ids)
def test_blocks_and_slices_do_not_show(format: Format, monkeypatch: pytest.MonkeyPatch):
    h, weight = second_moment(inputs(210)), normal(7, 210)
    expected = quantize(weight, format, "gptq", hessian=h)
    for block in (33, 1000):
        assert same(quantize(weight, format, "gptq", hessian=h, block=block), expected)
    monkeypatch.setattr(gptq, "_SLICE_WEIGHTS", 500)
    assert same(quantize(weight, format, "gptq", hessian=h), expected)


def test_the_sum_over_columns_is_the_loss():
    """tr(E H E^T) = sum of E'_j^2 / U_jj^2 for the factor that the sweep divides by."""
    h = second_moment(inputs(40)).double()
    upper = gptq.inverse_factor(h, 0.0)
    assert torch.equal(upper, upper.triu())
    # cond(H) is below 1e5 here.
    assert (upper.T @ upper @ h - torch.eye(40)).abs().max() < 1e-10


def test_a_given_table_is_used():
    h, weight = second_moment(inputs(150)), normal(4, 150)
    table = torch.linspace(-1, 1, 8)
    qt = quantize(weight, "kmeans3", "gptq", hessian=h, table=table)
    assert torch.equal(qt.table, table)
    fixed = Format.lut(bits=3, table=table)
    assert torch.equal(qt.dequantize(), quantize(weight, fixed, "gptq", hessian=h).dequantize())


@pytest.mark.parametrize("format", KINDS, **ids)
def test_the_result_runs_on_the_fast_path(format: Format):
    x, weight = inputs(128)[:3], normal(64, 128)
    qt = quantize(weight, format, "gptq", hessian=second_moment(inputs(128)))
    assert lowbit.explain(x, qt).selected in {row["name"] for row in lowbit.kernels()}
    got, dense = lowbit.linear(x, qt), qt.dequantize().double()
    assert_close(got, x.double() @ dense.T, x, qt, dense)


def test_singular_hessians():
    """Fewer samples than columns, and columns without inputs."""
    x, weight = inputs(90, samples=20), normal(5, 90)
    x[:, 3:40] = 0
    h = second_moment(x)
    qt = quantize(weight, "int4", "gptq", hessian=h)
    assert loss(weight, qt, x) < loss(weight, quantize(weight, "int4"), x)
    row = quantize(weight, "int4_row", "gptq", hessian=h).dequantize()
    assert torch.equal(row[:, 3:40], quantize(weight, "int4_row").dequantize()[:, 3:40])
    with pytest.raises(ValueError, match="singular or not positive definite with damping 0"):
        quantize(weight, "int4", "gptq", hessian=h, damping=0.0)


EYE = torch.eye(8)
BAD = [
    ({}, ValueError, "method 'gptq' needs hessian"),
    ({"hessian": [1.0]}, TypeError, "hessian must be a floating tensor, got list"),
    ({"hessian": EYE.int()}, TypeError, "hessian must be a floating tensor, got torch.int32"),
    ({"hessian": torch.eye(7)}, ValueError, r"must be \(8, 8\) there, got \(7, 7\)"),
    ({"hessian": EYE * torch.nan}, ValueError, "hessian must be finite"),
    ({"hessian": EYE * 0}, ValueError, "hessian is zero on its diagonal: it is that of no input"),
    ({"hessian": -EYE}, ValueError, r"semi-definite, got hessian\[0, 0\] = -1"),
    ({"hessian": EYE + torch.ones(8, 8).triu(1)}, ValueError, "symmetric, .* reaches 1"),
    ({"hessian": 2 * torch.ones(8, 8) - EYE * 1.5}, ValueError, "not positive definite"),
    ({"hessian": EYE, "damping": -0.1}, ValueError, "damping must be .* got -0.1"),
    ({"hessian": EYE, "damping": torch.inf}, ValueError, "damping must be .* got inf"),
    ({"hessian": EYE, "block": 0}, ValueError, "block must be at least 1, got 0"),
    ({"hessian": EYE, "weights": torch.ones(2, 8)}, ValueError, "'gptq' takes no weights"),
    ({"hessian": EYE, "order": 1}, ValueError, "'gptq' takes no order"),
    ({"hessian": EYE, "table": torch.ones(2)}, ValueError, "table is only for fitted formats"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD, ids=lambda v: str(v)[:40])
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        quantize(normal(2, 8), "int4", "gptq", **arguments)


def test_a_scale_that_overflows_after_the_updates():
    """The second group makes up for the first one, whose weights are rounded to 0."""
    weight = torch.tensor([[30000.0, 0.0, 6e4, 1.0]])
    h = torch.tensor([[1e4, 0, 0, 99.0], [0, 1, 0, 0], [0, 0, 1, 0], [99.0, 0, 0, 1]])
    format = Format.lut(bits=1, table=(-1.0, 1.0), group=2, scale_rule="mean")
    with pytest.raises(ValueError, match="columns 2 to 4 as updated: .* does not fit fp16"):
        quantize(weight, format, "gptq", hessian=h, damping=1e-6)


ZEROS = [f for f in ALL_FORMATS if f.zero in ("float", "min") and not f.integer_scales]


def lp(weight: torch.Tensor, qt: lowbit.QuantTensor) -> torch.Tensor:  # (N, groups)
    error = (weight - qt.dequantize()).double().abs().pow(0.7)
    size = qt.format.group or weight.shape[1]
    return torch.stack([g.sum(1) for g in error.split(size, 1)], 1)


@pytest.mark.parametrize("fit_scale", [False, True])
@pytest.mark.parametrize("format", ZEROS, **ids)
def test_hqq_lowers_the_norm_of_every_group(format: Format, fit_scale: bool):
    weight = normal(6, 330) * 0.02
    weight[:, ::50] *= 6
    qt = quantize(weight, format, "hqq", fit_scale=fit_scale).validate()
    assert_codes_are_best(qt, weight)
    plain = quantize(weight, format)
    before, after = lp(weight, plain), lp(weight, qt)
    # The sums differ from those that were compared in the last bits only.
    assert (after <= before * (1 + 1e-9)).all()
    # Zeros in bf16 are too coarse to be moved by less than a step of 6-bit codes.
    coarse = format.scale == "bf16" and format.bits == 6
    assert after.sum() < before.sum() or (coarse and not fit_scale)
    assert fit_scale or torch.equal(qt.scales, plain.scales)


def hqq_step(w: torch.Tensor, scale: float, zero: float, beta: float) -> float:
    """The paper's two formulas in units of the scale, for one group of 2-bit codes."""
    q = (w / scale + zero).round().clamp(0, 3)
    e = w / scale - (q - zero)
    sparse = e.sign() * torch.relu(e.abs() - e.abs() ** (0.7 - 1) / beta)
    return float((q - (w / scale - sparse)).mean())


def test_hqq_follows_the_formulas():
    """One iteration gives the zero of the formulas, or the first one where that is no better."""
    format = Format(
        name="z", codec="affine", bits=2, zero="float", scale="fp32", scale_rule="minmax"
    )
    moved = 0
    for seed in range(8):
        weight = normal(1, 64, seed=seed)
        plain = quantize(weight, format)
        zero = hqq_step(weight[0].double(), plain.scales.item(), plain.zeros.item(), 10.0)
        got = quantize(weight, format, "hqq", iterations=1).zeros.item()
        # The two differ by the rounding of W^ to fp32.
        assert got == plain.zeros.item() or abs(got - zero) < 1e-6
        moved += got != plain.zeros.item()
    assert moved == 5
    assert same(quantize(weight, format, "hqq", iterations=0), plain)


def test_hqq_counts_the_squared_part_more_in_each_iteration():
    """beta * kappa^i in iteration i: the best zero on the way that the two formulas go."""
    format = Format(
        name="z", codec="affine", bits=2, zero="float", scale="fp32", scale_rule="minmax"
    )
    others = 0
    for seed in range(8):
        weight = normal(1, 64, seed=seed)
        plain = quantize(weight, format)
        w, scale, first = weight[0].double(), plain.scales.item(), plain.zeros.item()

        def best(growth: float, w=w, scale=scale, first=first) -> float:
            way = [first]
            for i in range(6):
                way.append(hqq_step(w, scale, way[-1], 3.0 * growth**i))
            errors = [(w / scale - ((w / scale + z).round().clamp(0, 3) - z)).abs() for z in way]
            sums = torch.stack([(e**0.7).sum() for e in errors])
            return way[int(sums.argmin())]

        got = quantize(weight, format, "hqq", beta=3.0, kappa=2.0, iterations=6).zeros.item()
        assert abs(got - best(2.0)) < 1e-4
        others += abs(got - best(0.5)) > 1e-2
    assert others >= 3


@pytest.mark.parametrize("act_order", [False, True])
def test_the_importance_of_columns(act_order: bool):
    """A table is fitted as if column j counted 1 / U_jj^2, (H + damping)^-1 = U^T U, numpy's U."""
    weight, x = normal(12, 40), inputs(40)
    hessian = second_moment(x).double().numpy()
    order = np.argsort(-hessian.diagonal(), kind="stable") if act_order else np.arange(40)
    damped = hessian[order][:, order] + 0.01 * hessian.diagonal().mean() * np.eye(40)
    upper = np.linalg.cholesky(np.linalg.inv(damped)).T
    importance = np.empty(40)
    importance[order] = 1 / upper.diagonal() ** 2
    how = {"damping": 0.01, "act_order": act_order}
    made = gptq.quantize(weight, "kmeans3_pr", hessian=second_moment(x), **how)
    wanted = quantize(
        weight, "kmeans3_pr", "kmeans", weights=torch.from_numpy(importance / importance.max())
    )
    assert torch.allclose(made.table, wanted.table, rtol=1e-5, atol=1e-6)
    plain = quantize(weight, "kmeans3_pr", "kmeans")
    assert not torch.allclose(made.table, plain.table, atol=1e-3)


def test_hqq_constant_and_zero_groups():
    for weight in (torch.zeros(2, 70), torch.full((2, 70), 0.3)):
        for name in ("uint4_zfloat", "q4_1"):
            got = quantize(weight, name, "hqq", fit_scale=True).validate().dequantize()
            assert (got - weight).abs().max() <= 2**-10 * 0.3
    with pytest.raises(ValueError, match="format 'int4' has zero None"):
        quantize(normal(2, 8), "int4", "hqq")
    for bad in ({"p": 0}, {"p": 1.5}, {"beta": 0}, {"kappa": 0.5}, {"iterations": -1}):
        with pytest.raises(ValueError, match=f"{next(iter(bad))} must be"):
            hqq.quantize(normal(2, 8), "uint4_zfloat", **bad)


def test_hqq_refuses_zeros_that_share_a_second_level():
    with pytest.raises(
        ValueError,
        match=r"format 'q4_k' are codes that share a second level: use a format with float",
    ):
        quantize(normal(4, 64), "q4_k", "hqq")
