"""The CUDA kernels without a GPU: their layout against its description, and the machine code of some of them for four
architectures; test_cuda_code.py has that of all, as it was recorded.

What their threads do with the layout is walked through in tests/cpp/test_cuda.cpp.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from lowbit import layouts, reference
from lowbit.backends import available
from lowbit.formats import FORMATS, Format
from lowbit.layouts import M16, m16
from weights import ALL_FORMATS, random_weight

ROOT = Path(__file__).parents[2]
FITTING = [format for format in ALL_FORMATS if M16 in layouts.fitting(format)]


@pytest.mark.parametrize("bits", (1, 2, 3, 4, 5, 6, 8))
def test_fragments_lie_as_described(bits: int) -> None:
    n, k = 21, 150
    codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8)
    words = m16.pack_fragments(codes, bits)
    assert words.numel() == m16.num_words(bits, n, k) == 2 * 3 * 32 * bits
    group = 4 if bits % 4 == 0 else 2 if bits % 2 == 0 else 1
    expected = [0] * words.numel()
    for row in range(n):
        for column in range(k):
            r, c = row % 16, column % 64
            lane = r % 8 * 4 + c // 2 % 4
            place = c // 16 * 8 + c // 8 % 2 * 4 + r // 8 * 2 + c % 2
            for b in range(bits):
                word, bit = divmod(place * bits + b, 32)
                at = (row // 16 * 3 + column // 64) * 32 * bits
                at += (word // group * 32 + lane) * group + word % group
                expected[at] |= (int(codes[row, column]) >> b & 1) << bit
    assert [w % 2**32 for w in words.tolist()] == expected
    assert torch.equal(m16.unpack_fragments(words, bits, n, k), codes)


@pytest.mark.parametrize("shape", ((16, 64), (1, 1), (300, 70)))
def test_fragments_are_invertible(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(m16, "_SLICE_CODES", 4096)  # several slices, the last one short
    for bits in (1, 3, 4, 6, 8):
        codes = torch.randint(0, 2**bits, shape, dtype=torch.uint8)
        packed = m16.pack_fragments(codes, bits)
        assert torch.equal(m16.unpack_fragments(packed, bits, *shape), codes)


@pytest.mark.parametrize("format", FITTING, ids=lambda f: f.name)
def test_operands_hold_the_weight(format: Format) -> None:
    n, k = 37, 150
    qt = random_weight(format, n, k)
    w = layouts.to_operands(qt, M16)
    specs = layouts.find(M16).specs(w.format, n, k)
    for key in ("codes", "scales", "zeros", "table"):
        t = getattr(w, key)
        assert (None if t is None else (tuple(t.shape), t.dtype)) == specs.get(key), key
    back = layouts.from_kernel(layouts.to_kernel(qt, M16))
    assert back.tensors.keys() == qt.tensors.keys()
    for key, t in qt.tensors.items():
        bits, expected = (u.reshape(-1).view(torch.uint8) for u in (back.tensors[key], t))
        assert torch.equal(bits, expected), key
    # What the kernels compute from the operands, centred integers and all.
    assert w.table is not None
    values = w.table[m16.unpack_fragments(w.codes, w.format.bits, n, k).long()]
    scales, zeros = (
        None if t is None else layouts.find(M16).to_rows(t, n) for t in (w.scales, w.zeros)
    )
    scales = None if scales is None else scales.float()
    assert torch.equal(reference.apply_scales(values, w.format, scales, zeros), qt.dequantize())


def test_what_does_not_fit_is_refused() -> None:
    qt = random_weight(FORMATS["kmeans4_pr"], 8, 64)
    with pytest.raises(ValueError, match="kmeans4_pr.*'m16'"):
        layouts.to_operands(qt, M16)
    assert M16 not in layouts.fitting(Format.lut(bits=2, group=24))


def test_the_cuda_kernels_run_unless_told_not_to(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lowbit._cuda")
    cuda, nf4 = torch.device("cuda"), FORMATS["nf4"]
    monkeypatch.delenv("LOWBIT_CUDA", raising=False)
    monkeypatch.setattr(available, "_CUDA_OBSTACLE", available._find_cuda_obstacle())
    assert available.kernel_layout(cuda, nf4) == M16
    assert available.kernel_layout(cuda, FORMATS["kmeans4_pr"]) == layouts.K16
    monkeypatch.setenv("LOWBIT_CUDA", "0")
    monkeypatch.setattr(available, "_CUDA_OBSTACLE", available._find_cuda_obstacle())
    assert available.kernel_layout(cuda, nf4) == layouts.K16
    assert available.cuda_obstacle() == "LOWBIT_CUDA=0 is set"


def test_the_extension_loads_without_a_gpu_and_chooses() -> None:
    _cuda = pytest.importorskip("lowbit._cuda")
    if not torch.cuda.is_available():
        assert _cuda.probe(0)[0]
    w = _cuda.Weight(8192, 8192, 64, 4, None, "fp32", None)
    family, tiles, splits, _, shared, depth, bulk = w.choose(1, 90, 90, 132)
    assert (family, tiles, splits, depth, bulk) == ("mma", 1, 1, 8, True)
    assert 2 * (shared + 1024) <= 228 << 10  # 256 blocks on 132 multiprocessors
    assert w.choose(1, 90, 80, 132)[-1] is False  # code of sm_80 has no warp that copies
    assert w.choose(256, 90, 90, 132)[0] == "wgmma"
    assert w.choose(4096, 90, 90, 132)[0] == w.choose(256, 80, 80, 108)[0] == "decode"
    assert _cuda.Weight(256, 8192, 64, 4, None, "fp32", None).choose(1, 90, 90, 132)[2] > 1
    with pytest.raises(
        ValueError, match="group must be 16, 32, a multiple of 64 or the whole row, got 48"
    ):
        _cuda.Weight(64, 4096, 48, 4, None, "fp32", None)
    with pytest.raises(ValueError, match="bits must be 1 to 6 or 8, got 7"):
        _cuda.Weight(64, 4096, 64, 7, None, "fp32", None)


# (kernel, architecture): what differs in decoding, in tiles and in the tensor cores' instructions.
_BF16, _F16 = "__nv_bfloat16", "__half"
KERNELS = {
    "80": [
        f"mma_kernel<{_BF16}, 4, 1, false>",
        f"mma_kernel<{_F16}, 3, 4, false>",
        f"mma_kernel<{_BF16}, 8, 8, true>",
        f"dequantize_kernel<8, {_F16}>",
    ],
    "90a": [
        *(f"mma_kernel<{_BF16}, {bits}, 1, false>" for bits in (1, 2, 4, 8)),
        f"mma_kernel<{_BF16}, 4, 2, true>",
        f"mma_kernel<{_F16}, 5, 8, true>",
        f"mma_kernel<{_BF16}, 4, 4, true>",
        *(f"wgmma_kernel<{_BF16}, {bits}, 128>" for bits in (1, 3, 4, 8)),
        f"wgmma_kernel<{_F16}, 4, 64>",
        "fp8_kernel<false, false, 128, BlockScales::kNone>",
        "fp8_kernel<false, true, 128, BlockScales::kRows>",
        "fp8_kernel<true, false, 64, BlockScales::kRowsAndColumns>",
        *(f"dequantize_kernel<{bits}, {_BF16}>" for bits in (1, 3, 4, 8)),
        "dequantize_kernel<8, float>",
        f"gather_kernel<{_F16}>",
    ],
    "100": [f"mma_kernel<{_BF16}, 4, 1, false>", f"mma_kernel<{_BF16}, 4, 8, false>"],
    "120": [f"mma_kernel<{_BF16}, 4, 1, true>"],
}
_MAP, _MAPS = (f"__grid_constant__ const {t}" for t in ("CUtensorMap", "Maps"))
PARAMETERS = {
    "mma_kernel": f"{_MAPS}, const Linear, const MmaRun",
    "wgmma_kernel": f"{_MAPS}, const Linear, const MmaRun",
    "fp8_kernel": f"{_MAP}, {_MAP}, const Fp8Product",
    "dequantize_kernel": "const Dequantize, const DequantizePlan",
    "gather_kernel": "const Dequantize",
}
# Two blocks of 288 threads, one of 544, one of 256 in 65536 registers, by tiles of x; three of 288 up to four bits
# where a warp of its own copies.
REGISTERS = {1: 112, 2: 120, 4: 255, 8: 255}
THREE_BLOCKS = 72


@functools.cache
def compiled(folder: Path) -> dict[str, tuple[str, str]]:
    """For each architecture what ptxas says and the SASS."""
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc not found: CUDA kernels are not compiled")
    nvidia = pytest.importorskip("triton").__path__[0] + "/backends/nvidia/bin"

    def build(architecture: str) -> tuple[str, str]:
        source, cubin = folder / f"{architecture}.cu", folder / f"{architecture}.cubin"
        header = ROOT / "csrc" / "cuda"
        lines = [f'#include "{header}/{name}.cuh"' for name in ("gemm_mma", "dequantize")]
        if architecture == "90a":
            lines += [f'#include "{header}/gemm_{name}.cuh"' for name in ("wgmma", "fp8")]
        lines.append("namespace lowbit::cuda {")
        for kernel in KERNELS[architecture]:
            name = kernel.split("<")[0]
            parameters = PARAMETERS[name]
            lines.append(f"template __global__ void {kernel}({parameters});")
        source.write_text("\n".join([*lines, "}"]))
        command = [
            "nvcc",
            "-std=c++20",
            "-O3",
            "-cubin",
            f"-arch=sm_{architecture}",
            "-Xptxas",
            "-v",
        ]
        made = subprocess.run(
            [*command, "-o", cubin, source], capture_output=True, text=True, check=False
        )
        assert made.returncode == 0, made.stderr[-3000:]
        sass = subprocess.run(
            [f"{nvidia}/cuobjdump", "-sass", cubin], capture_output=True, text=True, check=True
        )
        return made.stderr, sass.stdout

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(KERNELS, pool.map(build, KERNELS), strict=True))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cuda")


@pytest.mark.parametrize("architecture", KERNELS)
def test_machine_code(architecture: str, folder: Path) -> None:
    """No spills, no serialized wgmma, registers for the blocks that the design wants, 128-bit copies, tensor cores."""
    said, sass = compiled(folder)[architecture]
    assert "serialized" not in said, said
    reports = re.findall(
        r"Compiling entry function '(\S+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers",
        said,
        re.DOTALL,
    )
    assert len(reports) == len(KERNELS[architecture])
    for name, stores, loads, registers in reports:
        assert (stores, loads) == ("0", "0"), name
        tiles = re.search(r"\d+mma_kernel.*Li(\d+)ELi(\d+)E", name)
        # 384 threads start with 65536 / 384 registers each; dequantize_kernel wants 1024 on a multiprocessor.
        most = REGISTERS[int(tiles[2])] if tiles else 64 if "dequantize" in name else 168
        if tiles and architecture != "80" and int(tiles[1]) <= 4 and tiles[2] == "1":
            most = THREE_BLOCKS
        assert int(registers) <= most, (name, registers)
    for name, code in re.findall(r"Function : (\S+)\n(.*?)(?=\n\s*Function :|\Z)", sass, re.DOTALL):
        assert not re.search(r"\b(?:STL|LDL)\b", code), name
        # A pair of registers begins at an even one; ptxas 13.0 breaks that for cp.async with a constant cache policy.
        assert not re.search(r"desc\[UR\d*[13579]\]", code), name
        if "wgmma" in name or "fp8" in name:
            assert re.search(r"\bHGMMA\b" if "wgmma" in name else r"\bQGMMA\b", code), name
            assert re.search(r"\bUTMALDG\b", code), name
        elif "dequantize" in name:
            assert re.search(r"STG\.\S*128", code), name
            if re.search(r"kernelILi[48]E", name):
                assert re.search(r"LDG\.E\.128 ", code), name
        elif "gather" not in name:
            assert re.search(r"\bHMMA\b", code), name
            tma = architecture != "80" and re.search(r"Li\d+ELi[12]ELb", name)
            assert re.search(r"\bUTMALDG\b" if tma else r"LDGSTS\.\S*128", code), name
