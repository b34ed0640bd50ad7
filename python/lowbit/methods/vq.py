"""Vector quantization: a table of vectors fitted to a weight by k-means (faiss), and the nearest vector for each `dim`
weights along K; with the second moment of the inputs in the order of GPTVQ (van Baalen et al.,
https://arxiv.org/abs/2402.15319), where vectors make up for the error of outputs of those before them.

faiss, and not scikit-learn: 256 centres of 262144 vectors of 4 in 10 rounds took it 0.36 of the time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lowbit import reference
from lowbit.formats import Format, as_format
from lowbit.methods import blocks, fitting
from lowbit.weights.quantized import QuantTensor

# Vectors that k-means sees: more of them hardly change the table.
_POINTS_PER_ENTRY = 256
_MAX_POINTS = 1 << 20
# Distances in memory at a time: 16 MiB.
_DISTANCES = 1 << 22


@torch.no_grad()
def quantize(
    weight: Tensor,
    format: Format | str,
    *,
    weights: Tensor | None = None,
    hessian: Tensor | None = None,
    damping: float = 0.01,
    rounds: int = 10,
    seed: int = 0,
) -> QuantTensor:
    """Fits a table of 2^bits vectors to a weight and chooses the nearest one for each vector of weights.

    The scale of a group is its root mean square. A weight with fewer vectors than the table has entries is held
    exactly, up to its scales, and the entries left are 0.

    Args:
        weight: (N, K) in fp32, bf16, fp16 or fp64, finite, not empty; K that is no multiple of the dimension is filled
            with zeros, which count nothing.
        format: one with codec "vector", or its name: "vq8_d4", "vq12_d4", any "vqB_dD" with B up to 16 and D of 2, 4,
            8.
        weights: (N, K) or (K,), the importance of each weight, as of "kmeans". A vector counts their mean in k-means,
            and each its own where the nearest is chosen.
        hessian: (K, K), the second moment of the inputs; not with `weights`: a column counts 1 / U_jj^2 in the table,
            as in `gptq.py`, and vectors go from the last one to the first (`blocks.py`).
        damping: of the Hessian, as in `gptq.quantize`.
        rounds: of k-means.
        seed: of the vectors that k-means starts from, and of those that it sees of a large weight.

    Raises:
        ImportError: faiss is not installed.
        TypeError, ValueError: as `kmeans.quantize` and `gptq.quantize`; `weights` and `hessian` are both given;
            `rounds` is below 1; the format has another codec.

    Example:
        >>> qt = lowbit.quantize(torch.randn(256, 256), "vq8_d4")  # 2 bits a weight, a table and a scale a row
    """
    format = as_format(format)
    blocks.check_codec(format, "vector", "vq")
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    if weights is not None and hessian is not None:
        raise ValueError(
            "weights and hessian are both given: the importance follows from the hessian"
        )
    qt = blocks.start(weight, format, 1.0)
    weights = fitting.check_importance(weights, weight)
    sweep = None
    if hessian is not None:
        sweep = blocks.Sweep(hessian, damping, weight, format.dim)
        square = sweep.factor.diagonal().square()
        weights = (square.min() / square).float().expand(weight.shape)
    qt.tensors["table"].copy_(_table(qt, weight, weights, rounds, seed))
    for rows in blocks.slices(weight):
        if sweep is not None:
            _sweep(sweep, qt, rows, weight)
            continue
        x = blocks.whole_vectors(blocks.numbers(qt, rows, weight[rows].float()), format.dim)
        count = None if weights is None else blocks.whole_vectors(weights[rows].float(), format.dim)
        blocks.put(qt, rows, nearest(x, qt.tensors["table"], count))
    return qt


def _sweep(sweep: blocks.Sweep, qt: QuantTensor, rows: slice, weight: Tensor) -> None:
    (n, k), dim, table = (
        (rows.stop - rows.start, weight.shape[1]),
        qt.format.dim,
        qt.tensors["table"],
    )
    codes = torch.empty((n, -(-k // dim)), dtype=_code_dtype(table), device=weight.device)

    def encode(take: blocks.Take, block: slice) -> Tensor:
        found = nearest(blocks.whole_vectors(take(block), dim), table)
        codes[:, block.start // dim] = found[:, 0]
        return reference.structured_values(found, qt.format, table)[:, : block.stop - block.start]

    sweep.run(qt, rows, weight, encode)
    blocks.put(qt, rows, codes)


def _table(
    qt: QuantTensor, weight: Tensor, weights: Tensor | None, rounds: int, seed: int
) -> Tensor:  # (2^bits, dim) fp32
    entries, dim = 2**qt.format.bits, qt.format.dim
    n, k = qt.shape
    total = n * -(-k // dim)
    wanted = min(max(entries * _POINTS_PER_ENTRY, 1 << 16), _MAX_POINTS)
    # The same share of every row.
    generator = torch.Generator("cpu").manual_seed(seed)
    points, counts = [], []
    for rows in blocks.slices(weight):
        x = (
            blocks.whole_vectors(blocks.numbers(qt, rows, weight[rows].float()), dim)
            .flatten(0, 1)
            .cpu()
        )
        count = None
        if weights is not None:
            count = blocks.whole_vectors(weights[rows].float(), dim).mean(-1).flatten().cpu()
        if total > wanted:
            chosen = torch.randperm(len(x), generator=generator, dtype=torch.int64, device="cpu")
            chosen = chosen[: max(1, len(x) * wanted // total)]
            x, count = x[chosen], None if count is None else count[chosen]
        points.append(x)
        if count is not None:
            counts.append(count)
    x = torch.cat(points)
    table = torch.zeros((entries, dim), dtype=torch.float32, device="cpu")
    distinct = x.unique(dim=0) if len(x) <= entries else x
    if len(distinct) <= entries:
        table[: len(distinct)] = distinct
        return table
    count = torch.cat(counts) if counts else None
    if count is not None and not bool((count > 0).any()):
        count = None
    return torch.from_numpy(_centres(x, count, entries, rounds, seed))


def _centres(x: Tensor, count: Tensor | None, entries: int, rounds: int, seed: int) -> Any:
    try:
        import faiss
    except ImportError as e:
        raise ImportError(
            "method 'vq' needs faiss for k-means of vectors: pip install 'lowbit[vectors]'"
        ) from e
    # At least one point per centre; it warns of few, which are all that there are.
    kmeans = faiss.Kmeans(
        x.shape[1],
        entries,
        niter=rounds,
        seed=seed + 1,
        min_points_per_centroid=1,
        max_points_per_centroid=len(x),
    )
    kmeans.train(x.numpy(), weights=None if count is None else count.numpy())
    return kmeans.centroids


def nearest(
    vectors: Tensor,  # (R, C, dim) fp32
    table: Tensor,  # (E, dim) fp32
    weights: Tensor | None = None,  # (R, C, dim) fp32, what squared errors count
) -> Tensor:  # (R, C), int64 or uint8 as codes are packed
    """The index of the nearest entry of each vector, the first of those as near."""
    flat = vectors.flatten(0, 1)
    count = None if weights is None else weights.flatten(0, 1)
    codes = torch.empty(len(flat), dtype=torch.int64, device=flat.device)
    step = max(1, _DISTANCES // len(table))
    square = table.square()
    for begin in range(0, len(flat), step):
        part = slice(begin, begin + step)
        if count is None:
            error = square.sum(1) - 2 * (flat[part] @ table.t())
        else:
            error = count[part] @ square.t() - 2 * ((count[part] * flat[part]) @ table.t())
        codes[part] = error.argmin(1)
    return codes.view(vectors.shape[:-1]).to(_code_dtype(table))


def _code_dtype(table: Tensor) -> torch.dtype:
    return torch.uint8 if len(table) <= 256 else torch.int64
