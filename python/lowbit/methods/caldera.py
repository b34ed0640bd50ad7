"""CALDERA (Saha et al., arXiv 2405.18886): a quantized matrix plus a low-rank term, W ~ Q + L R, fitted in turns.

The loss is that of GPTQ, tr(E H E^T) with E = W - Q - L R and H the second moment of the inputs. With H = M M^T, the
best L R of a rest A is the truncated singular value decomposition of A M (rank-constrained regression), and Q is found
by GPTQ, which is LDLQ (QuIP, arXiv 2307.13304), on what L R leaves. With quantized factors the loss may rise again from
one turn to the next, so that the best turn is kept.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable

import torch
from torch import Tensor

from lowbit import reference
from lowbit.formats import Format, as_format
from lowbit.methods import gptq, grid, kmeans, rtn
from lowbit.weights.quantized import (
    FACTORS,
    SCALE_DTYPES,
    QuantTensor,
    factor_shapes,
    stored_bytes,
    tensor_specs,
)

# A smaller side up to here is decomposed exactly, a larger one by subspace iteration.
_EXACT_SIZE = 512
_SUBSPACE_STEPS = 6
Factor = Tensor | QuantTensor
Factors = tuple[Factor, Factor]


@torch.no_grad()
def quantize(
    weight: Tensor,
    format: Format | str,
    *,
    hessian: Tensor,
    rank: int | None = None,
    factor: str | None = None,
    budget: float | None = None,
    turns: int = 6,
    factor_turns: int = 5,
    downdate: bool | None = None,
    damping: float = 0.01,
) -> QuantTensor:
    """Quantizes `weight` as a quantized matrix plus a low-rank term, with the least error of outputs.

    As in the paper: turns of L R, then Q; quantized factors by LPLR, which rounds L for R and R for L in turns; the
    best turn is kept. Our reading: L is rounded by GPTQ, whose Hessian is R H R^T, R to nearest; L R is also fitted
    once more after each Q, which the next turn needs anyway; turns end after two that were no better than the best.

    Args:
        weight: (N, K) in fp32, bf16, fp16 or fp64, finite, not empty.
        format: a Format or its name, with a rank ("int2_g64_r64int4"), or without one: then `rank` or `budget` says it.
        hessian: (K, K), as in `gptq.quantize`.
        rank: of the low-rank term, below N and K.
        factor: with `rank` or `budget`, how factors are stored: "bf16" (default), "fp16", "fp32" or a format's name.
        budget: the bits of a weight that everything together may take, scales and factors included: the largest rank
            within it.
        turns, factor_turns: how often Q and L R, and L and R, are fitted at most.
        downdate: whether Q leaves out of H what L R can take up next (the paper's Hessian downdate). None: it does
            with dense factors, and in every other turn with quantized ones, which take up less than that.
        damping: as in `gptq.quantize`.

    Raises:
        TypeError, ValueError: as `gptq.quantize`; there is no rank or there are two, it is not below N and K, the
            budget leaves none, or `turns` or `factor_turns` is below 1.

    Example:
        >>> qt = lowbit.quantize(w, "int2_g64", "caldera", hessian=x.T @ x, rank=16, factor="int4")
    """
    whole = _ranked(as_format(format), weight, rank, factor, budget)
    grid.check_weight(weight, whole.matrix)
    gptq.check_hessian(hessian, weight)
    tensor_specs(whole, *weight.shape)
    for name, value in (("turns", turns), ("factor_turns", factor_turns)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    loss = Loss(hessian, damping)
    w = weight.double()
    scale = loss(w)
    best: tuple[float, QuantTensor, Factors] | None = None
    waited = 0
    dense = whole.factor_format is None
    q = torch.zeros_like(w)
    factors = low_rank(w, whole, loss, factor_turns)
    for turn in range(turns):
        product = _product(factors)
        down = dense or turn % 2 == 1 if downdate is None else downdate
        moment = loss.without(product, whole.rank) if down else loss.moment
        made = gptq.quantize(
            w - product, whole.matrix, hessian=moment, damping=damping if down else 0.0
        )
        q = reference.dequantize(made).double()
        refitted = low_rank(w - q, whole, loss, factor_turns)
        waited += 1
        for candidate in (factors, refitted):
            error = loss(w - q - _product(candidate))
            if best is None or error < best[0] * (1 - 1e-9):
                best, waited = (error, made, candidate), 0
        factors = refitted
        if waited == 2 or scale == 0:
            break
    assert best is not None
    return with_factors(best[1], whole, best[2])


def _ranked(
    format: Format, weight: Tensor, rank: int | None, factor: str | None, budget: float | None
) -> Format:
    """The format with its rank."""
    given = {"rank": rank, "budget": budget}
    said = [name for name, value in given.items() if value is not None]
    if format.rank:
        if said or factor is not None:
            raise ValueError(
                f"format {format.name!r} has a rank: {(said or ['factor'])[0]} cannot say another one"
            )
        return format
    if len(said) != 1:
        raise ValueError(
            f"method 'caldera' needs one of rank and budget, or a format with a rank (suffix _rR), got {format.name!r}"
            + (" and both" if said else " and none")
        )
    if budget is not None:
        grid.check_weight(weight, format)
        n, k = weight.shape
        return format.with_rank(
            rank_within(budget, format, n, k, factor or "bf16"), factor or "bf16"
        )
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise ValueError(f"rank must be a positive integer, got {rank!r}")
    return format.with_rank(rank, factor or "bf16")


def rank_within(budget: float, format: Format, n: int, k: int, factor: str = "bf16") -> int:
    """The largest rank with which an (n, k) weight takes at most `budget` bits a weight, everything counted.

    Raises:
        ValueError: there is none.
    """
    rank = bisect.bisect_right(
        range(1, min(n, k)),
        budget * n * k,
        key=lambda rank: 8 * stored_bytes(format.with_rank(rank, factor), n, k),
    )
    if not rank:
        least = 8 * stored_bytes(format, n, k) / (n * k)
        raise ValueError(
            f"budget must leave room for a rank of at least 1, got {budget} bits a weight; format "
            f"{format.name!r} alone takes {least:.3f} for a ({n}, {k}) weight"
        )
    return rank


class Loss:
    """tr(E H E^T) with a damped H, and what follows from H.

    Args:
        hessian: (K, K), or None for the identity.
        damping: times the mean of H's diagonal, is added to the diagonal.

    Raises:
        ValueError: the damped H is not positive definite.
    """

    def __init__(self, hessian: Tensor, damping: float) -> None:
        h = hessian.double()
        h = (h + h.T) / 2
        h = h / h.diagonal().mean()
        h.diagonal().add_(damping)
        self.moment = h
        self.root, info = torch.linalg.cholesky_ex(h)  # M
        if int(info) != 0:
            raise ValueError(
                f"hessian is singular or not positive definite with damping {damping:g}: use a larger damping or more "
                "calibration data"
            )

    def __call__(self, error: Tensor) -> float:
        """The loss of E (N, K) fp64."""
        return float((error @ self.root).square().sum())

    def without(self, product: Tensor, rank: int) -> Tensor:  # (K, K) fp64
        """H less the part along the `rank` directions in which a product L R acts on inputs."""
        _, _, v = _svd(product @ self.root, rank)
        along = self.root @ v
        return self.moment - along @ along.T


def low_rank(rest: Tensor, format: Format, loss: Loss, turns: int) -> Factors:
    """The factors of A (N, K) fp64 in the rank and the factors' format of `format`, rounded as they are stored."""
    u, s, v = _svd(rest @ loss.root, format.rank)
    right = torch.linalg.solve_triangular(loss.root, (v * s).T, upper=False, left=False)
    store = _stores(format)
    best: tuple[float, Factors] | None = None
    left = u
    for turn in range(turns if format.factor_format is not None else 1):
        if turn:
            # L of the least loss for the stored R.
            left = (rest @ loss.root) @ torch.linalg.pinv(right @ loss.root)
        moment = right @ loss.moment @ right.T
        rounded = store(left, moment)
        # R of the least loss for the stored L; H drops out.
        right = torch.linalg.pinv(_dense(rounded)) @ rest
        other = store(right, None)
        right = _dense(other)
        error = loss(rest - _dense(rounded) @ right)
        if best is None or error < best[0]:
            best = error, (rounded, other)
    assert best is not None
    return best[1]


def _stores(format: Format) -> Callable[[Tensor, Tensor | None], Factor]:
    """What rounds a factor (rows, columns) fp64 to how it is stored, for a moment of its columns if one is given."""
    kept = format.factor_format
    if kept is None:
        dtype = SCALE_DTYPES[format.factor]
        return lambda t, _: t.to(dtype)

    def store(t: Tensor, moment: Tensor | None) -> Factor:
        if moment is None or not bool(moment.diagonal().any()):
            return (kmeans if kept.fitted else rtn).quantize(t, kept)
        return gptq.quantize(t, kept, hessian=moment, damping=1e-6)

    return store


def _dense(factor: Factor) -> Tensor:  # fp64
    return (reference.dequantize(factor) if isinstance(factor, QuantTensor) else factor).double()


def _product(factors: Factors) -> Tensor:  # (N, K) fp64
    return _dense(factors[0]) @ _dense(factors[1])


def _svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """U (N, r), S (r,) and V (K, r) of the largest singular values; by subspace iteration (Halko et al., arXiv
    0909.4061) from a fixed start where that is much less work.
    """
    if min(matrix.shape) <= _EXACT_SIZE or 4 * rank >= min(matrix.shape):
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        return u[:, :rank], s[:rank], vh[:rank].T
    generator = torch.Generator("cpu").manual_seed(0)
    columns = min(2 * rank, min(matrix.shape))
    start = torch.randn(
        matrix.shape[1], columns, generator=generator, dtype=torch.float64, device="cpu"
    )
    basis = torch.linalg.qr(matrix @ start.to(matrix.device)).Q
    for _ in range(_SUBSPACE_STEPS):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis).Q).Q
    u, s, vh = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    return basis @ u[:, :rank], s[:rank], vh[:rank].T


