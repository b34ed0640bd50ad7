"""SparseTerm: a few weights of each row at their columns, a term of a weight that is a sum of terms."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class SparseTerm(NamedTuple):
    """S (N, K) with S[n, columns[n, i]] = values[n, i], and 0 elsewhere.

    columns (N, P) int32, ascending in each row; values (N, P) in fp16 or fp32, on the same device.
    """

    columns: Tensor
    values: Tensor
