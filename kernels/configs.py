"""Which tile a product takes: plain arithmetic on the host, no GPU needed."""

from __future__ import annotations

from dataclasses import dataclass

CHUNK = 16  # weights of a row that lie side by side: python/lowbit/layouts/k16.py
MOST_CHUNKS = 4  # a word of 8-bit codes holds those of four chunks
# Programs that a device should hold at least: few rows of x are bound by memory latency, which programs hide.
_PROGRAMS_PER_SM = 4
# A part of K that is worth a program of its own and a pass over its sums.
_LEAST_SPLIT_STEPS = 8
_BLOCK_N = 64  # sums of a group and of the whole stand in registers side by side: 128 columns spill
_WARPS = 4
_STAGES = 3  # with four, codes of two planes spill

_LEAST_FP8_GROUP = 32  # values of K that FP8 tensor cores take
_TMA_ALIGNMENT = 16
_LEAST_SPLIT_K = 512
_LARGE_SHARED = (9, 10)  # sm_90 and sm_100: 227 KiB of shared memory for a program


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
    return Config(
        block_m, _BLOCK_N, chunks, splits, steps_per_split * chunks, apart, _WARPS, _STAGES
    )


@dataclass(frozen=True)
class Fp8Config:
    """Tile of an FP8 product, how K is shared out, and how many programs run together."""

    block_m: int
    block_n: int
    block_k: int
    band: int  # tiles that share columns of b in L2
    splits: int
    k_per_split: int  # a multiple of block_k
    programs: int  # on a multiprocessor
    tma: bool  # tensor descriptors, else pointers
    warps: int
    stages: int


def multiplies_fp8(capability: tuple[int, int], group: int) -> bool:
    """Whether FP8 tensor cores multiply groups of `group` values of K, 0 for all; else codes are decoded to bf16."""
    return capability >= (8, 9) and (group == 0 or group >= _LEAST_FP8_GROUP)


def tma_obstacle(capability: tuple[int, int], group: int, *matrices: tuple[int, int]) -> str | None:
    """Why tiles of matrices, each an address and bytes between rows, cannot come by TMA; None if they can.

    TMA (sm_90 and later) wants both to be multiples of 16 bytes. It brings codes to shared memory, which those that
    are decoded in registers (`multiplies_fp8`) would only pass through.
    """
    if capability < (9, 0):
        return f"TMA needs sm_90, this is sm_{capability[0]}{capability[1]}"
    if not multiplies_fp8(capability, group):
        return f"groups of {group} are decoded in registers"
    for name, (address, stride) in zip("ab", matrices, strict=True):
        if address % _TMA_ALIGNMENT or stride % _TMA_ALIGNMENT:
            return f"rows of {name} do not begin at multiples of {_TMA_ALIGNMENT} bytes"
    return None


def choose_fp8(
    m: int,
    n: int,
    k: int,
    group: int,
    *,
    capability: tuple[int, int],
    sms: int,
    tma: bool,
    by_column: bool,
    quantized: bool,
) -> Fp8Config:
    """The tile for an (m, k) a and an (n, k) b whose scales stand for `group` values of K: 16, 32 or 128, or 0 for all.

    `by_column`: rows of b have scales of their own for groups; `quantized`: y is stored in FP8.
    """
    native = multiplies_fp8(capability, group)
    block_k = min(group or 128, 128 if native else 64)
    narrow = by_column or quantized or not native  # scales of columns, too, stand in registers
    wide = m > 64 and not narrow and -(-m // 128) * -(-n // 128) >= sms
    odd = native and not tma  # rows that may have to be loaded byte by byte
    if m <= 64 or (odd and not wide):
        # Tensor cores of Hopper take 64 rows at least. Wider tiles read a, which every tile of y reads again, less
        # often, where enough of them are left.
        block_m = 64 if native else next(b for b in (16, 32, 64) if m <= b)
        block_n = 128 if (m > 32 or n >= 128 * sms) and not narrow and not odd else 64
        warps, stages = 4, 4
        programs = 2 if block_n == 128 or odd else 3
    else:
        block_m, block_n = 128, 128 if wide else 64
        warps, stages = 8, 4 if tma and capability[0] in _LARGE_SHARED else 3
        programs = 2 if tma and not wide and block_k == 128 else 1
        if tma and wide and group == 0 and capability[0] in _LARGE_SHARED:
            # Two programs of four warps: one multiplies while the other stores its tile.
            warps, stages, programs = 4, 3, 2
    if block_k <= 32 and not odd:
        stages = 8  # of few bytes each
    tiles = -(-m // block_m) * -(-n // block_n)
    # Sums of a part of K are written and read again: at least twice as many bytes of b are read for them.
    least = max(_LEAST_SPLIT_K, 16 * m)
    splits = 1 if quantized else max(1, min(programs * sms // tiles, k // least))
    k_per_split = -(-k // (splits * block_k)) * block_k
    splits = -(-k // k_per_split)
    return Fp8Config(
        block_m, block_n, block_k, 8, splits, k_per_split, programs, tma, warps, stages
    )
