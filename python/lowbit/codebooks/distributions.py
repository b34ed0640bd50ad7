"""Distributions of weights, in numpy float64: density, distribution function, quantiles, and the
mean below a bound. They are symmetric about 0, but for a Beta with a != b.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def special() -> Any:
    """scipy.special, which the codebooks need and the rest of the package does not."""
    try:
        import scipy.special
    except ImportError as e:
        raise ImportError("this codebook needs scipy: pip install lowbit[codebooks]") from e
    return scipy.special


class Distribution(Protocol):
    """What a codebook asks of a distribution, which is hashable; every method takes and returns fp64
    arrays.
    """

    def __hash__(self) -> int:
        """Equal distributions have equal hashes."""

    def pdf(self, x: Array) -> Array:
        """The density."""

    def cdf(self, x: Array) -> Array:
        """The probability of values up to x."""

    def sf(self, x: Array) -> Array:
        """The probability of values above x: 1 - `cdf` without its cancellation."""

    def ppf(self, p: Array) -> Array:
        """The value whose `cdf` is p."""

    def partial_mean(self, x: Array) -> Array:
        """The integral of t * pdf(t) for t up to x."""


@dataclass(frozen=True)
class Normal:
    """N(0, 1)."""

    def pdf(self, x: Array) -> Array:
        """exp(-x^2 / 2) / sqrt(2 pi)."""
        return np.exp(-0.5 * np.square(x)) / math.sqrt(2 * math.pi)

    def cdf(self, x: Array) -> Array:
        """Phi(x)."""
        return special().ndtr(x)

    def sf(self, x: Array) -> Array:
        """Phi(-x)."""
        return special().ndtr(-x)

    def ppf(self, p: Array) -> Array:
        """The inverse of Phi."""
        return special().ndtri(p)

    def partial_mean(self, x: Array) -> Array:
        """-pdf(x)."""
        return -self.pdf(x)


@dataclass(frozen=True)
class StudentT:
    """Student's t with nu > 1 degrees of freedom, scale 1."""

    nu: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.nu) and self.nu > 1):
            raise ValueError(f"nu must be finite and above 1, got {self.nu}")

    def pdf(self, x: Array) -> Array:
        """(1 + x^2 / nu)^(-(nu + 1) / 2), normalised."""
        log = math.lgamma((self.nu + 1) / 2) - math.lgamma(self.nu / 2)
        log -= 0.5 * math.log(self.nu * math.pi)
        return np.exp(log - (self.nu + 1) / 2 * np.log1p(np.square(x) / self.nu))

    def cdf(self, x: Array) -> Array:
        """By the incomplete beta function."""
        return special().stdtr(self.nu, x)

    def sf(self, x: Array) -> Array:
        """By symmetry, `cdf` of -x."""
        return self.cdf(-x)

    def ppf(self, p: Array) -> Array:
        """The inverse of `cdf`."""
        # scipy gives a large finite value at 0 and 1.
        inside = special().stdtrit(self.nu, np.clip(p, 1e-300, 1 - 2**-53))
        return np.where(p <= 0, -np.inf, np.where(p >= 1, np.inf, inside))

    def partial_mean(self, x: Array) -> Array:
        """-(nu + x^2) / (nu - 1) * pdf(x)."""
        inside = np.where(np.isfinite(x), x, 0.0)
        value = -(self.nu + np.square(inside)) / (self.nu - 1) * self.pdf(inside)
        return np.where(np.isfinite(x), value, 0.0)


@dataclass(frozen=True)
class Laplace:
    """Density exp(-|x|) / 2, of variance 2."""

    def pdf(self, x: Array) -> Array:
        """exp(-|x|) / 2."""
        return 0.5 * np.exp(-np.abs(x))

    def cdf(self, x: Array) -> Array:
        """One exponential on each side of 0."""
        return np.where(x < 0, self.pdf(x), 1 - self.pdf(x))

    def sf(self, x: Array) -> Array:
        """By symmetry, `cdf` of -x."""
        return self.cdf(-x)

    def ppf(self, p: Array) -> Array:
        """The inverse of `cdf`."""
        with np.errstate(divide="ignore"):
            return np.where(p < 0.5, np.log(2 * p), -np.log(2 * (1 - p)))

    def partial_mean(self, x: Array) -> Array:
        """-(1 + |x|) * pdf(x)."""
        inside = np.where(np.isfinite(x), x, 0.0)
        return np.where(np.isfinite(x), -(1 + np.abs(inside)) * self.pdf(inside), 0.0)


@dataclass(frozen=True)
class Beta:
    """2 y - 1 for y of a Beta(a, b) distribution: values in [-1, 1]."""

    a: float
    b: float

    def __post_init__(self) -> None:
        for name, value in (("a", self.a), ("b", self.b)):
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be finite and positive, got {value}")

    def pdf(self, x: Array) -> Array:
        """y^(a - 1) (1 - y)^(b - 1) / (2 B(a, b)), and 0 outside [-1, 1]."""
        y = np.clip((x + 1) / 2, 0, 1)
        with np.errstate(divide="ignore"):
            value = y ** (self.a - 1) * (1 - y) ** (self.b - 1)
        return np.where(np.abs(x) <= 1, value, 0.0) / (2 * special().beta(self.a, self.b))

    def cdf(self, x: Array) -> Array:
        """The regularised incomplete beta function."""
        return special().betainc(self.a, self.b, np.clip((x + 1) / 2, 0, 1))

    def sf(self, x: Array) -> Array:
        """The same with a and b, and both ends, exchanged."""
        return special().betainc(self.b, self.a, np.clip((1 - x) / 2, 0, 1))

    def ppf(self, p: Array) -> Array:
        """The inverse of `cdf`."""
        return 2 * special().betaincinv(self.a, self.b, p) - 1

    def partial_mean(self, x: Array) -> Array:
        """From the mean of y below a bound, a / (a + b) * I(a + 1, b)."""
        y = np.clip((x + 1) / 2, 0, 1)
        mean = self.a / (self.a + self.b) * special().betainc(self.a + 1, self.b, y)
        return 2 * mean - special().betainc(self.a, self.b, y)
