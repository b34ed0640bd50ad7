"""The FP8 quantization kernels compiled for GPUs that are not here: all of them compile, and nothing spills."""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys

import pytest

pytest.importorskip("triton")

# kernel, dtype of x or of the result, granularity, scale dtype, transposed, stochastic, architecture
CASES = [
    ("quantize", "bf16", "tensor", "fp32", True, False, 90),
    ("quantize", "bf16", "row", "fp32", False, True, 90),
    ("quantize", "fp32", "1x16", "bf16", True, True, 100),
    ("quantize", "bf16", "128x128", "fp32", False, False, 90),
    ("quantize", "fp16", "mx", "e8m0", False, False, 80),
    ("quantize", "bf16", "1x128", "fp32", True, False, 120),
    ("maxima", "bf16", "1x16", "fp32", False, False, 90),
    ("dequantize", "bf16", "mx", "e8m0", False, False, 90),
    ("dequantize", "fp16", "tensor", "bf16", False, False, 80),
    ("cast", "bf16", "tensor", "fp32", False, False, 90),
]
# In a process of its own: in this one the interpreter may have taken the kernels.
_WORKER = """
import json, sys, torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.disasm import get_sass
from lowbit.backends.triton import fp8 as backend
from lowbit.float8 import E8M0, FLOAT8, find_granularity

kernels = backend.kernels().fp8_quantize
SCALES = {"fp32": torch.float32, "bf16": torch.bfloat16, "e8m0": E8M0}
POINTERS = {"fp32": "*fp32", "bf16": "*i16", "e8m0": "*u8"}

for name, dtype, granularity, scale, transposed, stochastic, arch in json.loads(sys.argv[1]):
    f, g, k = FLOAT8[torch.float8_e4m3fn], find_granularity(granularity), 4096
    tile = backend._tile(g, k, transposed)
    given = g.rows is None
    number = backend._scale_bytes(torch.empty(1, dtype=SCALES[scale]))[0]
    constants = tile.constants | {
        "MANTISSA": f.mantissa, "BIAS": f.bias, "MAX": f.max, "EMAX": f.emax, "TOP": f.max_code,
        "MAX_CODE": f.max_code, "SCALE": number, "ONE_COLUMN": g.columns is None, "HAS_MAXIMA": given,
        "STOCHASTIC": stochastic, "TRANSPOSED": transposed, "BLOCK": 4096, "x_column": 1}
    loaded = "*bf16" if scale == "bf16" else POINTERS[scale]  # dequantize reads scales as they are
    pointers = {"x": "*" + dtype, "maxima": "*i32", "scales": POINTERS[scale], "q": "*u8", "q_t": "*u8", "out": "*i32"}
    if name == "dequantize":
        pointers |= {"out": "*" + dtype, "scales": loaded}
    kernel = getattr(kernels, name + "_kernel")
    constants = {key: v for key, v in constants.items() if key in kernel.arg_names}
    signature = {key: pointers.get(key, "constexpr" if key in constants else "i32") for key in kernel.arg_names}
    attrs = {(i,): [["tt.divisibility", 16]] for i, key in enumerate(kernel.arg_names)
             if key in pointers or key in ("rows", "k", "x_row", "size")}
    options = {"num_warps": tile.warps, "enable_fp_fusion": False}
    made = triton.compile(ASTSource(kernel, signature, constants, attrs), target=GPUTarget("cuda", arch, 32),
                          options=options)
    found = {"ptx": made.asm["ptx"], "sass": get_sass(made.asm["cubin"]), "shared": made.metadata.shared}
    print(json.dumps(found), flush=True)
"""


@functools.cache
def compiled() -> dict[tuple, dict]:
    """PTX, SASS and shared memory of every case."""
    environment = {key: v for key, v in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", _WORKER, json.dumps(CASES)],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(zip(CASES, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(map(str, c)))
def test_machine_code(case: tuple) -> None:
    """Nothing spills to local memory, and two programs fit in a multiprocessor of 164 KiB."""
    made = compiled()[case]
    spills = re.findall(r"\b(?:STL|LDL)\b.*", made["sass"])
    assert not spills, spills[:3]
    assert made["shared"] <= 82 << 10


def test_loads_are_vectors() -> None:
    """A thread reads 16 bytes of x at a time where rows are aligned."""
    for case in CASES:
        if case[0] in ("quantize", "maxima", "cast"):
            assert re.search(r"\bLDG\.E\.128\b", compiled()[case]["sass"]), case


def test_arithmetic_is_that_of_the_reference() -> None:
    """Divisions round to nearest, subnormal numbers stay, no product is fused with a sum."""
    for case in CASES:
        ptx = compiled()[case]["ptx"]
        divisions = set(re.findall(r"\bdiv\S*f32\b", ptx))
        assert divisions == ({"div.rn.f32"} if case[0] == "quantize" else set()), case
        assert not re.search(r"\.ftz\b|\bfma\.", ptx), case
