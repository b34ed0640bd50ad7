"""Random weights of any format for tests: every code, scale and zero that the format allows; what a product may err."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from lowbit import packing, reference
from lowbit.formats import FORMATS, INTEGER_SCALES, Format, parse
from lowbit.weights.quantized import QuantTensor, factor_shapes, tensor_specs

# Formats that no built-in covers: odd groups, short tables, every table scope with groups, each scale dtype.
EXTRA_FORMATS = (
    Format.lut(bits=3, table=(1.0, 2.5, 3.0, -5.0, 0.1), group=20, name="lut3_five_entries"),
    Format(name="base5_g20", codec="lut", bits=3, group=20, table=(-5.0, -2.0, 0.0, 1.0, 4.0), packing="base5"),
    Format(name="base6_row", codec="lut", bits=3, table=(-9.0, -4.0, -1.0, 1.0, 4.0, 9.0), packing="base6"),
    Format.lut(bits=4, group=32, table_scope="row", name="row_tables_g32"),
    Format.lut(bits=4, group=32, table_scope="group", name="group_tables_g32"),
    Format.lut(bits=3, group=20, table_scope="group", scale=None, name="group_tables_no_scale"),
    Format.lut(bits=2, group=None, scale=None, name="one_table_no_scale"),
    Format.lut(bits=6, group=1, scale="bf16", name="kmeans6_g1"),
    *(
        Format(name=f"affine{b}_{zero}_{scale}_g{g}", codec="affine", bits=b, zero=zero, scale=scale, group=g)
        for b, zero, scale, g in (
            (4, None, "e8m0", 32),
            (5, "int", "e4m3", 64),
            (3, "int", "dq8", 7),
            (8, "float", "fp32", 5),
            (6, "min", "bf16", 64),
            (2, "float", "bf16", None),
        )
    ),
    Format(name="e4m3_g64_bf16", codec="e4m3", bits=8, group=64, scale="bf16"),
    Format(name="e5m2_g16_codes", codec="e5m2", bits=8, group=16, scale="int8", scale2="fp32"),
    Format(name="int8_g16_codes", codec="affine", bits=8, group=16, zero="int", scale="int8", scale2="bf16",
           scale2_group=48),
    Format(name="affine3_g7_int6", codec="affine", bits=3, group=7, zero="min", scale="int6", scale2="fp32"),
    parse("nf4_g32_dq8"),
    parse("kmeans2_g16_dq8"),
    Format.lut(bits=4, group=16, name="lut4_g16", table=tuple(0.1 * i * abs(i) - 3 for i in range(-6, 10))),
)  # fmt: skip
ALL_FORMATS = (*FORMATS.values(), *EXTRA_FORMATS)


def random_weight(format: Format, n: int, k: int, seed: int = 0) -> QuantTensor:
    """A weight whose codes, scales, zeros and tables are random and finite."""
    g = torch.Generator().manual_seed(seed)
    tensors = {}
    if format.factor_format is not None:
        for factor, shape in factor_shapes(format, n, k).items():
            made = random_weight(format.factor_format, *shape, seed=seed + 1)
            tensors |= {f"{factor}_{name}": t for name, t in made.tensors.items()}
    for name, (shape, dtype) in tensor_specs(format, n, k).items():
        if name in tensors:
            continue
        if name == "codes":
            tensors[name] = packing.pack_codes(random_codes(format, n, k, g), format)
        elif name == "zeros" and dtype == torch.uint8:
            tensors[name] = torch.randint(0, 2**format.bits, shape, generator=g, dtype=dtype)
        elif format.scale == "e8m0" and name == "scales":
            tensors[name] = torch.randint(110, 140, shape, generator=g, dtype=dtype)
        elif format.integer_scales and dtype == torch.int8:
            low, high = INTEGER_SCALES["int8" if format.scale == "int7" else format.scale]
            tensors[name] = torch.randint(low, high + 1, shape, generator=g, dtype=dtype)
        elif name == "outlier_columns":
            scores = torch.rand(n, k, generator=g)
            tensors[name] = scores.argsort(1)[:, : shape[1]].sort(1).values.to(dtype)
        elif dtype in (torch.uint8, torch.int8):
            low = torch.iinfo(dtype).min
            tensors[name] = torch.randint(low, low + 256, shape, generator=g, dtype=dtype)
        elif format.scale2 is not None and name in ("scales2", "zeros2"):
            tensors[name] = ((torch.rand(shape, generator=g) + 0.05) / 128).to(dtype)
        elif name in ("zeros", "table", "outlier_values"):
            tensors[name] = (torch.randn(shape, generator=g) * 3).to(dtype)
        else:
            tensors[name] = (torch.rand(shape, generator=g) + 0.05).to(dtype)
    return QuantTensor(format, (n, k), tensors).validate()


def random_codes(format: Format, n: int, k: int, g: torch.Generator) -> torch.Tensor:
    """Codes that stand for finite values."""
    if packing.is_blocks(format):
        codes = torch.randint(0, 256, (n, format.num_vectors(k), format.bits // 8), generator=g).to(
            torch.uint8
        )
        # Below the largest exponent of fp16: the scale is finite.
        codes[..., 55 if format.codec == "iq1_m" else 1] &= 0x3F
        return codes
    # Codes of structured formats stand for several weights, and may have more than 8 bits.
    dtype = torch.uint8 if format.bits <= 8 else torch.int64
    shape = (n, format.num_vectors(k))
    codes = torch.randint(0, format.num_codes, shape, generator=g).to(dtype)
    if format.codec in ("e4m3", "e5m2"):
        finite = torch.tensor(format.values()).isfinite()[codes.long()]
        codes = torch.where(finite, codes, torch.tensor(1, dtype=torch.uint8))
    return codes


def assert_close(y, exact, x, qt, weight) -> None:
    """Each of K products and the sums of a group are rounded once to fp32, and y once to its dtype.

    With a zero point the kernels sum x * code and x apart, so the bound counts |code| + |zero|, not their
    difference. 2 covers the second rounding of each term (scale, then sum). Beyond the dtype's range y is infinite.
    """
    magnitude = weight.abs()
    if qt.zeros is not None:
        codes = reference.code_values(qt.unpack(), qt.format, qt.table)
        scales, zeros = reference.effective_scales(qt).abs(), reference.effective_zeros(qt).abs()
        shift = zeros if qt.format.zero == "min" else zeros * scales
        group = reference.group_index(qt.format, codes.shape[1], codes.device)
        magnitude = (codes * scales[:, group] + shift[:, group]).double()
    info = torch.finfo(y.dtype)
    bound = 2 * (x.shape[1] + 2) * 2**-24 * F.linear(x.double().abs(), magnitude) + info.tiny
    bound = bound + exact.abs() * info.eps
    infinite = y.isinf() & (exact.abs() + bound > info.max) & (y.sign() == exact.sign())
    error = (y.double() - exact).abs()
    bad = ~(infinite | (error <= bound))
    assert not bool(bad.any()), (
        f"errors {error[bad][:5]} above {bound[bad][:5]} at {bad.nonzero()[:5]}"
    )
