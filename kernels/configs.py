"""Which tile a product takes: plain arithmetic on the host, no GPU needed."""

from __future__ import annotations

from dataclasses import dataclass

CHUNK = 16  # weights of a row that lie side by side: python/lowbit/planes.py
MOST_CHUNKS = 4  # a word of 8-bit codes holds those of four chunks
# Programs that a device should hold at least: few rows of x are bound by memory latency, which programs hide.
_PROGRAMS_PER_SM = 4
# A part of K that is worth a program of its own and a pass over its sums.
_LEAST_SPLIT_STEPS = 8
_BLOCK_N = 64  # sums of a group and of the whole stand in registers side by side: 128 columns spill
_STAGES = 3  # with four, codes of two planes spill


@dataclass(frozen=True)
class Config:
    """Tile of y, chunks of 16 weights a step, and how many programs share K."""

    block_m: int
    block_n: int
    chunks: int
    splits: int
    chunks_per_split: int
    apart: bool  # a step lies within a group
    warps: int
    stages: int


def choose(m: int, n: int, k: int, group: int, sms: int) -> Config:
    """The tile for an (m, k) x against an (n, k) weight with groups of `group` weights."""
    block_m = next(b for b in (16, 32, 64, 128) if m <= b or b == 128)
    fitting = [c for c in (MOST_CHUNKS, 2, 1) if group % (c * CHUNK) == 0]
    apart = group >= k or bool(fitting)
    chunks = MOST_CHUNKS if group >= k or not fitting else fitting[0]
    steps = -(-k // (CHUNK * chunks))
    tiles = -(-m // block_m) * -(-n // _BLOCK_N)
    wanted = -(-_PROGRAMS_PER_SM * sms // tiles) if block_m == 16 else 1
    splits = max(1, min(wanted, steps // _LEAST_SPLIT_STEPS, 16))
    steps_per_split = -(-steps // splits)
    splits = -(-steps // steps_per_split)
    warps = 4 if block_m <= 64 else 8
    return Config(
        block_m, _BLOCK_N, chunks, splits, steps_per_split * chunks, apart, warps, _STAGES
    )


@dataclass(frozen=True)
class Fp8Config:
    """Tile of an FP8 product, and how many tiles share columns of b in L2."""

    block_m: int
    block_n: int
    block_k: int
    band: int
    warps: int
    stages: int


def choose_fp8(m: int, n: int, group: int, native: bool, narrow: bool) -> Fp8Config:
    """The tile for an (m, n) product whose scales stand for `group` values of K, 16, 32 or 128, or 0 for all.

    `native`: FP8 tensor cores multiply, and those of Hopper take 64 rows at least; else codes are decoded in
    registers. `narrow`: so do the scales of every column of y for the groups, or those of y.
    """
    block_k = min(group or 128, 128 if native else 64)
    if m <= 64:
        block_m = 64 if native else next(b for b in (16, 32, 64) if m <= b)
        return Fp8Config(block_m, 32, block_k, 8, 4, 4)
    wide = native and not narrow and n > 2048
    return Fp8Config(128, 128 if wide else 64, block_k, 8, 8, 3)
