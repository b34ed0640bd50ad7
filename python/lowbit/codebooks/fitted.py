"""Quantiles of distributions that are fitted to moments, for many blocks of weights at a time, in numpy
float64.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from lowbit.codebooks.distributions import Array, special

DISTRIBUTIONS = ("beta", "normal", "student_t")


class Moments(NamedTuple):
    """Of R blocks, (R, 1) each: mean, variance (the mean squared distance to the mean), excess
    kurtosis (0 for a block of equal weights) and max |x|.
    """

    mean: Array
    variance: Array
    kurtosis: Array
    absmax: Array


def fitted_quantiles(distribution: str, moments: Moments, p: Array) -> Array:
    """The values, (R, P), whose probability is p, (P,), in (0, 1).

    "normal": mean and variance. "student_t": nu = 4 + 6 / kurtosis, from 4.5 to 100, then mean and
    variance. "beta": on [-absmax, absmax], mean and variance.
    """
    functions = {"beta": _beta, "normal": _normal, "student_t": _student_t}
    if distribution not in functions:
        raise ValueError(f"distribution must be one of {DISTRIBUTIONS}, got {distribution!r}")
    return functions[distribution](moments, p)


def _normal(m: Moments, p: Array) -> Array:
    return m.mean + np.sqrt(m.variance) * special().ndtri(p)


def _student_t(m: Moments, p: Array) -> Array:
    # Kurtosis at or below that of a normal variable: as near to it as nu may come.
    nu = np.clip(4 + 6 / np.maximum(m.kurtosis, 1e-3), 4.5, 100)
    return m.mean + np.sqrt(m.variance * (nu - 2) / nu) * special().stdtrit(nu, p)


def _beta(m: Moments, p: Array) -> Array:
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = (m.mean / m.absmax + 1) / 2
        total = mean * (1 - mean) / (m.variance / m.absmax**2 / 4) - 1
    # Weights that are all at +-absmax would have total 0, and equal weights an infinite one.
    flat = m.variance == 0
    total = np.where(flat, 2, np.maximum(total, 1e-2))
    mean = np.where(flat, 0.5, np.clip(mean, 1e-6, 1 - 1e-6))
    values = (2 * special().betaincinv(mean * total, (1 - mean) * total, p) - 1) * m.absmax
    return np.where(flat, m.mean, values)
