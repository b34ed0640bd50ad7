"""The Triton kernels compiled for GPUs that are not here: machine code is read for tensor cores and spills."""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys

import pytest

pytest.importorskip("triton")

EVERY = (
    *("int4", "nf4", "uint4", "kmeans3", "kmeans4_pr", "int8", "e4m3", "q4_1", "binary"),
    *("q2_k", "q3_k", "q4_k", "q6_k", "nvfp4", "mxfp4", "nf4_g64_dq8"),
)
"""Formats whose kernels differ in codec, zero, scope or planes."""
# (kernel, format, dtype, M, architecture)
Case = tuple[str, str, str, int, int]
CASES: list[Case] = [
    *(("linear", name, "bfloat16", 1, 90) for name in EVERY),
    *(("linear", name, "bfloat16", 512, 90) for name in EVERY[::3]),
    *(
        ("linear", name, "float16", 16, arch)
        for name in ("nf4", "uint4")
        for arch in (80, 100, 120)
    ),
    *(("dequantize", "nf4", "bfloat16", 1, arch) for arch in (80, 90, 100, 120)),
    *(
        ("dequantize", name, "float32", 1, 90)
        for name in ("uint4", "kmeans4_pr", "q4_1", "q2_k", "nvfp4", "nf4_g64_dq8")
    ),
    *(("add_splits", "nf4", "bfloat16", 1, arch) for arch in (80, 90, 100, 120)),
]
# What each architecture calls a tensor-core product in SASS.
TENSOR_CORE = {80: r"\bHMMA\b", 90: r"\bHG?MMA\b", 100: r"\bUTC\w*MMA\b|\bHMMA\b", 120: r"\bHMMA\b"}
# In a process of its own: in this one the interpreter may have taken the kernels.
_WORKER = """
import json, sys, torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.disasm import get_sass
from lowbit import layouts, triton_kernels as kernels
from lowbit.backends.triton import weights as backend
from lowbit.formats import parse

NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int32: "i32", torch.uint8: "u8",
         torch.int8: "i8"}

def source(op, name, x, m):
    f, n, k = parse(name), 4096, 4096
    specs = {key: spec[1] for key, spec in layouts.find("k16").specs(f, n, k).items()}
    c = kernels.configs.choose(m, n, k, f.group or k, 132)
    constants = backend.meaning(f) | {
        "HAS_BIAS": False, "APART": c.apart, "WHOLE": f.group is None, "COMPUTE": kernels.TYPES[x],
        "BLOCK_M": c.block_m, "BLOCK_N": c.block_n, "CHUNKS": c.chunks, "SPLITS": c.splits, "WIDENS": False,
        "x_column": 1, "GATHERS": False, "BLOCK": 256}
    if op == "dequantize":
        constants |= {"BLOCK_M": 32, "CHUNKS": kernels.configs.MOST_CHUNKS}
    tensors = {"x": x, "bias": x, "out": torch.float32 if op == "linear" and c.splits > 1 else x,
               "parts": torch.float32, "indices": torch.int32, "scale_map": torch.float32}
    tensors |= {key: specs.get(key, torch.int32) for key in ("codes", "scales", "zeros", "table", "scales2", "zeros2")}
    kernel = {"linear": kernels.linear.linear_kernel, "add_splits": kernels.linear.add_splits_kernel,
              "dequantize": kernels.dequantize.dequantize_kernel}[op]
    constants = {key: v for key, v in constants.items() if key in kernel.arg_names}
    signature = {
        key: "*" + NAMES[tensors[key]] if key in tensors else "constexpr" if key in constants else "i32"
        for key in kernel.arg_names}
    attrs = {(i,): [["tt.divisibility", 16]] for i, key in enumerate(kernel.arg_names)
             if key in tensors or key in ("n", "k", "x_row")}
    return ASTSource(kernel, signature, constants, attrs), c

for op, name, dtype, m, arch in json.loads(sys.argv[1]):
    src, c = source(op, name, getattr(torch, dtype), m)
    options = {"enable_fp_fusion": False}
    if op == "linear":
        options |= {"num_warps": c.warps, "num_stages": c.stages}
    made = triton.compile(src, target=GPUTarget("cuda", arch, 32), options=options)
    print(json.dumps({"sass": get_sass(made.asm["cubin"]), "shared": made.metadata.shared}), flush=True)
"""


@functools.cache
def compiled() -> dict[Case, dict]:
    """The SASS and shared memory of every case, from two processes."""
    halves = (CASES[::2], CASES[1::2])
    environment = {key: v for key, v in os.environ.items() if key != "TRITON_INTERPRET"}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", _WORKER, json.dumps(half)],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for half in halves
    ]  # fmt: skip
    found = {}
    for half, worker in zip(halves, workers, strict=True):
        out, err = worker.communicate()
        assert worker.returncode == 0, err[-3000:]
        found |= dict(zip(half, map(json.loads, out.splitlines()), strict=True))
    return found


@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(map(str, c)))
def test_machine_code(case: Case) -> None:
    """Tensor cores multiply, nothing spills to local memory, two programs fit in a multiprocessor of 164 KiB."""
    made, arch = compiled()[case], case[4]
    if case[0] == "linear":
        assert re.search(TENSOR_CORE[arch], made["sass"])
    spills = re.findall(r"\b(?:STL|LDL)\b.*", made["sass"])
    assert not spills, spills[:3]
    assert made["shared"] <= 82 << 10


def test_codebooks_are_looked_up_in_shared_memory() -> None:
    """A codebook adds no asynchronous copies to those of x, codes and scales, which integers need as well."""
    integers, codebook = (
        compiled()["linear", name, "bfloat16", 1, 90]["sass"] for name in ("int4", "nf4")
    )
    assert codebook.count("LDGSTS") == integers.count("LDGSTS") > 0
