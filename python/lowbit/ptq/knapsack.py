"""The multiple-choice knapsack: one option for every item, the least error that fits.

Solved by dynamic programming over the size: exactly where all sizes have a common unit that is
large enough, as those of weights have, and else for sizes rounded up.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# States of the table: for each, every item keeps a byte.
MAX_STATES = 1 << 18


@dataclass(frozen=True)
class Solution:
    """What `solve` found.

    Attributes:
        choices: the option of every item.
        resolution: 1 if the solution is optimal; else every size was rounded up to a multiple of
            this number above the smallest of its item.
        frontier: (size, error) of the best choices at every capacity, where the error falls.
    """

    choices: tuple[int, ...]
    resolution: int
    frontier: tuple[tuple[int, float], ...]


def smallest(sizes: Sequence[Sequence[int]]) -> int:
    """The least capacity that can be met."""
    return sum(min(options) for options in sizes)


def solve(
    sizes: Sequence[Sequence[int]],
    errors: Sequence[Sequence[float]],
    capacity: int,
    max_states: int = MAX_STATES,
) -> Solution:
    """Chooses one option of every item so that the sizes add up to at most `capacity` and the
    errors to the least possible.

    Deterministic: of equal errors the smaller size wins, then an item's earlier option.

    Args:
        sizes: of the options of every item, not negative.
        errors: of the same options, finite.
        capacity: at least `smallest(sizes)`.
        max_states: how many sizes are told apart, about.

    Raises:
        ValueError: nothing fits, an item has no options, or an error is not finite.
    """
    options = [_useful(s, e) for s, e in zip(sizes, errors, strict=True)]
    base = smallest(sizes)
    if capacity < base:
        raise ValueError(f"capacity must be at least {base}, the smallest possible, got {capacity}")
    offsets = [
        [sizes[i][j] - sizes[i][useful[0]] for j in useful] for i, useful in enumerate(options)
    ]
    span = sum(max(each) for each in offsets)
    unit = math.gcd(*(offset for each in offsets for offset in each)) or 1
    resolution = 1
    if span // unit >= max_states:
        unit = resolution = -(-span // max_states)
    best, picks = np.zeros(1), []
    for i, (useful, each) in enumerate(zip(options, offsets, strict=True)):
        steps = [-(-offset // unit) for offset in each]
        new = np.full(len(best) + max(steps), np.inf)
        pick = np.zeros(len(new), np.min_scalar_type(len(useful)))
        for j, (option, step) in enumerate(zip(useful, steps, strict=True)):
            there, error = slice(step, step + len(best)), best + errors[i][option]
            better = error < new[there]
            new[there][better] = error[better]
            pick[there][better] = j
        best = new
        picks.append((useful, steps, pick))
    state = int(best[: (capacity - base) // unit + 1].argmin())
    choices = []
    for useful, steps, pick in reversed(picks):
        j = pick[state]
        choices.append(useful[j])
        state -= steps[j]
    falls = np.flatnonzero(best < np.minimum.accumulate(np.concatenate([[np.inf], best[:-1]])))
    frontier = tuple((base + int(c) * unit, float(best[c])) for c in falls)
    return Solution(tuple(reversed(choices)), resolution, frontier)


def _useful(sizes: Sequence[int], errors: Sequence[float]) -> list[int]:
    """The options that are better than every smaller one, by size."""
    if not sizes or not all(math.isfinite(error) for error in errors):
        raise ValueError(f"every item must have options with finite errors, got {list(errors)}")
    kept: list[int] = []
    for j in sorted(range(len(sizes)), key=lambda j: (sizes[j], errors[j], j)):
        if not kept or errors[j] < errors[kept[-1]]:
            kept.append(j)
    return kept
