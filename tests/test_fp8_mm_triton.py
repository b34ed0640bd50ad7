"""The Triton kernel of FP8 products: in the interpreter against float64, and compiled for GPUs that are not here."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import re
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

from fp8_operands import PAIRINGS, TYPES, assert_close, operand
from fp8_values import E4M3, E5M2, nan_is_no_mistake, same
from lowbit.backends.triton import kernels
from lowbit.fp8 import granularity as granularities
from lowbit.fp8 import matmul_triton, reference


def run(a, b, scale_a, scale_b, bias=None, dtype=torch.float32, **changes: int) -> torch.Tensor:
    """With small tiles, so that there are several."""
    g = granularities.infer(scale_a, *a.shape), granularities.infer(scale_b, *b.shape)
    c = kernels().configs.choose_fp8(len(a), len(b), matmul_triton.group_of(*g), False, False)
    c = dataclasses.replace(c, **{"block_m": 16, "block_n": 32, "band": 2, **changes})
    return matmul_triton.scaled_mm(a, b, scale_a, scale_b, *g, bias, dtype, c)


@pytest.mark.parametrize("pairing", PAIRINGS, ids="-".join)
def test_every_pairing(pairing: tuple[str, str]) -> None:
    m, n, k = 18, 33, 40 if "1x16" in pairing else 131
    a, scale_a = operand(m, k, pairing[0])
    b, scale_b = operand(n, k, pairing[1], E5M2)
    assert_close(run(a, b, scale_a, scale_b), a, b, scale_a, scale_b)


@nan_is_no_mistake
@pytest.mark.parametrize("types", TYPES, ids=str)
def test_every_code_and_type(types: tuple[torch.dtype, torch.dtype]) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(types[0])[:, None]
    ones, one = torch.ones(3, 1).to(types[1]), torch.tensor(1.0)
    want = codes.float().expand(-1, 3)
    for y in (run(codes, ones, one, one), run(ones, codes, one, one).T):
        torch.testing.assert_close(y, want, rtol=0, atol=0, equal_nan=True)


def test_epilogue_strides_and_chosen_tile() -> None:
    wide, scale_a = operand(5, 140, "1x128")
    b, scale_b = operand(33, 130, "128x128")
    a, bias = wide[:, 10:], torch.randn(33).half()
    scale_a = scale_a[:, :2].contiguous()
    y = run(a, b, scale_a, scale_b)
    assert_close(y, a, b, scale_a, scale_b)
    g = granularities.find("1x128"), granularities.find("128x128")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        got = matmul_triton.scaled_mm(a, b, scale_a, scale_b, *g, bias, dtype)
        torch.testing.assert_close(got, (y + bias.float()).to(dtype), rtol=1e-2, atol=1e-5)
    nan = scale_a.clone()
    nan[2, 1] = torch.nan
    assert bool(run(a, b, nan, scale_b)[2].isnan().all())
    empty = matmul_triton.scaled_mm(a[:0], b, scale_a[:0], scale_b, *g, None, torch.bfloat16)
    assert empty.shape == (0, 33)


@nan_is_no_mistake
@pytest.mark.parametrize("dtype", (E4M3, E5M2), ids=str)
def test_requantized(dtype: torch.dtype) -> None:
    """Bit for bit the quantized product, with a ragged group and an infinite row."""
    g = granularities.find("1x128"), granularities.find("row")
    a, scale_a = operand(19, 150, "1x128")
    b, scale_b = operand(70, 150, "row")
    scale_a[3] = torch.inf
    c = dataclasses.replace(kernels().configs.choose_fp8(19, 70, 128, False, False), block_n=32)
    bias = torch.randn(70)
    y = matmul_triton.scaled_mm(a, b, scale_a, scale_b, *g, bias, torch.float32, c)
    q, scale = matmul_triton.scaled_mm_quantized(a, b, scale_a, scale_b, *g, bias, dtype, c)
    want, want_scale = reference.quantize(y, dtype, granularities.find("1x16"))
    assert same(q, want)
    assert same(scale, want_scale)
    empty = matmul_triton.scaled_mm_quantized(a[:0], b, scale_a[:0], scale_b, *g, None, dtype, None)
    assert [t.shape for t in empty] == [(0, 70), (0, 5)]


# Granularities of a and b, whether b is E5M2 and y is quantized, M, architecture.
CASES = [
    ("tensor", "tensor", False, 1, 90),
    ("row", "row", False, 4096, 90),
    ("1x128", "1x128", True, 4096, 90),
    ("mx", "mx", False, 4096, 90),
    ("1x16", "1x16", False, 4096, 90),
    *(("1x128", "128x128", True, 4096, arch) for arch in (80, 90, 100, 120)),
]
# What SASS calls a product on FP8 tensor cores; on bf16 ones where there are none, or where groups are too short.
FP8_CORE = {80: r"\bHMMA\b", 90: r"\bQGMMA\b", 100: r"\bUTCQMMA\b", 120: r"\bQMMA\b"}
BF16_CORE = r"\bHG?MMA\b"
_WORKER = """
import json, sys, torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.disasm import get_sass
from lowbit import triton_kernels as kernels
from lowbit.fp8 import granularity, matmul_triton
from lowbit.fp8.dtypes import E8M0

