"""The low-rank term of a weight in plain torch."""

from __future__ import annotations

from torch import Tensor


def add_low_rank(weight: Tensor, left: Tensor, right: Tensor) -> Tensor:  # (N, K) fp32
    """weight + L R, with L (N, r) and R (r, K) in any dtype; the product in fp64, rounded to the weight's dtype."""
    return weight + (left.double() @ right.double()).to(weight.dtype)


def low_rank_product(x: Tensor, left: Tensor, right: Tensor) -> Tensor:  # (M, N), dtype of x
    """(x R^T) L^T, in the dtype of x."""
    return x @ right.to(x.dtype).t() @ left.to(x.dtype).t()
