"""What an adapter gives: a kernel with its own copies of a weight, ready to run on an x."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lowbit.cli.bench import cache_bytes

# Relative Frobenius error against float64 on the candidate's own dequantized weight. bf16 weights, x
# and y each round by at most 2^-8 (0.2 % rms); int8 activations by absmax / 254 a group, 0.4 to 0.9 %
# rms of normal x; a table rounded to int8 the same. A wrong nibble order or scale gives more than 50 %.
TOLERANCE = 0.02


class Unsupported(Exception):
    """The library has no kernel for this weight; the message says why."""


@dataclass
class Candidate:
    """One kernel.

    Attributes:
        name: library and format.
        bits: bits per weight, scales included.
        activation: the dtype that enters the products.
        weight: (N, K), the values that copy 0 stands for, exact in fp32.
        copies: how many weights a pass reads, each with the rows of the one before rotated by one.
        prepare: takes x (M, K) fp32 and returns a function that multiplies it by every copy; its last
            results are the outputs that `outputs` gives.
        outputs: the (M, N) results of the last pass, one per copy.
        close: frees threads and memory.
    """

    name: str
    bits: float
    activation: str
    weight: Tensor
    copies: int
    prepare: Callable[[Tensor], Callable[[], object]]
    outputs: Callable[[], list[Tensor]]
    close: Callable[[], object] = lambda: None

    def check(self, x: Tensor) -> float:
        """Largest relative error over the copies, in the first and last rows; RuntimeError above TOLERANCE."""
        self.prepare(x)()
        some = [*range(min(len(x), 16)), *range(max(16, len(x) - 16), len(x))]
        exact = x[some].double() @ self.weight.double().T
        error = 0.0
        for i, y in enumerate(self.outputs()):
            want = exact.roll(i, 1)
            error = max(error, float((y[some].double() - want).norm() / want.norm()))
        if not error <= TOLERANCE:
            raise RuntimeError(f"{self.name} is wrong: relative error {error:.3g}")
        return error


def num_copies(nbytes: int) -> int:
    """Copies of a weight of this size that do not fit in twice the last-level cache."""
    return 1 + -(-2 * cache_bytes() // nbytes)


def rolled(a: np.ndarray, copies: int) -> list[np.ndarray]:
    """Copies of a weight, rows rotated by one each: libraries may merge constants that are equal."""
    return [np.ascontiguousarray(np.roll(a, i, axis=0)) for i in range(copies)]


def group_of(k: int) -> int:
    """The largest of the usual group sizes that divides K."""
    for group in (128, 64, 32):
        if k % group == 0:
            return group
    raise Unsupported(f"no group size divides K = {k}")


def unsigned_groups(
    weight: Tensor, bits: int, group: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Symmetric integers by groups: codes (N, K) uint8, scales (N, K / G) fp32, dequantized (N, K)."""
    n, k = weight.shape
    w = weight.view(n, -1, group)
    zero = 1 << (bits - 1)
    scales = (w.abs().amax(-1, keepdim=True) / zero).bfloat16().float()
    codes = (w / scales).round().clamp(-zero, zero - 1)
    values = (codes * scales).view(n, k)
    return (codes + zero).to(torch.uint8).view(n, k).numpy(), scales[..., 0].numpy(), values.numpy()


def packed(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes of 2, 4 or 8 bits, the first in the low bits of each byte."""
    per = 8 // bits
    fields = codes.reshape(*codes.shape[:-1], -1, per).astype(np.uint16)
    shifts = np.arange(per, dtype=np.uint16) * bits
    return (fields << shifts).sum(-1).astype(np.uint8)


def eager(
    name: str,
    bits: float,
    activation: str,
    weight: Tensor,
    calls: list[Callable[[Tensor], Tensor]],
    dtype: torch.dtype,
) -> Candidate:
    """A candidate whose pass is one torch call per copy, on x in `dtype`."""
    results: list[Tensor] = []

    def prepare(x: Tensor) -> Callable[[], object]:
        given = x.to(dtype)

        def run() -> None:
            with torch.inference_mode():
                results[:] = [call(given) for call in calls]

        return run

    return Candidate(
        name, bits, activation, weight.float(), len(calls), prepare, lambda: list(results)
    )
