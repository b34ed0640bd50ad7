"""Weights of any magnitude: as exact as weights of magnitude 1, or there is a warning or an error that says so."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

import lowbit
from lowbit.formats import parse
from lowbit.packing import is_blocks

N, K = 8, 128
MAGNITUDES = (1e-30, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e5, 1e30)
HESSIAN = {"hessian": torch.eye(K) + 0.1}
CASES: list[tuple[str, str | None, dict[str, Any]]] = [
    *((f.name, None, {}) for f in lowbit.formats().values() if not is_blocks(f)),
    *((f, None, {}) for f in ("int8_row", "nf4_g64_dq8", "int3_g64_o4", "int4_g32_fp32", "nf4_bf16", "uint4_fp32")),
    *((f, m, {}) for f in ("kmeans3_pr", "kmeans4") for m in ("lloyd", "kde", "distq", "multibit")),
    *((f, "gptq", HESSIAN) for f in ("int4_g32", "nf4", "kmeans3_pr", "int4_g32_fp32")),
    *((f, "nuuq", {}) for f in ("kmeans3", "kmeans3_fp32")),
    *((f, "hqq", {}) for f in ("uint4_zfloat", "uint4_zfloat_fp32")),
    *((f, "bitnet", {}) for f in ("binary", "ternary", "ternary_fp32")),
    ("ternary", "twn", {}),
    ("int4_row", "rtn", {"clipping": "mse"}),
    ("int8_row", "rtn", {"granularity": "tensor"}),
]  # fmt: skip


def error(format: str, method: str | None, options: dict[str, Any], magnitude: float) -> float:
    generator = torch.Generator().manual_seed(3)
    w = torch.randn(N, K, generator=generator, dtype=torch.float64) * magnitude
    made = lowbit.quantize(w, format, method, **options).dequantize().double()
    return float((made - w).norm() / w.norm())


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[0]} {c[1] or ''}".strip())
def test_the_error_does_not_depend_on_the_magnitude(
    case: tuple[str, str | None, dict[str, Any]],
) -> None:
    base = error(*case, 1.0)
    held, scale = [], parse(case[0]).scale2 or parse(case[0]).scale
    for magnitude in MAGNITUDES:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                relative = error(*case, magnitude)
            except ValueError as e:
                refused = str(e)
            else:
                refused = None
        if refused is not None:
            assert magnitude >= 1e5
            assert "use a format with fp32 or bf16 scales" in refused or "fp32 outliers" in refused
            continue
        told = [str(w.message) for w in caught]
        assert len(told) <= 1 + bool(parse(case[0]).outliers)
        if told:
            assert f"in {scale}, the scale dtype of format" in told[0]
            assert magnitude <= 1e-4
        else:
            held.append(magnitude)
            assert relative <= 1.1 * base + 1e-7
    # With a scale dtype that reaches far, everything holds.
    if scale in ("fp32", "bf16", None) and not parse(case[0]).outliers:
        assert held == list(MAGNITUDES)


def test_the_share_of_groups_is_said() -> None:
    w = torch.randn(8, 256)
    w[3] *= 1e-9
    w[5] = 0
    with pytest.warns(
        UserWarning, match=r"weight: 4 of 32 groups \(12.50%\) are so small .* 'int4_g64'"
    ):
        lowbit.quantize(w, "int4_g64")
    # Second-level scales reach as far as their groups differ.
    with pytest.warns(UserWarning, match=r"16 of 128 groups \(12.50%\) .* in e4m3, .* 'nvfp4'"):
        lowbit.quantize(w, "nvfp4")


def test_outliers_that_are_lost() -> None:
    w = torch.randn(4, 64)
    w[2] *= 1e-9
    with pytest.warns(
        UserWarning, match=r"4 of 16 outliers \(25.00%\) are so small that fp16 loses them"
    ):
        lowbit.quantize(w, "int3_g64_fp32_o4")
