"""Products of integers as a GPU computes them, with torch._int_mm, bit for bit those of the reference; on a CPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import lowbit
from lowbit import layouts, reference
from lowbit.backends import base, int8_mm
from lowbit.backends.cuda import CUDA
from lowbit.backends.pytorch import PYTORCH
from lowbit.formats import parse
from weights import random_weight

FORMATS = (
    "int4_g32_a8",
    "uint4_g32_a8",
    "uint8_g64_a8",
    "q4_1_a8",
    "uint2_zfloat_a8",
    "mxfp4_a8",
    "binary_a8",
    "int8_a8",
    "nf4_a8t",
    "int4_g128_a8b32",
    "kmeans4_g16_dq8_a8t",
)


@pytest.fixture(autouse=True)
def products(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    """torch._int_mm that refuses what CUDA's does; the shapes that it was given."""
    given: list[tuple[int, int, int]] = []
    multiply = torch._int_mm

    def checked(a: Tensor, b: Tensor) -> Tensor:
        (m, k), n = a.shape, b.shape[1]
        assert m > 16
        assert k % 8 == n % 8 == 0
        assert a.is_contiguous()
        assert b.t().is_contiguous()
        assert a.dtype == b.dtype == torch.int8
        given.append((m, n, k))
        return multiply(a, b)

    monkeypatch.setattr(torch, "_int_mm", checked)
    return given


@pytest.mark.parametrize("m", (1, 17, 40))
@pytest.mark.parametrize("name", FORMATS)
def test_products_are_those_of_the_reference(
    name: str, m: int, monkeypatch: pytest.MonkeyPatch, products: list[tuple[int, int, int]]
) -> None:
    n, k = 21, 150
    qt = random_weight(parse(name), n, k)
    x = torch.randn(m, k)
    x[-1, 3] = 1e4
    w = layouts.to_operands(qt, layouts.CANONICAL)
    want = PYTORCH.linear(x, w, None)
    assert not products
    monkeypatch.setattr(base, "_integers", lambda _: int8_mm.product)
    assert torch.equal(PYTORCH.linear(x, w, None), want)
    assert products


def test_the_largest_sums_are_exact(products: list[tuple[int, int, int]]) -> None:
    k = reference.activations.INT8_PART
    q = torch.full((1, k), -127, dtype=torch.int8)
    table = torch.arange(256, dtype=torch.float32)
    for code, zero in ((255, 0.0), (0, 255.0), (255, 255.0), (7, 0.0)):
        codes = torch.full((1, k), code, dtype=torch.uint8)
        zeros = torch.tensor([zero])
        want = torch.tensor([[-127.0 * k * (code - zero)]], dtype=torch.float64).float()
        assert torch.equal(int8_mm.product(q, table, True, codes, zeros), want)
        assert torch.equal(reference.exact_product(q, table, True, codes, zeros), want)
    assert products[0] == (24, 8, k)


def test_signs_too(monkeypatch: pytest.MonkeyPatch) -> None:
    qt = random_weight(parse("binary"), 21, 150)
    w = layouts.to_operands(qt, layouts.CANONICAL)
    bits, scales = PYTORCH.binary_quantize(torch.randn(3, 150))
    want = PYTORCH.binary_linear(bits, scales, w, None, torch.float32)
    monkeypatch.setattr(base, "_integers", lambda _: int8_mm.product)
    assert torch.equal(PYTORCH.binary_linear(bits, scales, w, None, torch.float32), want)


def test_a_gpu_multiplies_integers(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnCuda:
        device = torch.device("cuda")

    assert base._integers(OnCuda()) is int8_mm.product  # type: ignore[arg-type]
    assert base._integers(torch.zeros(1)) is reference.exact_product


@pytest.mark.parametrize("name", ("uint4_g32_a8", "nf4_a8t"))
def test_codes_of_the_kernels_are_unpacked_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    qt = random_weight(parse(name), 40, 128)
    x = torch.randn(3, 128)
    w = layouts.to_operands(qt, layouts.M16)
    monkeypatch.setattr(lowbit.packing, "unpack_codes", None)
    y = CUDA.linear(x, w, None)
    monkeypatch.undo()
    assert torch.equal(y, PYTORCH.linear(x, layouts.to_operands(qt, layouts.CANONICAL), None))
