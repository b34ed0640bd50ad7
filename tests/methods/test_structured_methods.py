"""Methods of structured formats: how near they come to normal numbers, outputs with a Hessian, and bad input."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import lowbit
from lowbit import reference
from lowbit.backends.cpu.structured import encode_trellis
from lowbit.formats import parse
from lowbit.methods import vq
from lowbit.structured import STATE_BITS

VALUES = reference.trellis_values(torch.arange(1 << STATE_BITS))


def quantized(w: torch.Tensor, name: str, **options):
    if parse(name).codec == "vector":
        pytest.importorskip("faiss")
    return lowbit.quantize(w, name, **options)


def relative_error(w: torch.Tensor, qt) -> float:
    return float((qt.dequantize() - w).double().square().sum() / w.double().square().sum())


def distances(x: torch.Tensor, codes: torch.Tensor, bits: int) -> torch.Tensor:  # (R,)
    return (
        (reference.trellis_values(reference.trellis_states(codes, bits)) - x)
        .double()
        .square()
        .sum(1)
    )


# Per element of normal numbers: the bound of rate-distortion theory is 4^-bits. What is allowed is the mean of measured
# ones (0.0685, 0.0176, 0.0046; 0.0914, 0.0297, 0.0087; Lloyd-Max with two bits has 0.1175) and 4 %, as of 24576
# numbers.
@pytest.mark.parametrize(
    ("name", "most"),
    [
        ("trellis2", 0.0713), ("trellis3", 0.0184), ("trellis4", 0.0049),
        ("e8p", 0.0951), ("e8p_rvq3", 0.0309), ("e8p_rvq4", 0.0093),
        ("vq8_d4", 0.105), ("vq4_d2", 0.1175),
    ],
)  # fmt: skip
def test_error_on_normal_numbers(name, most):
    w = torch.randn(24, 1024, generator=torch.Generator().manual_seed(3))
    if name == "trellis2":
        w = w[:12]
    qt = quantized(w, name)
    bits = qt.format.stored_bits
    assert 4.0**-bits < relative_error(w, qt) < most
    table = 0 if qt.table is None else qt.table.numel() * 32
    assert qt.bits_per_weight == pytest.approx(bits + (16 * len(w) + table) / w.numel())


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("count", [1, 2, 4, 5, 9])
def test_trellis_of_few_weights_is_near_the_best_of_all(bits, count):
    """A ring of at most 16 bits is searched; of a longer one the seam is chosen first."""
    x = torch.randn(3, count) * 1.15
    got = distances(x, encode_trellis(x, VALUES, bits), bits)
    if bits * count > 20:
        return
    every = torch.arange(1 << bits * count)[:, None] >> bits * torch.arange(count) & (1 << bits) - 1
    all_values = reference.trellis_values(reference.trellis_states(every, bits))
    least = torch.cdist(x.double(), all_values.double()).amin(1) ** 2
    if bits * count <= 16:
        torch.testing.assert_close(got, least, rtol=1e-6, atol=1e-9)
    else:
        assert bool((got >= least - 1e-9).all())


def test_trellis_path_is_that_of_viterbi_in_floats():
    x, bits = torch.randn(1, 40) * 1.15, 2
    codes = encode_trellis(
        x,
        VALUES,
        bits,
        torch.tensor([-1], dtype=torch.int32),
        torch.tensor([-1], dtype=torch.int32),
    )
    groups = 1 << 16 - bits
    sums = torch.zeros(1 << 16, dtype=torch.float64)
    for i in reversed(range(40)):
        least = sums.view(1 << bits, groups).amin(0)
        sums = least.repeat_interleave(1 << bits) + (VALUES.double() - float(x[0, i])).square()
    # Codes end 14 bits before the states do: the best end of the 7 last states is looked for among all.
    states = torch.zeros(33, dtype=torch.int64)
    for step in range(8):
        states |= codes[0, step : step + 33].long() << bits * step
    got = float((reference.trellis_values(states).double() - x[0, :33]).square().sum())
    # 15 bits of fixed point: a distance is cut to 1/2048 of the variance, 40 times; the 7 last ones are not in `got`.
    assert got <= float(sums.min()) + 40 / 2048 * 1.34


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_trellis_keeps_what_is_given_at_its_ends(bits):
    x = torch.randn(4, 700)
    low = 1 << 16 - bits
    first, next_ = (torch.randint(0, low, (4,), dtype=torch.int32) for _ in range(2))
    codes = encode_trellis(x, VALUES, bits, next_, first).long()
    steps = range(-(-16 // bits))
    state = sum(codes[:, i] << bits * i for i in steps) & 0xFFFF
    assert torch.equal(state & low - 1, first.long())
    behind = torch.stack([next_.long() >> bits * i & (1 << bits) - 1 for i in steps], 1)
    states = reference.trellis_states(torch.cat([codes, behind], 1), bits)[:, :700]
    error = (reference.trellis_values(states) - x).square().mean()
    free = encode_trellis(x, VALUES, bits)
    ring = distances(x, free, bits).sum() / x.numel()
    # 26 or 28 of 700 * bits bits are not free, which a few weights pay for.
    assert float(error) < 1.25 * float(ring)


@pytest.mark.parametrize("isa", ["scalar", "avx2"])
def test_trellis_is_the_same_on_every_instruction_set(isa):
    x = torch.randn(2, 70)
    for bits in (2, 3, 4):
        assert torch.equal(
            encode_trellis(x, VALUES, bits, isa=isa), encode_trellis(x, VALUES, bits)
        )


def correlated(samples: int, k: int, seed: int = 5) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(k, k, generator=g) / k**0.5
    return torch.randn(samples, k, generator=g) @ (
        torch.eye(k) * 0.3 + mix * torch.linspace(2, 0.05, k)[:, None]
    )


@pytest.mark.parametrize("name", ["e8p", "trellis2", "vq8_d4", "e8p_g64", "trellis3_g32"])
@pytest.mark.parametrize("k", [256, 261])
def test_a_hessian_lowers_the_error_of_outputs(name, k):
    x = correlated(512, k)
    w, h = torch.randn(16, k), x.T @ x / len(x)
    plain, aware = quantized(w, name), quantized(w, name, hessian=h)
    errors = [float(((qt.dequantize() - w) @ x.T).square().sum()) for qt in (plain, aware)]
    assert errors[1] < 0.9 * errors[0]


def test_a_hessian_of_independent_inputs_changes_no_points():
    w, h = torch.randn(8, 64), torch.diag(torch.rand(64) + 0.5)
    aware, plain = (
        lowbit.quantize(w, "e8p", **given) for given in ({"hessian": h, "damping": 0.0}, {})
    )
    assert torch.equal(aware.codes, plain.codes)


@pytest.mark.parametrize("name", ["e8p", "trellis2", "vq4_d4", "e8p_rvq4", "trellis4_g8"])
def test_ragged_shapes_zeros_and_scales(name):
    for n, k in ((1, 1), (1, 3), (3, 13), (2, 17)):
        w = torch.randn(n, k, dtype=torch.float64)
        w[0] = 0
        qt = quantized(w, name)
        assert not bool(qt.dequantize()[0].any())
        assert bool(qt.dequantize().isfinite().all())
    w = torch.randn(4, 64)
    small = quantized(w * 2.0**-8, name.replace("_g8", "") + "_fp32").dequantize() * 2.0**8
    assert torch.equal(small, quantized(w, name.replace("_g8", "") + "_fp32").dequantize())


def test_a_table_larger_than_the_data_holds_it():
    w = torch.randn(3, 10)
    qt = quantized(w, "vq8_d4_fp32")
    torch.testing.assert_close(qt.dequantize(), w, rtol=1e-6, atol=1e-7)
    assert not bool(qt.table[9:].any())


def test_importance_of_vectors():
    pytest.importorskip("faiss")
    w, importance = torch.randn(64, 64), torch.zeros(64, 64) + 1e-3
    importance[:, ::4] = 1.0
    errors = []
    for given in (None, importance):
        qt = lowbit.quantize(w, "vq8_d4", weights=given)
        errors.append(float((importance * (qt.dequantize() - w).square()).sum()))
    assert errors[1] < 0.8 * errors[0]
    exact = vq.nearest(torch.tensor([[[1.0, 0.0]]]), torch.tensor([[1.0, 3.0], [3.0, 0.0]]))
    heavy = vq.nearest(
        torch.tensor([[[1.0, 0.0]]]),
        torch.tensor([[1.0, 3.0], [3.0, 0.0]]),
        torch.tensor([[[1.0, 0.1]]]),
    )
    assert (int(exact), int(heavy)) == (1, 0)


def test_vectors_repeat():
    pytest.importorskip("faiss")
    w = torch.randn(32, 64)
    assert torch.equal(lowbit.quantize(w, "vq8_d4").table, lowbit.quantize(w, "vq8_d4").table)


@pytest.mark.parametrize(
    ("name", "options", "match"),
    [
        ("e8p", {"method": "rtn"}, "method must be 'lattice'"),
        ("nf4", {"method": "lattice"}, "makes codes of codec 'e8p'"),
        ("nf4", {"method": "trellis"}, "makes codes of codec 'trellis'"),
        ("nf4", {"method": "vq"}, "makes codes of codec 'vector'"),
        ("e8p", {"table": torch.zeros(16)}, "takes no table"),
        ("e8p", {"weights": torch.ones(64)}, "takes no weights"),
        ("e8p", {"hessian": torch.eye(3)}, "hessian of a weight"),
        ("trellis2", {"hessian": -torch.eye(64)}, "positive semi-definite"),
        ("e8p", {"hessian": torch.eye(64), "damping": -1.0}, "damping must be"),
        ("vq4_d2", {"rounds": 0}, "rounds must be at least 1"),
        ("vq4_d2", {"weights": torch.ones(64), "hessian": torch.eye(64)}, "both given"),
    ],
)
def test_bad_input(name, options, match):
    with pytest.raises(ValueError, match=match):
        lowbit.quantize(torch.randn(8, 64), name, **options)


def test_bad_weights():
    for name in ("e8p", "trellis2"):
        with pytest.raises(ValueError, match="not finite"):
            lowbit.quantize(torch.tensor([[1.0, float("nan")]]), name)
        with pytest.raises(ValueError, match="non-empty"):
            lowbit.quantize(torch.ones(0, 8), name)
    with pytest.raises(ValueError, match="does not fit fp16"):
        lowbit.quantize(torch.full((1, 8), 1e6), "e8p")


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "faiss", None)
    with pytest.raises(ImportError, match="lowbit\\[vectors\\]"):
        lowbit.quantize(torch.randn(64, 64), "vq4_d2")


def test_models_are_quantized_with_and_without_calibration():
    model = torch.nn.Sequential(torch.nn.Linear(96, 64), torch.nn.ReLU(), torch.nn.Linear(64, 24))
    x = torch.randn(64, 96)
    for method in (None, "lattice"):
        given = {} if method is None else {"method": method, "calibration": [x]}
        copy = torch.nn.Sequential(*(torch.nn.Linear(m.in_features, m.out_features) if isinstance(m, torch.nn.Linear)
                                     else m for m in model))  # fmt: skip
        copy.load_state_dict(model.state_dict())
        report = lowbit.quantize_model(copy, "e8p", **given)
        assert len(report.layers) == 2
        assert dataclasses.is_dataclass(report)
        with torch.no_grad():
            wanted, got = model(x), copy(x)
        assert float((got - wanted).square().mean() / wanted.square().mean()) < 0.3
