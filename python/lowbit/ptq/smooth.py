"""Scales that move between a layer and the linears that read it: AWQ (Lin et al., arXiv 2306.00978)
and SmoothQuant (Xiao et al., arXiv 2211.10438).

Features of a linear's input are divided by s, in the layer before it, and the columns of its weight
multiplied by s: products stay as they were, but the weights (AWQ) or the activations (SmoothQuant)
quantize better.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from lowbit.formats import Format, as_format
from lowbit.methods.registry import quantize

_TINY = 1e-8


def _check(values: Tensor, name: str, weights: Sequence[Tensor]) -> None:
    if not weights:
        raise ValueError("weights must hold at least one (N, K) matrix, got none")
    k = weights[0].shape[-1]
    for i, weight in enumerate(weights):
        if weight.dim() != 2 or weight.shape[1] != k:
            raise ValueError(f"weights[{i}] must be (N, {k}), got shape {tuple(weight.shape)}")
    if tuple(values.shape) != (k,):
        raise ValueError(f"{name} must have shape ({k},), got {tuple(values.shape)}")
    if not bool((torch.isfinite(values) & (values >= 0)).all()):
        raise ValueError(f"{name} must be finite and not negative")


@torch.no_grad()
def smooth_scales(absmax: Tensor, weights: Sequence[Tensor], alpha: float = 0.5) -> Tensor:
    """SmoothQuant's scales, max|x_j|^alpha / max|W_j|^(1 - alpha), (K,) fp32.

    Both maxima are at least 1e-8 (our reading), so a feature that is always 0 does no harm.

    Args:
        absmax: the largest magnitude of every input feature, (K,): `InputStatistics.absmax`.
        weights: the (N, K) weights of all linears that read these features.
        alpha: 0 to 1, how much of the range moves to the weights.

    Raises:
        ValueError: a shape does not fit, `absmax` is negative or not finite, alpha is out of range.
    """
    _check(absmax, "absmax", weights)
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be 0 to 1, got {alpha}")
    columns = torch.stack([w.float().abs().amax(0) for w in weights]).amax(0)
    numerator = absmax.float().clamp(min=_TINY) ** alpha
    return numerator / columns.clamp(min=_TINY) ** (1 - alpha)


@torch.no_grad()
def awq_scales(
    absmean: Tensor,
    hessian: Tensor,
    weights: Sequence[Tensor],
    format: Format | str,
    method: str | None = None,
    grid: int = 20,
) -> Tensor:
    """AWQ's scales: of mean|x_j|^a, a = 0, 1 / grid, ..., 1, those with the least output error.

    The error is ||(Q(W s) / s - W) X^T||^2 over all weights, computed from the second moment of X
    in fp64. As in the authors' code scales are divided by sqrt(max * min). Interpretation: a = 1 is
    tried too, and among equal errors the smallest a wins; a = 0 changes nothing.

    Args:
        absmean: the mean magnitude of every input feature, (K,): `InputStatistics.absmean`.
        hessian: X^T X / samples, (K, K).
        weights: the (N, K) weights of all linears that read these features.
        format: what the weights will be quantized to.
        method: how, as in `lowbit.quantize`.
        grid: steps of a, at least 1.

    Returns:
        s, (K,) fp32.

    Raises:
        ValueError: a shape does not fit, `absmean` is negative or not finite, `grid` is below 1.
    """
    _check(absmean, "absmean", weights)
    format, k = as_format(format), len(absmean)
    if tuple(hessian.shape) != (k, k):
        raise ValueError(f"hessian must have shape ({k}, {k}), got {tuple(hessian.shape)}")
    if grid < 1:
        raise ValueError(f"grid must be at least 1, got {grid}")
    h = hessian.double()
    best, least = torch.ones(k, dtype=torch.float32, device=absmean.device), torch.inf
    for step in range(grid + 1):
        s = absmean.float().clamp(min=_TINY) ** (step / grid)
        s = s / (s.max() * s.min()).sqrt()
        loss = 0.0
        for weight in weights:
            made = quantize(weight.float() * s, format, method).dequantize() / s
            error = (made - weight).double()
            loss += float(((error @ h) * error).sum())
        if loss < least:
            best, least = s, loss
    return best


@torch.no_grad()
def fold(previous: nn.Module, linears: Sequence[nn.Linear], scales: Tensor) -> None:
    """Divides the outputs of `previous` by `scales` and multiplies the columns of `linears`, in place.

    Args:
        previous: a norm over the last dimension whose weight, and bias if any, it multiplies and
            adds last (LayerNorm, RMSNorm and their like), or a linear. What lies between it and
            `linears` must keep a factor per feature: nothing at all, a product with a gate, the
            average over values of an attention (with as many heads for values as for queries).
            All readers of `previous` must be in `linears`.
        linears: dense linears with K input features.
        scales: (K,), positive and finite.

    Raises:
        TypeError: a module is of another kind.
        ValueError: a shape does not fit, scales are not positive, a result is NaN or inf in the
            dtype of its weight, or a norm with its weight divided does not divide its output (one
            that multiplies by 1 + weight).
        Whatever is raised, the weights are as they were before.
    """
    k = len(scales)
    if scales.dim() != 1 or not bool((torch.isfinite(scales) & (scales > 0)).all()):
        raise ValueError(f"scales must be (K,), positive and finite, got {tuple(scales.shape)}")
    if not linears:
        raise ValueError("linears must hold at least one linear, got none")
    for linear in linears:
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linears must be nn.Linear, got {type(linear).__name__}")
        if linear.in_features != k:
            raise ValueError(f"linears must have {k} input features, got {linear.in_features}")
    weight, bias = previous._parameters.get("weight"), getattr(previous, "bias", None)
    if weight is None or not isinstance(bias, (nn.Parameter, type(None))):
        raise TypeError(
            f"previous must be a norm with a weight or a linear, got {type(previous).__name__}"
        )
    if weight.shape[0] != k or weight.dim() != (2 if isinstance(previous, nn.Linear) else 1):
        raise ValueError(
            f"previous must have {k} output features, its weight has shape {tuple(weight.shape)}"
        )
    changed: dict[Tensor, Tensor] = {weight: _divided(weight, scales)}
    if bias is not None:
        changed[bias] = _divided(bias, scales)
    for linear in linears:
        changed[linear.weight] = linear.weight * scales.to(linear.weight)
    if not all(bool(torch.isfinite(t).all()) for t in changed.values()):
        raise ValueError(
            f"scales up to {float(scales.max()):g} make weights of {weight.dtype} NaN or inf"
        )
    if not isinstance(previous, nn.Linear):
        _check_divides(previous, weight, bias, k)
    with _kept(changed):
        for t, values in changed.items():
            t.copy_(values)


@contextlib.contextmanager
def _kept(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Tensors get their values back if the body raises."""
    before = [(t, t.clone()) for t in tensors]
    try:
        yield
    except BaseException:
        for t, values in before:
            t.copy_(values)
        raise


def _divided(t: Tensor, scales: Tensor) -> Tensor:
    by = scales.to(t)
    return t / (by if t.dim() == 1 else by.unsqueeze(1))


def _check_divides(norm: nn.Module, weight: Tensor, bias: Tensor | None, k: int) -> None:
    """Runs the norm with its weight halved: its output must be half as large."""
    x = torch.linspace(-1, 2, 2 * k, dtype=torch.float32, device=weight.device).sin().view(2, -1)
    x = x.to(weight.dtype)
    before = norm(x)
    halved = [weight] if bias is None else [weight, bias]
    kept = [t.clone() for t in halved]
    try:
        for t in halved:
            t.copy_(t / 2)
        after = norm(x)
    finally:
        for t, values in zip(halved, kept, strict=True):
            t.copy_(values)
    bound = 8 * torch.finfo(weight.dtype).eps * before.abs().max()
    if before.shape != x.shape or bool(((after * 2 - before).abs() > bound).any()):
        raise ValueError(
            f"previous ({type(norm).__name__}) does not multiply by its weight last: "
            "its output cannot be divided by changing it"
        )
