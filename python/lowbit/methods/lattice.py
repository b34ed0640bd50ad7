"""E8P and its residual forms (QuIP#, Tseng et al., https://arxiv.org/abs/2402.04396): the nearest points of the
lattice E8.

What the points are is in `codebooks/lattice.py`. Nearest is exact for a point; a second stage takes the nearest point
to what the first one leaves.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from lowbit import modes, reference
from lowbit.codebooks import lattice
from lowbit.formats import Format, as_format
from lowbit.methods import blocks, grid
from lowbit.weights.quantized import QuantTensor

# The root mean square of normal numbers that the points suit best. QuIP# has 1.03 for all of 32 bits, too, where 0.92
# leaves 0.0087 of their square, and 1.03 leaves 0.0097.
_UNITS = {16: 1.03, 24: 0.98, 32: 0.92}
# Vectors whose distances from all points are in memory at a time: 16 MiB.
_VECTORS = 1 << 14


@torch.no_grad()
def quantize(
    weight: Tensor,
    format: Format | str,
    *,
    hessian: Tensor | None = None,
    damping: float = 0.01,
) -> QuantTensor:
    """Rounds each 8 weights of a row to points of the lattice E8.

    The scale of a group is its root mean square over 1.03 (0.98 with 24 bits, 0.92 with 32), as normal numbers need it;
    without a Hessian it is then fitted to the codes by least squares.

    Args:
        weight: (N, K) in fp32, bf16, fp16 or fp64, finite, not empty; K that is no multiple of 8 is filled with zeros.
        format: one with codec "e8p", or its name: "e8p", "e8p_rvq3", "e8p_rvq4".
        hessian: (K, K), the second moment of the inputs: blocks of 8 columns make up for the error of outputs of those
            before them (`blocks.py`).
        damping: of the Hessian, as in `gptq.quantize`.

    Raises:
        TypeError, ValueError: as `gptq.quantize`; the format has another codec.

    Example:
        >>> qt = lowbit.quantize(torch.randn(64, 256), "e8p")  # 2 bits a weight, and a scale a row
    """
    format = as_format(format)
    blocks.check_codec(format, "e8p", "lattice")
    qt = blocks.start(weight, format, _UNITS[format.bits])
    if hessian is not None:
        sweep = blocks.Sweep(hessian, damping, weight, 8)
        for rows in blocks.slices(weight):
            _sweep(sweep, qt, rows, weight)
        return qt
    for rows, w in grid.slices(weight):
        blocks.put(
            qt, rows, nearest(blocks.whole_vectors(blocks.numbers(qt, rows, w), 8), format.bits)
        )
    blocks.refit_scales(qt, weight)
    return qt


def _sweep(sweep: blocks.Sweep, qt: QuantTensor, rows: slice, weight: Tensor) -> None:
    n, k = rows.stop - rows.start, weight.shape[1]
    codes = torch.empty((n, -(-k // 8)), dtype=torch.int64, device=weight.device)
    bits = qt.format.bits

    def encode(take: blocks.Take, block: slice) -> Tensor:
        found = nearest(blocks.whole_vectors(take(block), 8), bits)
        codes[:, block.start // 8] = found[:, 0]
        return reference.e8p_values(found, bits).flatten(1)[:, : block.stop - block.start]

    sweep.run(qt, rows, weight, encode)
    blocks.put(qt, rows, codes)


def nearest(vectors: Tensor, bits: int) -> Tensor:  # (R, C, 8) fp32 -> (R, C) int64
    """The codes of the points nearest to vectors, of the lower code where two are as near."""
    flat = vectors.reshape(-1, 8)
    codes = torch.empty(len(flat), dtype=torch.int64, device=flat.device)
    for begin in range(0, len(flat), _VECTORS):
        part = flat[begin : begin + _VECTORS]
        found = _nearest_e8p(part)
        if bits > 16:
            rest = (part - reference.e8p_values(found, 16)) / lattice.SECOND_STAGE[bits]
            second = _nearest_e8p(rest) if bits == 32 else _nearest_of(rest, _points(rest.device))
            found = found | second << 16
        codes[begin : begin + _VECTORS] = found
    return codes.view(vectors.shape[:-1])


def _nearest_e8p(x: Tensor) -> Tensor:  # (R, 8) fp32 -> (R,) int64
    vectors = torch.as_tensor(lattice.e8p_vectors(), dtype=torch.float32, device=x.device)
    best = torch.full((len(x),), torch.inf, dtype=torch.float32, device=x.device)
    codes = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    for move in (0, 1):
        y = x - (move / 2 - 0.25)
        found, error = _nearest_signed(y, vectors)
        error = error + y.square().sum(1)
        closer = error < best
        best = torch.where(closer, error, best)
        codes = torch.where(closer, found | move << 15, codes)
    return codes


def _nearest_signed(y: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """The vector and the signs nearest to each row of y (R, 8), and the squared distance less |y|^2."""
    size, absolute = y.abs(), vectors.abs()
    # With the signs of y the product with a vector is largest. Where their number of -1 has the wrong parity, the sign
    # changes that costs least.
    odd = (vectors < 0).any(1)
    negative = y < 0
    wrong = negative.sum(1, keepdim=True) % 2 != odd.long()
    cost = size[:, :1] * absolute[:, 0]
    for i in range(1, 8):
        torch.minimum(cost, size[:, i : i + 1] * absolute[:, i], out=cost)
    error = absolute.square().sum(1) - 2 * (size @ absolute.t()) + torch.where(wrong, 4 * cost, 0.0)
    least, index = error.min(1)
    chosen = vectors[index]
    flipped = (size * chosen.abs()).argmin(1, keepdim=True)
    change = wrong.gather(1, index[:, None])
    signs = negative.scatter(1, flipped, negative.gather(1, flipped) ^ change)
    # Against the signs of the vector itself.
    signs = signs ^ (chosen < 0)
    places = 1 << torch.arange(7, dtype=torch.int64, device=y.device)
    return index | (signs[:, :7].long() * places).sum(1) << 8, least


def _nearest_of(x: Tensor, points: Tensor) -> Tensor:  # (R, 8), (E, 8) fp32 -> (R,) int64
    return (points.square().sum(1) - 2 * (x @ points.t())).argmin(1)


@functools.cache
@modes.outside()
def _points(device: torch.device) -> Tensor:
    return torch.as_tensor(lattice.e8_points(), dtype=torch.float32, device=device)