FP8 = {torch.float8_e4m3fn: "*fp8e4nv", torch.float8_e5m2: "*fp8e5"}
N = K = 4096

def compiled(name_a, name_b, e5m2, m, arch):
    g = granularity.find(name_a), granularity.find(name_b)
    types = torch.float8_e4m3fn, torch.float8_e5m2 if e5m2 else torch.float8_e4m3fn
    group = matmul_triton.group_of(*g)
    native = arch >= 89 and not 0 < group < 32
    c = kernels.configs.choose_fp8(m, N, group, native, e5m2 or matmul_triton.by_column(g[1]))
    quantized = matmul_triton.requantization(types[1] if e5m2 else None)
    constants = matmul_triton.meaning(*types, *g) | quantized | {
        "E8M0_A": name_a == "mx", "E8M0_B": name_b == "mx", "HAS_BIAS": False,
        "COMPUTE": None if native else kernels.TYPES[torch.bfloat16],
        "BLOCK_M": c.block_m, "BLOCK_N": c.block_n, "BLOCK_K": c.block_k, "BAND": c.band}
    pointers = {"bias": "*bf16", "out": "*u8" if e5m2 else "*bf16", "out_scales": "*fp32"}
    for side, dtype, name in (("a", types[0], name_a), ("b", types[1], name_b)):
        pointers[side] = FP8[dtype] if native else "*u8"
        pointers["scale_" + side] = "*u8" if name == "mx" else "*fp32"
    kernel = kernels.fp8_mm.scaled_mm_kernel
    signature = {
        key: pointers.get(key, "constexpr" if key in constants else "i32") for key in kernel.arg_names}
    attrs = {(i,): [["tt.divisibility", 16]] for i, key in enumerate(kernel.arg_names)
             if key in pointers or key in ("n", "k", "a_row", "b_row")}
    source = ASTSource(kernel, signature, constants, attrs)
    options = {"num_warps": c.warps, "num_stages": c.stages}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)

for case in json.loads(sys.argv[1]):
    made = compiled(*case)
    print(json.dumps({"sass": get_sass(made.asm["cubin"]), "shared": made.metadata.shared}), flush=True)
"""
_made: dict[tuple, dict] = {}


def machine_code(case: tuple) -> dict:
    """SASS and shared memory, of all cases at once, from two processes without the interpreter."""
    if not _made:
        environment = {key: v for key, v in os.environ.items() if key != "TRITON_INTERPRET"}
        halves = CASES[::2], CASES[1::2]
        workers = [
            subprocess.Popen(
                [sys.executable, "-c", _WORKER, json.dumps(half)],
                env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )
            for half in halves
        ]  # fmt: skip
        for half, worker in zip(halves, workers, strict=True):
            out, err = worker.communicate()
            assert worker.returncode == 0, err[-3000:]
            _made.update(zip(half, map(json.loads, out.splitlines()), strict=True))
    return _made[case]


@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(map(str, c)))
def test_machine_code(case: tuple) -> None:
    """FP8 tensor cores multiply, nothing spills to local memory, and the tile fits in a multiprocessor."""
    made, arch = machine_code(case), case[-1]
    assert re.search(BF16_CORE if "1x16" in case else FP8_CORE[arch], made["sass"])
    spills = re.findall(r"\b(?:STL|LDL)\b.*", made["sass"])
    assert not spills, spills[:3]
    assert made["shared"] <= (99 << 10 if arch == 120 else 163 << 10)


def test_sums_leave_the_tensor_cores() -> None:
    """On Hopper, within 128 values of K: for each four products of 32 there are additions in fp32."""
    sass = machine_code(("row", "row", False, 4096, 90))["sass"]
    additions = len(re.findall(r"\bFADD\b|\bFFMA\b", sass))
    products = len(re.findall(r"\bQGMMA\b", sass))
    assert products
    # 128 x 128 sums of 256 threads are 64 for each.
    assert additions >= 64


def test_interpreted_groups_are_exact() -> None:
    """Integers, with a step in one group of each."""
    for pairing in itertools.product(("mx", "1x16", "1x128"), ("row", "1x16", "128x128")):
        a, scale_a = operand(5, 136, pairing[0])
        b, scale_b = operand(9, 136, pairing[1])
        a, b = (torch.randint(-8, 9, t.shape).float().to(E4M3) for t in (a, b))
        if scale_a.dtype == torch.float32:
            scale_a = torch.ones_like(scale_a)
        else:
            scale_a.view(torch.uint8).fill_(127)
        y = run(a, b, scale_a, torch.ones_like(scale_b))
        assert torch.equal(y, a.float() @ b.float().T)
