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

from guarded import Guard

from fp8_operands import PAIRINGS, TYPES, assert_close, check_neighbours, operand
from fp8_values import E4M3, E5M2, nan_is_no_mistake, same
from lowbit.backends.triton.launch import kernels
from lowbit.fp8 import granularity as granularities
from lowbit.fp8 import matmul_triton, reference

# How tiles are loaded, and whether programs share K.
PATHS = (("pointers", False), ("tma", False), ("pointers", True), ("tma", True))


def run(
    a, b, scale_a, scale_b, bias=None, dtype=torch.float32, path=PATHS[0], **changes: int
) -> torch.Tensor:
    """With small tiles, so that a program has several."""
    g = granularities.infer(scale_a, *a.shape), granularities.infer(scale_b, *b.shape)
    c = matmul_triton.choose(a, b, *g, False)
    changes = {"block_m": 16, "block_n": 32, "band": 2, **changes, "tma": path[0] == "tma"}
    if path[1]:
        changes |= {"k_per_split": c.block_k, "splits": -(-a.shape[1] // c.block_k)}
    c = dataclasses.replace(c, **changes)
    return matmul_triton.scaled_mm(a, b, scale_a, scale_b, *g, bias, dtype, c)


def aligned(t: torch.Tensor) -> torch.Tensor:
    """t with rows at multiples of 16 bytes, as TMA wants them; NaN lies between them."""
    rows, k = t.shape
    wide = torch.full((rows, -(-k // 16) * 16), 0xFF, dtype=torch.uint8).view(t.dtype)
    wide[:, :k] = t
    return wide[:, :k]


@pytest.mark.parametrize("pairing", PAIRINGS, ids="-".join)
def test_every_pairing(pairing: tuple[str, str]) -> None:
    """Each granularity of each operand on each path."""
    m, n, k = 18, 33, 40 if "1x16" in pairing else 131
    names = list(granularities.GRANULARITIES)
    path = PATHS[sum(map(names.index, pairing)) % len(PATHS)]
    a, scale_a = operand(m, k, pairing[0])
    b, scale_b = operand(n, k, pairing[1], E5M2)
    y = run(aligned(a), aligned(b), scale_a, scale_b, path=path)
    assert_close(y, a, b, scale_a, scale_b)


@nan_is_no_mistake
@pytest.mark.parametrize(
    ("path", "pairing", "k"),
    [
        (PATHS[0], ("1x16", "row"), 24),
        (PATHS[1], ("row", "1x16"), 24),
        (PATHS[2], ("1x16", "1x128"), 40),
        (PATHS[3], ("mx", "mx"), 40),
        (PATHS[0], ("1x128", "row"), 131),
        (PATHS[2], ("row", "mx"), 40),
    ],
    ids=str,
)
def test_scales_end_where_they_end(
    path: tuple[str, bool], pairing: tuple[str, str], k: int
) -> None:
    """As on the CPU; and operands that end at a closed page are read to their end."""
    check_neighbours(lambda a, b, *s: run(aligned(a), aligned(b), *s, path=path), pairing, 3, k)
    operands = [*operand(3, k, pairing[0]), *operand(9, k, pairing[1], E5M2)]
    a, scale_a, b, scale_b = map(Guard().tensor, operands)
    path = ("pointers", path[1])
    want = run(*operands[::2], *operands[1::2], path=path)
    assert same(run(a, b, scale_a, scale_b, path=path), want)


def test_the_number_of_programs_and_the_loads_change_no_bit() -> None:
    a, scale_a = operand(40, 131, "1x128")
    b, scale_b = operand(60, 131, "128x128", E5M2)
    a, b = aligned(a), aligned(b)
    y = run(a, b, scale_a, scale_b, programs=100)
    for path, programs in ((PATHS[0], 1), (PATHS[1], 4)):
        assert torch.equal(run(a, b, scale_a, scale_b, path=path, programs=programs), y)


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
    split = run(a, b, scale_a, scale_b, bias, path=PATHS[2])
    torch.testing.assert_close(split, y + bias.float(), rtol=1e-5, atol=1e-5)
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
    a, b = aligned(a), aligned(b)
    scale_a[3] = torch.inf
    c = matmul_triton.choose(a, b, *g, True)
    c = dataclasses.replace(c, block_n=32, programs=2, tma=dtype == E5M2)
    bias = torch.randn(70)
    y = matmul_triton.scaled_mm(a, b, scale_a, scale_b, *g, bias, torch.float32, c)
    q, scale = matmul_triton.scaled_mm_quantized(a, b, scale_a, scale_b, *g, bias, dtype, c)
    want, want_scale = reference.quantize(y, dtype, granularities.find("1x16"))
    assert same(q, want)
    assert same(scale, want_scale)
    empty = matmul_triton.scaled_mm_quantized(a[:0], b, scale_a[:0], scale_b, *g, None, dtype, None)
    assert [t.shape for t in empty] == [(0, 70), (0, 5)]


# Granularities of a and b, whether b is E5M2 and y is quantized, M, architecture, whether rows are aligned for TMA.
CASES = [
    ("tensor", "tensor", False, 1, 90, True),
    ("row", "row", False, 4096, 90, True),
    ("row", "row", False, 4096, 90, False),
    ("row", "row", True, 4096, 90, False),
    ("1x128", "128x128", False, 4096, 90, True),
    ("1x128", "128x128", False, 64, 90, True),
    ("mx", "mx", False, 4096, 90, True),
    ("1x16", "1x16", False, 4096, 90, True),
    *(("1x128", "128x128", True, 4096, arch, True) for arch in (80, 90, 100, 120)),
]
# What SASS calls a product on FP8 tensor cores; on bf16 ones where there are none, or where groups are too short.
FP8_CORE = {80: r"\bHMMA\b", 90: r"\bQGMMA\b", 100: r"\bUTCQMMA\b", 120: r"\bQMMA\b"}
BF16_CORE = r"\bHG?MMA\b"
SHARED = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}  # bytes for a program
SMS = 132
_WORKER = """
import json, sys, torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.disasm import get_sass
from lowbit import triton_kernels as kernels
from lowbit.fp8 import granularity, matmul_triton
from lowbit.fp8.dtypes import E8M0

FP8 = {torch.float8_e4m3fn: "fp8e4nv", torch.float8_e5m2: "fp8e5"}
N = K = 4096
SMS = int(sys.argv[2])

def compiled(name_a, name_b, e5m2, m, arch, aligned):
    g = granularity.find(name_a), granularity.find(name_b)
    types = torch.float8_e4m3fn, torch.float8_e5m2 if e5m2 else torch.float8_e4m3fn
    group, capability = matmul_triton.group_of(*g), divmod(arch, 10)
    rows = (0, K if aligned else K + 1), (0, K)
    obstacle = kernels.configs.tma_obstacle(capability, group, *rows)
    c = kernels.configs.choose_fp8(
        m, N, K, group, capability=capability, sms=SMS, tma=obstacle is None,
        by_column=matmul_triton.by_column(g[1]), quantized=e5m2)
    native = kernels.configs.multiplies_fp8(capability, group)
    quantized = matmul_triton.requantization(types[1] if e5m2 else None)
    constants = matmul_triton.meaning(*types, *g) | quantized | {
        "E8M0_A": name_a == "mx", "E8M0_B": name_b == "mx", "HAS_BIAS": False,
        "COMPUTE": None if native else kernels.TYPES[torch.bfloat16], "TMA": c.tma, "SPLITS": c.splits,
        "BLOCK_M": c.block_m, "BLOCK_N": c.block_n, "BLOCK_K": c.block_k, "BAND": c.band}
    y = "*u8" if e5m2 else "*fp32" if c.splits > 1 else "*bf16"
    pointers = {"bias": "*bf16", "out": y, "out_scales": "*fp32"}
    descriptors = {}
    for side, dtype, name, rows in (("a", types[0], name_a, c.block_m), ("b", types[1], name_b, c.block_n)):
        stored = FP8[dtype] if native else "u8"
        if c.tma:
            descriptors[side] = f"tensordesc<{stored}[{rows}, {c.block_k}]>"
        else:
            pointers[side] = "*" + stored
        pointers["scale_" + side] = "*u8" if name == "mx" else "*fp32"
    kernel = kernels.fp8_mm.scaled_mm_kernel
    types = pointers | descriptors
    signature = {
        key: types.get(key, "constexpr" if key in constants else "i32") for key in kernel.arg_names}
    divisible = {*pointers, "n", "k", "b_row", "k_per_split"} | ({"a_row"} if aligned else set())
    attrs = {(i,): [["tt.divisibility", 16]] for i, key in enumerate(kernel.arg_names) if key in divisible}
    source = ASTSource(kernel, signature, constants, attrs)
    options = {"num_warps": c.warps, "num_stages": c.stages}
    return c, triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)

for case in json.loads(sys.argv[1]):
    c, made = compiled(*case)
    found = {"sass": get_sass(made.asm["cubin"]), "shared": made.metadata.shared, "config": vars(c)}
    print(json.dumps(found), flush=True)
"""
_made: dict[tuple, dict] = {}


def machine_code(case: tuple) -> dict:
    """SASS and shared memory, of all cases at once, from two processes without the interpreter."""
    if not _made:
        environment = {key: v for key, v in os.environ.items() if key != "TRITON_INTERPRET"}
        halves = CASES[::2], CASES[1::2]
        workers = [
            subprocess.Popen(
                [sys.executable, "-c", _WORKER, json.dumps(half), str(SMS)],
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
    made, arch = machine_code(case), case[4]
    assert re.search(BF16_CORE if "1x16" in case else FP8_CORE[arch], made["sass"])
    spills = re.findall(r"\b(?:STL|LDL)\b.*", made["sass"])
    assert not spills, spills[:3]
    assert made["shared"] <= SHARED[arch]


@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(map(str, c)))
def test_loads_are_pipelined(case: tuple) -> None:
    """TMA from sm_90 on where rows are aligned, else cp.async; all stages but one are filled before the loop."""
    made = machine_code(case)
    sass, config = made["sass"], made["config"]
    tma = len(re.findall(r"\bUTMALDG\b", sass))
    copies = len(re.findall(r"\bLDGSTS\b", sass))
    assert config["tma"] == (case[4] >= 90 and "1x16" not in case and case[5])
    if config["tma"]:
        assert tma >= 2 * config["stages"]
        assert copies == 0
    else:
        assert tma == 0
        assert copies >= 2 * config["stages"]


@pytest.mark.parametrize(
    "case", [c for c in CASES if c[4] == 90], ids=lambda c: "-".join(map(str, c))
)
def test_programs_fit_in_a_multiprocessor(case: tuple) -> None:
    """As many as the grid counts on, by shared memory and by registers."""
    made = machine_code(case)
    config = made["config"]
    assert config["programs"] * (made["shared"] + 1024) <= 228 << 10
    registers = 1 + max(map(int, re.findall(r"\bR(\d+)\b", made["sass"])))
    assert config["programs"] * config["warps"] * 32 * (-(-registers // 8) * 8) <= 64 << 10


def test_sums_leave_the_tensor_cores() -> None:
    """On Hopper, within 128 values of K: for each four products of 32 there are additions in fp32."""
    sass = machine_code(("row", "row", False, 4096, 90, True))["sass"]
    additions = len(re.findall(r"\bFADD\b|\bFFMA\b", sass))
    products = len(re.findall(r"\bQGMMA\b", sass))
    assert products
    # 128 x 128 sums of 256 threads are 64 for each.
    assert additions >= 64


def test_interpreted_groups_are_exact() -> None:
    """Integers, with a step in one group of each."""
    pairings = itertools.product(("mx", "1x16", "1x128"), ("row", "1x16", "128x128"))
    for i, pairing in enumerate(pairings):
        a, scale_a = operand(5, 136, pairing[0])
        b, scale_b = operand(9, 136, pairing[1])
        a, b = (torch.randint(-8, 9, t.shape).float().to(E4M3) for t in (a, b))
        if scale_a.dtype == torch.float32:
            scale_a = torch.ones_like(scale_a)
        else:
            scale_a.view(torch.uint8).fill_(127)
        y = run(aligned(a), aligned(b), scale_a, torch.ones_like(scale_b), path=PATHS[i % 4])
        assert torch.equal(y, a.float() @ b.float().T)


def choose(m: int, n: int, k: int, group: int = 0, arch: int = 90, **changes: bool):
    flags = {"tma": arch >= 90, "by_column": False, "quantized": False, **changes}
    return kernels().configs.choose_fp8(
        m, n, k, group, capability=divmod(arch, 10), sms=SMS, **flags
    )


def tiles(c, m: int, n: int) -> int:
    return -(-m // c.block_m) * -(-n // c.block_n)


def test_splits_cover_k_once_and_pay_for_their_sums() -> None:
    """For every shape: no part is empty, and sums that are written and read are at most half the bytes of b."""
    shapes = itertools.product((1, 16, 33, 64, 128, 4096), (16, 4096, 28672), (16, 700, 8192))
    for (m, n, k), group, arch in itertools.product(shapes, (0, 16, 32, 128), (80, 90, 120)):
        c = choose(m, n, k, group, arch)
        assert c.k_per_split % c.block_k == 0
        assert (c.splits - 1) * c.k_per_split < k <= c.splits * c.k_per_split
        if c.splits > 1:
            assert c.splits * m * n * (4 + 4) <= n * k / 2
            assert c.splits * tiles(c, m, n) <= c.programs * SMS  # in one round
        assert choose(m, n, k, group, arch, quantized=True).splits == 1


def test_few_rows_fill_the_device_and_many_do_not_split() -> None:
    for m, (n, k) in itertools.product((1, 8, 32), ((4096, 4096), (8192, 8192), (1024, 8192))):
        c = choose(m, n, k)
        assert c.splits * tiles(c, m, n) >= SMS * 0.9, (m, n, k, c)
    assert choose(4096, 4096, 4096).splits == 1
    assert choose(1, 28672, 8192).splits == 1  # tiles enough


def test_what_tma_needs() -> None:
    obstacle = kernels().configs.tma_obstacle
    good = (0x7000, 4096), (0x7010, 4112)
    assert obstacle((9, 0), 0, *good) is None
    assert obstacle((12, 0), 32, *good) is None
    assert obstacle((8, 9), 0, *good) == "TMA needs sm_90, this is sm_89"
    assert obstacle((9, 0), 16, *good) == "groups of 16 are decoded in registers"
    a = "rows of a do not begin at multiples of 16 bytes"
    assert obstacle((9, 0), 0, (0x7008, 4096), good[1]) == a
    assert obstacle((9, 0), 0, (0x7000, 4097), good[1]) == a
    assert obstacle((9, 0), 0, good[0], (0x7001, 4096)) == a.replace("of a", "of b")


def test_tensors_say_what_tma_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that are cut out of longer ones are fine, rows of another length or begin are not."""
    monkeypatch.setattr(matmul_triton, "capability", lambda device: (9, 0))
    wide = torch.zeros(4, 160).to(E4M3)
    g = granularities.find("row"), granularities.find("row")
    for a, tma in ((wide[:, 16:100], True), (wide[:, 10:], False), (wide[:, :70].clone(), False)):
        b = wide[:, : a.shape[1]]
        assert (matmul_triton.tma_obstacle(a, b, 0) is None) == tma
        assert matmul_triton.choose(a, b, *g, False).tma == tma
