"""What the layouts of kernels hold: no more than files do, and all of it."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from lowbit import _C, layouts, packing, reference
from lowbit.formats import parse
from lowbit.layouts import CANONICAL, K16, M16, N16
from lowbit.nn import QuantLinear
from lowbit.weights.quantized import QuantTensor
from weights import random_weight

gguf = pytest.importorskip("gguf")

# Bits of a weight in a file of bitsandbytes or compressed-tensors: codes, scales, and 1 / 256 of a fp32 factor a scale.
FILE_BITS = {
    "nf4_g64_dq8": 4 + (8 + 32 / 256) / 64,
    "kmeans4_g32_dq8": 4 + (8 + 32 / 256) / 32,
    "int4_g16_dq8": 4 + (8 + 32 / 256) / 16,
    "nvfp4": 4 + 8 / 16,
    "mxfp4": 4 + 8 / 32,
}
GGUF_TYPES = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS")
DQ8 = ("nf4_g64_dq8", "kmeans2_g16_dq8", "int4_g32_dq8", "nf4_row_dq8", "affine3")


def file_bits(name: str) -> float:
    if name in FILE_BITS:
        return FILE_BITS[name]
    weights, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
    return 8 * size / weights


@pytest.mark.parametrize(
    ("name", "layout"),
    [*itertools.product((*FILE_BITS, *GGUF_TYPES), (N16, K16)), ("TQ1_0", N16)],
)
def test_memory_is_that_of_the_file(name: str, layout: str) -> None:
    """At most 2 % more, tables included; 3 % where "k16" holds 6 bits in a byte."""
    n, k = 1024, 1024
    weight = layouts.to_kernel(random_weight(parse(name.lower()), n, k), layout)
    bits = 8 * weight.nbytes / (n * k)
    bytes_of_six_bits = layout == K16 and name in ("Q4_K", "Q5_K")
    assert file_bits(name) <= bits <= (1.03 if bytes_of_six_bits else 1.02) * file_bits(name)
    assert not weight.second


@pytest.mark.parametrize("k", [40, 256, 600])
def test_trits_lie_as_documented(k: int) -> None:
    """csrc/core/trits.h, computed code by code from the units of 2 bits."""
    n = 70
    codes = torch.randint(0, 3, (n, k), dtype=torch.uint8)
    packed = packing.pack_codes(codes, parse("ternary_trits")).numpy()
    trits = torch.from_numpy(_C.prepack(packed, n, k, 2, 3)).int()
    words = torch.from_numpy(
        _C.prepack(packing.pack_codes(codes, parse("ternary")).numpy(), n, k, 2)
    ).int()
    chunks, spans = -(-k // 32), -(-k // 32) // 8
    words, trits = words.view(2, chunks, 4, 2, 64), trits.view(2, -1)
    assert torch.equal(trits[:, spans * 4 * 13 * 64 :], words[:, spans * 8 :].flatten(1))
    for block, span, vector in itertools.product(range(2), range(spans), range(4)):
        found = trits[block].narrow(0, (span * 4 + vector) * 13 * 64, 13 * 64).view(13, 64)
        units = words[block, span * 8 : span * 8 + 8, vector].reshape(16, 64)
        fields = [units >> 2 * field & 3 for field in range(4)]
        for i, t in itertools.product(range(3), range(4)):
            f0, f1, f2, f3 = (f[5 * i + t] for f in fields)
            fifth = fields[t][5 * i + 4]
            assert torch.equal(found[4 * i + t], 85 * fifth + 27 * (-f1 % 3) + 9 * f0 + 3 * f3 + f2)
        assert torch.equal(found[12], units[15])
    assert np.array_equal(_C.unprepack(trits.flatten().byte().numpy(), n, k, 2, 3), packed)


def test_trits_are_of_two_bits() -> None:
    with pytest.raises(ValueError, match="trits need bits 2, got 3"):
        _C.Weight(n=1, k=1, bits=3, group=1, trits=True)


def test_a_layer_holds_no_more() -> None:
    qt = random_weight(parse("nf4_g64_dq8"), 256, 512)
    layer = QuantLinear.from_quant_tensor(qt)
    held = sum(t.nbytes for _, t in layer.named_buffers() if t is not None)
    assert qt.nbytes <= held <= 1.02 * qt.nbytes


def double_quantized(name: str, n: int, k: int) -> QuantTensor:
    format = parse("uint3_g7_dq8") if name == "affine3" else parse(name)
    return random_weight(format, n, k, seed=n)


@pytest.mark.parametrize("layout", [CANONICAL, N16, K16, M16])
@pytest.mark.parametrize("name", DQ8)
def test_double_quantized_scales_come_back(name: str, layout: str) -> None:
    """Bit for bit, for weights whose rows end within the 256 scales of a factor."""
    for n, k in ((1, 1), (70, 700), (130, 257)):
        qt = double_quantized(name, n, k)
        if not layouts.find(layout).fits(qt.format):
            continue
        weight = layouts.to_kernel(qt, layout)
        assert bool(weight.second) == (layout == M16)
        back = layouts.from_kernel(weight)
        assert all(torch.equal(back.tensors[key], t) for key, t in qt.tensors.items())


@pytest.mark.parametrize("layout", [CANONICAL, N16, K16, M16])
@pytest.mark.parametrize("name", DQ8)
def test_terms_are_those_of_the_reference(name: str, layout: str) -> None:
    """The fp32 scale of each group, scale by scale in a loop that shares no code with it."""
    qt = double_quantized(name, 70, 700)
    if not layouts.find(layout).fits(qt.format):
        pytest.skip(f"{layout} does not hold {name}")
    scales = layouts.group_terms(layouts.to_operands(qt, layout))[0]
    assert torch.equal(scales, reference.effective_scales(qt))
    values, offset = reference.dynamic_map(), qt.scales2_offset
    codes = qt.scales.flatten().tolist()
    for i in range(0, len(codes), 37):
        expected = values[codes[i]] * qt.scales2[i // 256] + offset
        assert scales.flatten()[i] == expected
    if layout == CANONICAL:
        rows = torch.tensor([3, *range(69, -1, -1)])  # those on the border of two factors too
        some = layouts.group_terms(layouts.to_operands(qt, layout), rows)[0]
        assert torch.equal(some, scales[rows])
