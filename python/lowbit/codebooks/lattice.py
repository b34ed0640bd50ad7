"""Points of the lattice E8 as codebooks for 8 weights: E8P of 2^16 points (QuIP#, Tseng et al.,
https://arxiv.org/abs/2402.04396, section 4.2), and a small one for what it leaves.

A code of 16 bits: 0 to 7 the vector of absolute values, 8 to 14 the signs of elements 0 to 6 (1: negative), 15 the move
(1: +1/4). Element 7 has the sign that makes the sum even. A point of the second stage follows at bit 16, with 16 or 8
bits.
"""

from __future__ import annotations

import functools
import itertools

import numpy as np

# What points of the second stage are multiplied by: 1 / 3.45 and 1 / 2.04 of QuIP#, rounded so that sums of two points
# are exact in 11 bits.
SECOND_STAGE = {32: 37 / 128, 24: 63 / 128}


@functools.cache
def e8p_vectors() -> np.ndarray:  # (256, 8) fp32
    """The vectors of absolute values, the last element negative where the sum would be odd.

    E8 + 1/4 is made of D8 + 1/2, vectors of halves of odd numbers with an even sum, moved by 1/4 or -1/4. Sign changes
    that keep the sum even stay in it. The vectors are the 227 of squared norm up to 10 and 29 of the 56 with five 3/2
    and three 1/2; which 29 is our choice, the first ones in lexicographic order.
    """
    inner, shell = [], []
    for halves in itertools.product((1, 3, 5), repeat=8):
        norm = sum(h * h for h in halves)
        if norm <= 40:
            inner.append(halves)
        elif norm == 48 and halves.count(3) == 5:
            shell.append(halves)
    vectors = np.array(inner + shell[: 256 - len(inner)], np.float32) / 2
    odd = vectors.sum(1) % 2 == 1
    vectors[odd, 7] *= -1
    return vectors


@functools.cache
def sign_patterns() -> np.ndarray:  # (128, 8) fp32, 1 and -1
    """By the bits of seven signs: an even number of -1."""
    bits = np.arange(128)[:, None] >> np.arange(7) & 1
    return 1 - 2 * np.concatenate([bits, bits.sum(1, keepdims=True) % 2], 1).astype(np.float32)


@functools.cache
def e8_points() -> np.ndarray:  # (256, 8) fp32
    """The points of E8 of squared norm 0 and 2, and 15 of norm 4: all but the last of 2 and -2 in one element."""
    pairs = []
    for i, j in itertools.combinations(range(8), 2):
        for a, b in itertools.product((1, -1), repeat=2):
            point = np.zeros(8)
            point[[i, j]] = a, b
            pairs.append(point)
    axes = [sign * 2 * np.eye(8)[i] for i in range(8) for sign in (1, -1)]
    points = [np.zeros(8), *pairs, *(sign_patterns() / 2), *axes[:15]]
    return np.array(points, np.float32)


def kernel_table(bits: int) -> np.ndarray:  # (256 or 512, 8) fp32
    """What decodes codes of `bits` bits: `e8p_vectors`, and with 24 bits `e8_points`."""
    return np.concatenate([e8p_vectors(), e8_points()]) if bits == 24 else e8p_vectors()
