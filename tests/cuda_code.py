"""What ptxas makes of every CUDA kernel for every architecture: registers, spills and instructions.

Compiling all of it takes a quarter of an hour, so what was found is kept in backends/cuda_code.json with a hash of the
sources that it was made from, and the tests read that. As a script (`make cuda-code`, which needs nvcc and Triton's
cuobjdump but no GPU): compiles what has changed and writes the file anew.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SOURCES = ROOT / "csrc" / "cuda"
RECORD = Path(__file__).parent / "backends" / "cuda_code.json"
BUILD = ROOT / "build" / "cuda_code"
# Units by architecture; those of wgmma and FP8 are for sm_90a alone.
PORTABLE = ("mma_bf16", "mma_f16", "dequantize")
UNITS = {
    **{a: PORTABLE for a in ("80", "90", "100", "120", "86")},
    "90a": ("wgmma_bf16", "wgmma_f16", "fp8"),
}
# They hold no code that runs on a device.
_HOST = {
    "bindings.cpp",
    "heuristics.h",
    "kernels.h",
    "launch.cuh",
    "memo.h",
    "probe.h",
    "tensor_map.cuh",
}
FIELDS = ("registers", "spilled", "instructions", "products", "core", "table_loads")
_PRODUCTS = ("HMMA", "HGMMA", "QGMMA")


def sources_hash() -> str:
    """Of all that kernels are compiled from, but for comments and white space."""
    digest = hashlib.sha256()
    for path in sorted(SOURCES.iterdir()):
        if path.name in _HOST:
            continue
        code = " ".join(re.sub(r"//[^\n]*", "", path.read_text()).split())
        digest.update(f"{path.name}\0{code}\0".encode())
    return digest.hexdigest()


def short_name(mangled: str) -> str:
    """`mma_kernel bf16 4 1 0` of a mangled name: the kernel and its template's arguments."""
    found = re.match(r"_ZN6lowbit4cuda\d+?(\D\w*?kernel)(I(.*?)E)?(?:E|v)", mangled)
    if found is None:
        raise ValueError(f"a kernel's name was expected, got {mangled}")
    arguments = mangled[found.end(1) :]
    said = []
    for token in re.finditer(
        r"(13__nv_bfloat16)|(6__half)|L(?:[ib]|NS0_\d+\w+?E)(\d+)E|(?<=[IE])(f)(?=[ENL])", arguments
    ):
        bf16, half, number, fp32 = token.groups()
        said.append("bf16" if bf16 else "f16" if half else "fp32" if fp32 else number)
    return " ".join([found[1], *said])


def parsed(said: str, sass: str) -> dict[str, list[int]]:
    """`FIELDS` of each kernel, from what ptxas says and the machine code."""
    found: dict[str, list[int]] = {}
    reports = re.findall(
        r"Compiling entry function '(\S+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers",
        said,
        re.DOTALL,
    )
    codes = dict(re.findall(r"Function : (\S+)\n(.*?)(?=\n\s*Function :|\Z)", sass, re.DOTALL))
    for name, stores, loads, registers in reports:
        operations = re.findall(
            r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", codes[name], re.MULTILINE
        )
        kinds = Counter(o.split(".")[0] for o in operations)
        places = [i for i, o in enumerate(operations) if o.split(".")[0] in _PRODUCTS]
        core = operations[places[0] : places[-1] + 1] if places else []
        spilled = int(stores) + int(loads) + kinds["STL"] + kinds["LDL"]
        products = sum(kinds[p] for p in _PRODUCTS)
        key = short_name(name)
        if key in found:
            raise ValueError(f"two kernels are called {key}: {name}")
        found[key] = [
            int(registers),
            spilled,
            len(operations) - kinds["NOP"],
            products,
            len(core),
            sum(o.startswith("LDS") for o in core),
        ]
    return found


def compile_unit(architecture: str, unit: str, hash: str) -> dict[str, list[int]]:
    """`parsed` of a unit, which is compiled unless that was done for these sources."""
    import triton

    folder = BUILD / hash[:16]
    folder.mkdir(parents=True, exist_ok=True)
    cubin, log = (folder / f"{unit}_{architecture}.{kind}" for kind in ("cubin", "log"))
    if not (cubin.exists() and log.exists()):
        code = f"arch=compute_{architecture},code=sm_{architecture}"
        command = ["nvcc", "-std=c++20", "-O3", "-cubin", "-gencode", code, "-Xptxas", "-v"]
        fresh = folder / "new.cubin"
        made = subprocess.run(
            [*command, "-o", fresh, SOURCES / f"{unit}.cu"],
            capture_output=True,
            text=True,
            check=False,
        )
        if made.returncode:
            raise RuntimeError(f"nvcc failed on {unit}.cu for sm_{architecture}: {made.stderr}")
        log.write_text(made.stderr)
        fresh.rename(cubin)
    if "serialized" in log.read_text():
        raise RuntimeError(f"ptxas serializes wgmma of {unit}.cu: {log}")
    tool = f"{Path(triton.__file__).parent}/backends/nvidia/bin/cuobjdump"
    sass = subprocess.run([tool, "-sass", cubin], capture_output=True, text=True, check=True)
    return parsed(log.read_text(), sass.stdout)


def nvcc_version() -> str:
    """Such as 13.0."""
    said = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"release (\d+\.\d+)", said)
    if found is None:
        raise RuntimeError(f"nvcc --version says no release: {said}")
    return found[1]


def written(found: dict[str, Any]) -> str:
    """JSON with a line for each unit."""
    head = {key: value for key, value in found.items() if key != "units"}
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in head.items()]
    units = [
        f"{json.dumps(unit)}: {json.dumps(kernels, separators=(',', ':'))}"
        for unit, kernels in found["units"].items()
    ]
    return "{\n" + ",\n".join(lines) + ',\n"units": {\n' + ",\n".join(units) + "\n}\n}\n"


def main() -> None:
    """Compiles and writes the record."""
    if shutil.which("nvcc") is None:
        sys.exit("nvcc not found: the CUDA kernels are not compiled")
    hash = sources_hash()
    units = {}
    for architecture, names in UNITS.items():
        for name in names:
            units[f"{architecture} {name}"] = compile_unit(architecture, name, hash)
            print(
                f"sm_{architecture} {name}: {len(units[f'{architecture} {name}'])} kernels",
                flush=True,
            )
    found = {"nvcc": nvcc_version(), "sources": hash, "fields": FIELDS, "units": units}
    fresh = RECORD.with_suffix(".new")
    fresh.write_text(written(found))
    fresh.rename(RECORD)


if __name__ == "__main__":
    main()
