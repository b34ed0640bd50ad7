"""Codebooks by name and by distribution: tables for `Format.lut(table=...)`, as tuples of fp32
values in ascending order.

A table needs no scale of its own: a format scales the absmax of a group to max |table|.
"""

from lowbit.codebooks.distributions import Beta, Distribution, Laplace, Normal, StudentT
from lowbit.codebooks.optimal import absmax_error, absmax_optimal, af, lloyd_max
from lowbit.codebooks.tables import (
    apot,
    e2m1,
    e3m0,
    fp4_bnb,
    log2,
    log_sqrt2,
    minifloat,
    nf,
    quantiles,
    sf,
)

__all__ = [
    "Beta",
    "Distribution",
    "Laplace",
    "Normal",
    "StudentT",
    "absmax_error",
    "absmax_optimal",
    "af",
    "apot",
    "e2m1",
    "e3m0",
    "fp4_bnb",
    "lloyd_max",
    "log2",
    "log_sqrt2",
    "minifloat",
    "nf",
    "quantiles",
    "sf",
]
