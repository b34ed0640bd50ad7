"""The machine code of every CUDA kernel for every architecture, as `make cuda-code` recorded it: no spills, registers
for the blocks that the heuristics count on, all products, and instructions within a budget. Nothing is compiled here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import NamedTuple

import cuda_code
import pytest

RECORD = json.loads(cuda_code.RECORD.read_text())
_REGISTERS, _WARP, _UNIT = (
    65536,
    32,
    256,
)  # of a multiprocessor; threads; registers of a warp come in units
ARCHITECTURES = ("80", "86", "90", "100", "120")


class Code(NamedTuple):
    """What `cuda_code.FIELDS` say of a kernel."""

    registers: int
    spilled: int
    instructions: int
    products: int
    core: int  # instructions from the first product to the last one
    table_loads: int

    def resident(self, threads: int) -> int:
        """Blocks of so many threads that the registers of a multiprocessor hold."""
        of_warp = -(-self.registers * _WARP // _UNIT) * _UNIT
        return _REGISTERS // of_warp // (threads // _WARP)


def kernels(name: str) -> Iterator[tuple[str, list[str], Code]]:
    """Architecture, template's arguments and code of all kernels of a name."""
    for unit, found in RECORD["units"].items():
        for key, numbers in found.items():
            kernel, *arguments = key.split()
            if kernel == name:
                yield unit.split()[0], arguments, Code(*numbers)


def test_the_record_is_of_these_sources() -> None:
    assert RECORD["sources"] == cuda_code.sources_hash(), "csrc/cuda has changed: make cuda-code"
    assert RECORD["fields"] == list(Code._fields)


def test_every_kernel_is_there() -> None:
    counts = {unit: len(found) for unit, found in RECORD["units"].items()}
    portable = {"mma_bf16": 56, "mma_f16": 56, "dequantize": 27}
    expected = {f"{a} {unit}": n for a in ARCHITECTURES for unit, n in portable.items()}
    expected |= {"90a wgmma_bf16": 14, "90a wgmma_f16": 14, "90a fp8": 32}
    assert counts == expected


def test_nothing_spills() -> None:
    """But for a few registers of one kernel on sm_100, whose 17 warps have 96 each."""
    spilling = {
        f"sm_{unit} {name}": Code(*numbers).spilled
        for unit, found in RECORD["units"].items()
        for name, numbers in found.items()
        if Code(*numbers).spilled
    }
    assert spilling.keys() <= SPILLS.keys()
    assert all(spilled <= SPILLS[name] for name, spilled in spilling.items()), spilling


def test_as_many_blocks_are_resident_as_the_heuristics_count_on() -> None:
    """tile.h: `threads` and `resident`."""
    for architecture, (_, bits, tiles, fine), code in kernels("mma_kernel"):
        bulk = architecture not in ("80", "86") and int(tiles) <= 2
        warps = {"1": 8, "2": 16, "4": 8, "8": 8}[tiles] + bulk
        wanted = 1 if tiles != "1" else 3 if bulk and int(bits) <= 4 else 2
        if architecture in ("100", "120") and (bits, tiles, fine) == ("1", "1", "1"):
            wanted = 2
        assert code.resident(warps * _WARP) >= wanted, (architecture, bits, tiles, code)
    for _, arguments, code in kernels("dequantize_kernel"):
        assert code.resident(128) >= 8, (arguments, code)
    for name in ("wgmma_kernel", "fp8_kernel"):
        for _, arguments, code in kernels(name):
            assert code.resident(384) == 1, (arguments, code)
            # What a block starts with; setmaxnreg then takes registers from the copying warpgroup.
            assert code.registers <= 168, (arguments, code)


# Instructions between the first product and the last one for each product, in two versions of the loop, with integer
# zeros and without: a tenth more than ptxas 13.0 takes. Codes of more than four bits are looked up one by one.
CORE = {
    # (x tiles, several codes an entry): groups of 64 or more, groups of 16 and 32
    (1, True): (27, 52),
    (1, False): (42, 65),
    (2, True): (12, 26),
    (2, False): (22, 37),
    (4, True): (7.5, 17.5),
    (4, False): (13, 22),
    (8, True): (6, 13),
    (8, False): (8.5, 15.5),
}
# Bytes that one thread writes to local memory and reads again, outside of the loop.
SPILLS = {
    f"sm_100 {unit} mma_kernel {t} 4 2 0": 48
    for unit, t in (("mma_bf16", "bf16"), ("mma_f16", "f16"))
}


def test_products_take_no_more_instructions_than_they_did() -> None:
    for architecture, (dtype, bits, tiles, fine), code in kernels("mma_kernel"):
        m, b = int(tiles), int(bits)
        k_tiles = 4 if m == 1 and b == 1 else 2 if m == 1 and b <= 3 else 1
        assert code.products == 2 * k_tiles * 4 * 2 * m, (architecture, dtype, bits, tiles)
        budget = CORE[m, b <= 4][int(fine)]
        spent = code.core / code.products
        assert spent <= budget, (architecture, dtype, bits, tiles, fine, spent)


def test_names_are_read() -> None:
    mangled = {
        "mma_kernel bf16 4 1 0": "10mma_kernelI13__nv_bfloat16Li4ELi1ELb0EEEvNS0_4MapsENS0_6LinearENS0_6MmaRunE",
        "mma_kernel f16 3 8 1": "10mma_kernelI6__halfLi3ELi8ELb1EEEvNS0_4MapsENS0_6LinearENS0_6MmaRunE",
        "add_parts_kernel": "16add_parts_kernelENS0_6LinearEi",
    }
    for short, rest in mangled.items():
        assert cuda_code.short_name(f"_ZN6lowbit4cuda{rest}") == short
    with pytest.raises(ValueError, match="kernel's name was expected"):
        cuda_code.short_name("_Z1fv")


def test_code_is_read() -> None:
    name = "_ZN6lowbit4cuda10mma_kernelI6__halfLi3ELi8ELb1EEEvNS0_4MapsE"
    said = f"""ptxas info    : Compiling entry function '{name}' for 'sm_90'
ptxas info    : Function properties for {name}
    0 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 72 registers, used 1 barriers
"""
    sass = f"""
\t\tFunction : {name}
        /*0000*/                   LDC R1, c[0x0][0x28] ;        /* 0x00000a00ff017b82 */
        /*0010*/                   HMMA.16816.F32 R4, R8, R2 ;   /* 0x0 */
        /*0020*/              @!P0 LDS.128 R4, [R2] ;            /* 0x0 */
        /*0030*/                   STL [R1], R4 ;                /* 0x0 */
        /*0040*/              @UP0 HMMA.16816.F32 R4, R8, R2 ;   /* 0x0 */
        /*0050*/                   EXIT ;                        /* 0x0 */
        /*0060*/                   NOP ;                         /* 0x0 */
"""
    assert cuda_code.parsed(said, sass) == {"mma_kernel f16 3 8 1": [72, 13, 6, 2, 4, 1]}
    code = Code(*cuda_code.parsed(said, sass)["mma_kernel f16 3 8 1"])
    assert (code.resident(288), code._replace(registers=73).resident(288)) == (3, 2)
