"""Trellis codes (QTIP, Tseng et al., https://arxiv.org/abs/2406.11235): the sequence of codes of a row whose values are
nearest to its weights, by the Viterbi algorithm (csrc/cpu/structured/trellis-inl.h).

What the codes stand for is in `reference/structured.py`. The sequence of a row is a ring: the weights on either side of
its seam are encoded first, and their codes there are kept.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from lowbit import modes, reference
from lowbit.backends.cpu.structured import encode_trellis
from lowbit.formats import Format, as_format
from lowbit.methods import blocks
from lowbit.structured import STATE_BITS
from lowbit.weights.quantized import QuantTensor

# The root mean square of the values of all states.
_UNIT = 1.1547
# Columns that are encoded before the columns after them see their error, and those that take part in the choice.
_BLOCK = 128
_AHEAD = 64
_SIDE = 32  # columns on either side of the seam that decide about it


@torch.no_grad()
def quantize(
    weight: Tensor,
    format: Format | str,
    *,
    hessian: Tensor | None = None,
    damping: float = 0.01,
) -> QuantTensor:
    """Encodes each row of a weight with a trellis of 2^16 states.

    The scale of a group is its root mean square, as that of the values of all states is 1.15; without a Hessian it is
    then fitted to the codes by least squares. Encoding is done on the CPU.

    Args:
        weight: (N, K) in fp32, bf16, fp16 or fp64, finite, not empty.
        format: one with codec "trellis", or its name: "trellis2", "trellis3", "trellis4".
        hessian: (K, K), the second moment of the inputs: blocks of 128 columns make up for the error of outputs of
            those before them (`blocks.py`).
        damping: of the Hessian, as in `gptq.quantize`.

    Raises:
        TypeError, ValueError: as `gptq.quantize`; the format has another codec.

    Example:
        >>> qt = lowbit.quantize(torch.randn(64, 256), "trellis2")  # 2 bits a weight, and a scale a row
    """
    format = as_format(format)
    blocks.check_codec(format, "trellis", "trellis")
    qt = blocks.start(weight, format, _UNIT)
    if hessian is not None and weight.shape[1] > _BLOCK:
        sweep = blocks.Sweep(hessian, damping, weight, _BLOCK)
        for rows in blocks.slices(weight):
            _sweep(sweep, qt, rows, weight)
        return qt
    if hessian is not None:
        # All columns are one block. The checks of the Hessian remain.
        blocks.Sweep(hessian, damping, weight, _BLOCK)
    for rows in blocks.slices(weight):
        x = blocks.numbers(qt, rows, weight[rows].float())
        blocks.put(qt, rows, encode_trellis(x.cpu(), _values(), format.bits))
    blocks.refit_scales(qt, weight)
    return qt


def _sweep(sweep: blocks.Sweep, qt: QuantTensor, rows: slice, weight: Tensor) -> None:
    n, (_, k), bits = rows.stop - rows.start, weight.shape, qt.format.bits
    x = blocks.numbers(qt, rows, weight[rows].float())
    around = encode_trellis(torch.cat([x[:, -_SIDE:], x[:, :_SIDE]], 1).cpu(), _values(), bits,
                            _anything(n), _anything(n))  # fmt: skip
    seam = _rest(around[:, _SIDE:], bits)
    codes = torch.empty((n, k), dtype=torch.uint8, device="cpu")

    def encode(take: blocks.Take, block: slice) -> Tensor:
        ahead = max(0, block.start - _AHEAD)
        known = seam if block.stop == k else _rest(codes[:, block.stop :], bits, around[:, _SIDE:])
        first = seam if ahead == 0 else _anything(n)
        found = encode_trellis(take(slice(ahead, block.stop)).cpu(), _values(), bits, known, first)
        codes[:, block] = found[:, block.start - ahead :]
        size = block.stop - block.start
        following = torch.cat([codes[:, block.start :], around[:, _SIDE:]], 1)[
            :, : size + STATE_BITS
        ]
        states = reference.trellis_states(following, bits)[:, :size]
        return reference.trellis_values(states).to(weight.device)

    sweep.run(qt, rows, weight, encode)
    blocks.put(qt, rows, codes)


def _rest(codes: Tensor, bits: int, behind: Tensor | None = None) -> Tensor:  # (R,) int32
    """The low bits that a state has of rows of codes and of what is behind them."""
    codes = codes if behind is None else torch.cat([codes, behind], 1)
    states = reference.trellis_states(codes[:, :STATE_BITS], bits)[:, 0]
    return (states & (1 << STATE_BITS - bits) - 1).to(torch.int32)


def _anything(rows: int) -> Tensor:
    return torch.full((rows,), -1, dtype=torch.int32, device="cpu")


@functools.cache
@modes.outside()
def _values() -> Tensor:  # (65536,) fp32
    states = torch.arange(1 << STATE_BITS, dtype=torch.int64, device="cpu")
    return reference.trellis_values(states)
