"""Scales of two levels as round to nearest fits them: against plain numpy, and beside scales in fp32."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from lowbit.formats import INTEGER_SCALES, parse
from lowbit.methods import quantize

NAMES = (
    "q6_k", "q4_k", "q2_k", "q3_k", "iq4_xs", "nf4_g32_int8", "int4_g16_int8s64fp32", "uint4_g32_int8s96bf16",
    "q4_1_g16_int6s64", "nf4_g16_uint4s64",
)  # fmt: skip
K = 512 + 80


def normal(n: int, k: int) -> torch.Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(0)) * 0.02


@pytest.mark.parametrize("name", NAMES)
def test_codes_are_the_nearest_to_scales_in_fp32(name: str):
    """A super-block's factor is its largest scale over the largest integer, rounded to its dtype; integers are
    quotients, rounded.
    """
    format = parse(name)
    low, top = INTEGER_SCALES[format.scale]
    weight = normal(5, K)
    weight[2, 32:64] = 0
    weight[3, :256] = 0
    plain = dataclasses.replace(format, name="x", scale="fp32", scale2=None, scale2_group=None)
    single, qt = quantize(weight, plain), quantize(weight, format).validate()
    groups = format.num_groups(K)
    super_of = np.arange(groups) * format.group // (format.scale2_group or K)
    for key in ("scales", "zeros"):
        second = qt.tensors.get(key + "2")
        if second is None:
            continue
        wanted = single.tensors[key].numpy()
        sign = -1 if key == "zeros" and low == 0 else 1
        for s in range(format.num_supers(K)):
            mine = np.abs(wanted[:, super_of == s]).max(1)
            rounded = torch.from_numpy(mine / np.float32(top)).to(second.dtype)
            assert torch.equal(second[:, s], sign * rounded)
        wide = second.float().numpy()[:, super_of]
        ratio = np.divide(wanted, wide, out=np.zeros_like(wanted), where=wide != 0)
        codes = np.clip(np.rint(ratio), max(low, -top), top)
        if key == "scales":
            codes[(wanted > 0) & (codes == 0)] = 1
        np.testing.assert_array_equal(qt.tensors[key].numpy(), codes)


@pytest.mark.parametrize("name", ["q2_k", "q4_k"])
def test_minima_of_a_super_block_have_one_sign(name: str):
    """A group without negative weights begins at 0."""
    weight = normal(4, 256)
    group = parse(name).group
    weight[:, :group] = weight[:, :group].abs() + 1
    qt = quantize(weight, name).validate()
    assert torch.equal(qt.zeros[:, 0], torch.zeros(4, dtype=torch.int8))
    assert (qt.zeros[:, 1:] > 0).all()
    assert (qt.zeros2 < 0).all()
    made = qt.dequantize()[:, :group]
    assert (made - weight[:, :group]).abs().max() <= made.max() / (2**qt.format.bits - 1)


@pytest.mark.parametrize(
    ("name", "most"),
    [
        ("q4_k_int8s256", 1.05),
        ("nf4_g32_int8", 1.02),
        ("q6_k", 1.05),
        ("q4_k", 1.15),
        ("q2_k", 1.15),
    ],
)
def test_few_bits_of_scale_cost_little(name: str, most: float):
    weight = normal(32, 1024)
    plain = dataclasses.replace(parse(name), name="x", scale="fp32", scale2=None, scale2_group=None)

    def error(format) -> float:
        return float((quantize(weight, format).dequantize() - weight).square().sum())

    assert error(parse(name)) <= most * error(plain)


def test_gptq_fits_them_before_it_sweeps():
    weight, x = normal(16, 256), torch.randn(512, 256, generator=torch.Generator().manual_seed(1))
    hessian = (x.T @ x).double()
    qt = quantize(weight, "q4_k", "gptq", hessian=hessian)
    start = quantize(weight, "q4_k")
    for key in ("scales", "scales2", "zeros", "zeros2"):
        assert torch.equal(qt.tensors[key], start.tensors[key])

    def product_error(made) -> float:
        return float(((made.dequantize() - weight) @ x.T).square().sum())

    assert product_error(qt) < product_error(start)
