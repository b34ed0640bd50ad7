"""The points of E8: how many there are, that they are of the lattice, and how near normal numbers are to them."""

from __future__ import annotations

import math

import numpy as np
import torch

from lowbit import reference
from lowbit.codebooks import lattice
from lowbit.methods.lattice import nearest

ALL_CODES = torch.arange(1 << 16)


def test_vectors_are_all_of_norm_10_and_some_of_12():
    vectors = np.abs(lattice.e8p_vectors())
    norms = (vectors**2).sum(1)
    assert len(np.unique(vectors, axis=0)) == 256
    assert np.array_equal(np.unique(vectors), [0.5, 1.5, 2.5])
    # Of 8 elements: those of 3/2 up to four, or one 5/2 and one 3/2 at most.
    assert (norms <= 10).sum() == sum(math.comb(8, i) for i in range(5)) + 8 + 8 * 7 == 227
    assert (norms == 12).sum() == 29


def test_e8p_has_65536_points_of_the_moved_lattice():
    points = reference.e8p_values(ALL_CODES, 16)
    assert len(points.unique(dim=0)) == 1 << 16
    unmoved = points - torch.where(ALL_CODES >> 15 > 0, 0.25, -0.25)[:, None]
    # Halves of odd numbers with an even sum: D8 + 1/2, which is a coset in E8.
    assert bool(((unmoved * 2) % 2 == 1).all())
    assert bool((unmoved.sum(1) % 2 == 0).all())


def test_small_points_are_of_e8_and_the_shortest():
    points = torch.from_numpy(lattice.e8_points())
    norms = points.square().sum(1)
    assert len(points.unique(dim=0)) == 256
    assert norms.unique(return_counts=True)[1].tolist() == [1, 240, 15]  # of norm 0, 2 and 4
    whole = (points % 1 == 0).all(1)
    halves = ((points * 2) % 2 == 1).all(1)
    assert bool((whole | halves).all())
    assert bool((points.sum(1) % 2 == 0).all())


def test_nearest_is_that_of_all_points():
    x = torch.randn(300, 8) * 1.3
    points = reference.e8p_values(ALL_CODES, 16)
    error = torch.cdist(x.double(), points.double())
    found = nearest(x, 16)
    chosen = error.gather(1, found[:, None])[:, 0]
    # fp32 distances of up to 60: what is within 1e-5 may be taken for as near.
    torch.testing.assert_close(chosen**2, error.amin(1) ** 2, rtol=0, atol=1e-5)
    assert float((found == error.argmin(1)).double().mean()) > 0.99


def test_points_are_nearest_to_themselves():
    codes = ALL_CODES[::7]
    assert torch.equal(nearest(reference.e8p_values(codes, 16), 16), codes)


def test_sums_of_two_points_are_exact():
    codes = torch.randint(0, 1 << 32, (4096,))
    for bits in (24, 32):
        values = reference.e8p_values(codes & (1 << bits) - 1, bits)
        assert torch.equal(values * 512, (values * 512).round())
        assert float(values.abs().max()) < 4
        assert torch.equal(values.half().float(), values)


def test_error_on_normal_numbers():
    """0.0915 an element at 1.03 (E8P), and 0.00965 with a second stage of 16 bits, within 4 standard errors of this
    sample and of another one. With 24 bits it is less than that of Lloyd-Max of 3 bits.
    """
    x = torch.randn(4096, 8, generator=torch.Generator().manual_seed(1))
    for bits, scale, expected in ((16, 1.03, 0.0915), (32, 1.03, 0.00965)):
        error = (reference.e8p_values(nearest(x * scale, bits), bits) / scale - x).square().mean(1)
        allowed = 4 * 2**0.5 * float(error.std()) / len(x) ** 0.5
        assert abs(float(error.mean()) - expected) < allowed < 0.2 * expected, (bits, error.mean())
    third = (reference.e8p_values(nearest(x * 0.98, 24), 24) / 0.98 - x).square().mean()
    assert float(third) < 0.0345
