"""Tables of integers: near the error of k-means, exact with int8 activations, in few bytes."""

from __future__ import annotations

import dataclasses
import math

import pytest
import safetensors.torch
import torch
from oracle import assert_codes_are_best, normal
from torch import nn

import lowbit
from lowbit import reference
from lowbit.explanation import REFERENCE
from lowbit.formats import Format, parse
from lowbit.io.save_load import load_tensors
from lowbit.methods import quantize
from lowbit.ptq.file import quantize_file
from lowbit.weights.quantized import QuantTensor


def error(weight: torch.Tensor, qt: QuantTensor) -> float:
    return float((qt.dequantize() - weight).double().square().mean())


@pytest.mark.parametrize("table_bits", [6, 7, 8])
def test_near_kmeans_with_four_levels(table_bits: int):
    """Rows of a normal weight: the best four levels are -1.51, -0.45, 0.45 and 1.51."""
    weight = normal(64, 512)
    qt = quantize(weight, "kmeans2_row", "nuuq", table_bits=table_bits)
    exact = quantize(weight, Format.lut(bits=2, group=None, scale=None), "kmeans")
    # A scale for each row is more than the exact table has, a grid of 63 integers less.
    assert error(weight, qt) < 1.005 * error(weight, exact)
    assert error(weight, qt) < error(weight, quantize(weight, "kmeans2_row"))


@pytest.mark.parametrize("scale", ["fp16", "fp32", "bf16", "e8m0", "e4m3", "dq8"])
@pytest.mark.parametrize("levels", [2, 3, 4, 5, 6, 7, 8])
def test_any_number_of_levels(levels: int, scale: str):
    weight = normal(20, 150) * torch.logspace(-2, 1, 20)[:, None]
    format = Format.lut(bits=3, group=40, scale=scale, activation="int8_table")
    qt = quantize(weight, format, "nuuq", levels=levels, table_bits=6).validate()
    table = qt.format.table
    assert len(table) == levels
    assert all(q == int(q) and abs(q) < 32 for q in table)
    assert qt.format.activation == "int8"
    assert_codes_are_best(qt, weight)
    assert qt.format == parse(qt.format.spec)
    # Lloyd-Max with as many levels, for weights that are normal in their groups.
    best = {2: 0.3634, 3: 0.1902, 4: 0.1175, 5: 0.0799, 6: 0.0580, 7: 0.0440, 8: 0.0345}[levels]
    worse = 1.25 if scale in ("e8m0", "e4m3", "dq8") else 1.05
    relative = error(weight, qt) / float(weight.double().square().mean())
    assert relative < worse * best
    x = torch.eye(150)
    assert lowbit.explain(x, qt).selected != REFERENCE
    exact = QuantTensor(dataclasses.replace(qt.format, activation=None), qt.shape, qt.tensors)
    assert torch.equal(lowbit.linear(x, exact).T, qt.dequantize())


@pytest.mark.parametrize(
    ("levels", "packing", "bits"), [(3, "trits", 1.6), (5, "base5", 8 / 3), (6, "base6", 8 / 3)]
)
def test_digits_take_fewer_bytes(levels: int, packing: str, bits: float):
    weight = normal(32, 240)
    width = 2 if levels == 3 else 3
    qt = quantize(weight, f"kmeans{width}_row", "nuuq", levels=levels)
    assert qt.format.packing == packing
    assert math.isclose(qt.format.stored_bits, bits)
    assert qt.tensors["codes"].shape == (32, math.ceil(240 * bits / 8))
    wide = quantize(weight, "kmeans4_row", "nuuq", levels=levels)
    assert wide.format.packing == "bits"
    assert torch.equal(wide.dequantize(), qt.dequantize())


def test_products_with_int8_activations_are_exact():
    """The kernel gives what int64 sums of the integers give, bit for bit."""
    weight, x = normal(48, 256), normal(7, 256, seed=1)
    qt = quantize(weight, "kmeans4_row_fp32_a8t", "nuuq", levels=11).validate()
    q, x_scale = reference.quantize_int8(x)
    integers = torch.tensor(qt.format.table)[qt.unpack().long()].long()
    step = qt.format.int8_step
    sums = (q.long() @ (integers / step).long().T).float()
    got = lowbit.linear(x, qt)
    expected = sums.double() * x_scale.double()[:, None] * step * qt.scales.double().T
    # Three fp32 products of an exact sum.
    assert ((got - expected).abs() <= 2**-22 * expected.abs()).all()
    assert lowbit.explain(x, qt).selected != REFERENCE


def test_powers_of_two():
    weight = normal(16, 128)
    qt = quantize(weight, "kmeans2_g32_e8m0", "nuuq").validate()
    assert error(weight, qt) < 1.05 * error(weight, quantize(weight, "kmeans2_g32_e8m0"))


def test_degenerate_weights():
    for weight in (torch.zeros(3, 20), torch.full((3, 20), 0.5), torch.ones(1, 1)):
        for levels in (2, 3, 4):
            qt = quantize(weight, "kmeans2_g8", "nuuq", levels=levels).validate()
            assert torch.equal(qt.dequantize(), weight)
    mixed = torch.cat([torch.zeros(2, 8), normal(2, 12)], 1)
    qt = quantize(mixed, "kmeans2_g8", "nuuq").validate()
    assert not qt.dequantize()[:, :8].any()


BAD = [
    ("kmeans2", {"levels": 5}, "levels must be from 2 to 4"),
    ("kmeans2", {"levels": 1}, "levels must be from 2 to 4"),
    ("kmeans2", {"table_bits": 9}, "table_bits must be from 2 to 8"),
    ("kmeans2", {"table_bits": 2}, "table_bits must be enough for 4 levels, 2 give 3 integers"),
    ("kmeans2", {"iterations": 0}, "iterations must be at least 1"),
    ("kmeans2_pr", {}, "method 'nuuq' fits one table and the scales of groups"),
    ("nf4", {}, "method 'nuuq' fits tables and format 'nf4' has"),
]


@pytest.mark.parametrize(("format", "options", "message"), BAD, ids=lambda v: str(v)[:30])
def test_bad_arguments(format: str, options: dict[str, int], message: str):
    with pytest.raises(ValueError, match=message):
        quantize(normal(2, 16), format, "nuuq", **options)


def test_a_model_survives_its_file(tmp_path):
    model = nn.Sequential(nn.Linear(40, 24), nn.ReLU(), nn.Linear(24, 8)).eval()
    lowbit.quantize_model(
        model, "kmeans3_g8", method="nuuq", options={"levels": 5}, progress=False, fuse=False
    )
    first = model[0].quant_tensor()
    assert first.format.packing == "base5"
    lowbit.save(model, tmp_path / "model.safetensors")
    loaded = load_tensors(tmp_path / "model.safetensors")["0"]
    assert loaded.format == first.format
    for name, tensor in first.tensors.items():
        assert torch.equal(loaded.tensors[name], tensor)


def test_a_file_is_not_converted(tmp_path):
    """Its header is written before the tables are known."""
    safetensors.torch.save_file({"up.weight": normal(8, 16)}, tmp_path / "dense.safetensors")
    with pytest.raises(ValueError, match="up: method 'nuuq' makes a format of its own"):
        quantize_file(
            tmp_path / "dense.safetensors", tmp_path / "a.safetensors", "kmeans2_g8", method="nuuq"
        )
    assert not (tmp_path / "a.safetensors").exists()
