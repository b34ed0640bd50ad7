"""The randomized Hadamard transform of rows, and the Hadamard matrices it is made of, in plain torch.

A row of K = m 2^p numbers is multiplied by H = (H_m (x) S_p) / sqrt(K): S_p is Sylvester's matrix of order 2^p, and
H_m is Paley's of the smallest order m, a multiple of 4 (or 1), for which there is one (Paley, J. Math. Phys. 12, 1933).
H is orthonormal; with random signs in front it makes rows incoherent (QuIP#, https://arxiv.org/abs/2402.04396).
"""

from __future__ import annotations

import functools
import itertools
import math

import numpy as np
import torch
from torch import Tensor

# The factor H_m is multiplied as a matrix.
MAX_ORDER = 1024


def order(k: int) -> int:
    """The order m of the factor that is no power of two, or 1.

    Raises:
        ValueError: there is none for rows of k numbers.

    Example:
        >>> order(4096), order(576), order(896), order(4864)
        (1, 36, 28, 76)
    """
    if k < 1:
        raise ValueError(f"a Hadamard transform takes rows of at least 1 number, got {k}")
    odd = k // (k & -k)
    if odd == 1:
        return 1
    m = 4 * odd
    while k % m == 0 and m <= MAX_ORDER:
        if _construction(m) is not None:
            return m
        m *= 2
    raise ValueError(
        f"no Hadamard transform of rows of {k} numbers: their number must be a power of two times the order of a "
        f"Paley matrix (12, 20, 28, 36, 44, 60, ... up to {MAX_ORDER})"
    )


def matrix(m: int) -> Tensor:  # (m, m) fp32
    """A Hadamard matrix of order 1 or of an order that `order` returns: entries 1 and -1, orthogonal rows."""
    return torch.from_numpy(_paley(m).astype(np.float32))


def transform(
    x: Tensor, signs: Tensor | None = None, transposed: bool = False
) -> Tensor:  # (..., K) fp32
    """H (signs * x) for each row of x in fp32, or signs * (H^T x), which undoes it for signs of 1 and -1.

    signs (K,) are any numbers, all 1 by default.
    """
    x = x.to(torch.float32)
    if signs is None:
        return _times(x, transposed)
    signs = signs.to(torch.float32)
    return signs * _times(x, True) if transposed else _times(signs * x, False)


def _times(x: Tensor, transposed: bool) -> Tensor:  # (..., K) fp32
    k = x.shape[-1]
    m = order(k)
    rows = math.prod(x.shape[:-1])
    y = x.reshape(rows, m, k // m)
    half = 1
    while half < k // m:
        pairs = y.reshape(rows, m, k // m // (2 * half), 2, half)
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        y, half = torch.stack((a + b, a - b), -2), 2 * half
    y = y.reshape(rows, m, k // m)
    if m > 1:
        factor = matrix(m).to(x.device)
        y = (factor.t() if transposed else factor) @ y
    return (y * (1 / math.sqrt(k))).reshape(x.shape)


def _construction(m: int) -> tuple[int, int, int] | None:
    """Which of Paley's two constructions gives order m, and the p and e of its field of p^e elements."""
    if m % 4:
        return None
    for which, q in ((1, m - 1), (2, m // 2 - 1)):
        power = _prime_power(q)
        if power is not None and q % 4 == (3 if which == 1 else 1):
            return (which, *power)
    return None


def _prime_power(q: int) -> tuple[int, int] | None:
    """(p, e) with p prime and q = p^e."""
    p = next((p for p in range(2, math.isqrt(max(q, 0)) + 1) if q % p == 0), q)
    if p < 2:
        return None
    e = round(math.log(q, p))
    return (p, e) if p**e == q else None


@functools.lru_cache(maxsize=16)
def _paley(m: int) -> np.ndarray:  # (m, m) int8
    if m == 1:
        return np.ones((1, 1), np.int8)
    found = _construction(m)
    if found is None:
        raise ValueError(f"Paley's constructions give no Hadamard matrix of order {m}")
    which, p, e = found
    q = p**e
    digits = np.array(list(itertools.product(range(p), repeat=e)))  # of the elements of the field
    differences = (digits[:, None] - digits[None, :]) % p @ p ** np.arange(e - 1, -1, -1)
    bordered = np.ones((q + 1, q + 1), np.int8)
    bordered[1:, 1:] = _quadratic_character(p, e)[differences]
    bordered[0, 0] = 0
    identity = np.eye(q + 1, dtype=np.int8)
    if which == 1:
        bordered[1:, 0] = -1
        return bordered + identity
    ones, turned = np.array([[1, 1], [1, -1]], np.int8), np.array([[1, -1], [-1, -1]], np.int8)
    return np.kron(bordered, ones) + np.kron(identity, turned)


def _quadratic_character(
    p: int, e: int
) -> np.ndarray:  # (p^e,) int8, by the digits of an element as a number
    """1 for squares of the field of p^e elements, -1 for others, 0 for zero.

    The powers of a primitive element go through all elements but zero, squares at even exponents. With the elements as
    polynomials modulo x^e - c(x), x is primitive for some c: the first that gives all powers.
    """
    q = p**e
    for low in itertools.product(range(p), repeat=e):  # the coefficients of c, the highest first
        character = np.zeros(q, np.int8)
        element = (0,) * (e - 1) + (1,)
        for exponent in range(q - 1):
            at = functools.reduce(lambda number, digit: number * p + digit, element)
            if at == 0 or character[at]:
                break
            character[at] = 1 - 2 * (exponent % 2)
            top = element[0]
            element = tuple((a + top * c) % p for a, c in zip((*element[1:], 0), low, strict=True))
        else:
            return character
    raise AssertionError(f"the field of {p}^{e} elements has primitive elements")