def correct(qt: QuantTensor, weight: Tensor, format: Format, hessian: Tensor | None) -> QuantTensor:
    """A quantized matrix with the low-rank term of `format` that makes up most for what it lost.

    The error of outputs counts if there is a Hessian, else that of weights.
    """
    k = weight.shape[1]
    if hessian is None:
        hessian = torch.eye(k, dtype=torch.float64, device=weight.device)
    rest = weight.double() - reference.dequantize(qt).double()
    return with_factors(qt, format, low_rank(rest, format, Loss(hessian, 0.01), 5))


def with_factors(qt: QuantTensor, format: Format, factors: Factors) -> QuantTensor:
    """The matrix and its low-rank term as one weight in `format`."""
    if qt.format != format.matrix:  # a method that makes a format of its own
        format = qt.format.with_rank(format.rank, format.factor)
    named: dict[str, Tensor] = {}
    for name, shape, factor in zip(
        FACTORS, factor_shapes(format, *qt.shape).values(), factors, strict=True
    ):
        assert tuple(factor.shape) == shape
        if isinstance(factor, QuantTensor):
            named |= {f"{name}_{key}": t for key, t in factor.tensors.items()}
        else:
            named[name] = factor.contiguous()
    return QuantTensor(format, qt.shape, {**qt.tensors, **named})
