"""What `allocate` returns: for every weight the candidates with size and error, and the choice."""

from __future__ import annotations

import dataclasses
import math
import numbers
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lowbit.nn.names import Rule
from lowbit.ptq import knapsack
from lowbit.ptq.recipe import Recipe
from lowbit.ptq.report import text_table

# The budget of a size that was computed in floating point still admits that size.
_SLACK = 1 + 2.0**-50


@dataclass(frozen=True)
class Option:
    """One candidate for one weight: its stored bytes, and the error it would make."""

    rule: Rule
    nbytes: int
    error: float


@dataclass(frozen=True)
class Choice:
    """What one weight gets.

    Attributes:
        names: the modules that share the weight.
        shape: (N, K).
        options: the candidates, in the order in which they were given.
        chosen: the index of the one that was chosen.
    """

    names: tuple[str, ...]
    shape: tuple[int, int]
    options: tuple[Option, ...]
    chosen: int

    @property
    def option(self) -> Option:
        """The candidate that was chosen."""
        return self.options[self.chosen]


@dataclass(frozen=True)
class Allocation:
    """The choices for all weights.

    Attributes:
        choices: one for every weight, in the order of the model.
        left: the modules that are left as they are, with the reason.
        resolution: 1 if no other choice has a smaller error; else choices were compared with sizes
            rounded up to multiples of so many bytes.
        frontier: (bits per weight, error) of the best choices at other budgets.
    """

    choices: tuple[Choice, ...]
    left: Mapping[str, str]
    resolution: int
    frontier: tuple[tuple[float, float], ...]

    @property
    def recipe(self) -> Recipe:
        """What `quantize_model` takes: every name with its format, method and options."""
        return Recipe(
            {f"^{re.escape(name)}$": c.option.rule for c in self.choices for name in c.names}
        )

    @property
    def weights(self) -> int:
        """How many weights there are; shared ones count once."""
        return sum(math.prod(c.shape) for c in self.choices)

    @property
    def nbytes(self) -> int:
        """Stored bytes of all weights: codes, scales, zeros and tables."""
        return sum(c.option.nbytes for c in self.choices)

    @property
    def bits_per_weight(self) -> float:
        """Average stored bits of a weight."""
        return 8 * self.nbytes / self.weights

    @property
    def error(self) -> float:
        """The sum of what was minimised."""
        return sum(c.option.error for c in self.choices)

    @property
    def uniform(self) -> dict[str, tuple[float, float]]:
        """(bits per weight, error) of every candidate if all weights got it, by its label."""
        return {
            label(first.rule): (
                8 * sum(c.options[j].nbytes for c in self.choices) / self.weights,
                sum(c.options[j].error for c in self.choices),
            )
            for j, first in enumerate(self.choices[0].options)
        }

    def at(self, budget: float | None = None, *, budget_bytes: int | None = None) -> Allocation:
        """The best choices at another budget, given as for `allocate`, from the same measurements.

        Raises:
            TypeError, ValueError: a budget is wrong, or below what the smallest candidates need.
        """
        return choose(self.choices, self.left, as_bytes(budget, budget_bytes, self.weights))

    def to_dict(self) -> dict[str, object]:
        """Everything as plain data for JSON."""
        return {
            "layers": [
                {
                    "names": list(c.names),
                    "shape": list(c.shape),
                    "chosen": label(c.option.rule),
                    "options": [
                        {"label": label(o.rule), "nbytes": o.nbytes, "error": o.error}
                        for o in c.options
                    ],
                }
                for c in self.choices
            ],
            "left": dict(self.left),
            "nbytes": self.nbytes,
            "bits_per_weight": self.bits_per_weight,
            "error": self.error,
            "resolution": self.resolution,
            "uniform": {name: list(point) for name, point in self.uniform.items()},
            "frontier": [list(point) for point in self.frontier],
        }

    def __str__(self) -> str:
        total = self.error or 1.0
        rows = [("layer", "chosen", "shape", "bits/weight", "error", "share")]
        for c in self.choices:
            bits = 8 * c.option.nbytes / math.prod(c.shape)
            share = f"{100 * c.option.error / total:.1f}%"
            shape, chosen = f"{c.shape[0]}x{c.shape[1]}", label(c.option.rule)
            rows.append(
                (" = ".join(c.names), chosen, shape, f"{bits:.3f}", f"{c.option.error:.4g}", share)
            )
        average = f"{self.bits_per_weight:.3f}"
        rows.append((f"{len(self.choices)} layers", "", "", average, f"{self.error:.4g}", ""))
        for name, (bits, error) in self.uniform.items():
            rows.append((f"all {name}", "", "", f"{bits:.3f}", f"{error:.4g}", ""))
        return text_table(rows, left=3)


def choose(choices: Sequence[Choice], left: Mapping[str, str], capacity: int) -> Allocation:
    """The options of least error that fit `capacity` bytes, whatever was chosen before.

    Raises:
        ValueError: nothing fits.
    """
    sizes = [[option.nbytes for option in c.options] for c in choices]
    numel = sum(math.prod(c.shape) for c in choices)
    check_capacity(sizes, capacity, numel)
    found = knapsack.solve(sizes, [[o.error for o in c.options] for c in choices], capacity)
    return Allocation(
        tuple(
            dataclasses.replace(c, chosen=chosen)
            for c, chosen in zip(choices, found.choices, strict=True)
        ),
        left,
        found.resolution,
        tuple((8 * size / numel, error) for size, error in found.frontier),
    )


def as_bytes(budget: float | None, budget_bytes: int | None, numel: int) -> int:
    """A budget of `numel` weights, in stored bits of a weight or in bytes, as bytes."""
    if (budget is None) == (budget_bytes is None):
        raise ValueError(
            f"give budget or budget_bytes, one of the two, got {budget} and {budget_bytes}"
        )
    value = budget if budget_bytes is None else budget_bytes
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"a budget must be a number, got {value!r}")
    if not 0 < value < math.inf:
        raise ValueError(f"a budget must be positive and finite, got {value}")
    return int(value) if budget is None else math.floor(budget * numel / 8 * _SLACK)


def check_capacity(sizes: Sequence[Sequence[int]], capacity: int, numel: int) -> None:
    """Raises a ValueError where the smallest options of `numel` weights take more bytes."""
    least = knapsack.smallest(sizes)
    if capacity < least:
        raise ValueError(
            f"budget of {8 * capacity / numel:.4g} bits per weight ({capacity} bytes) cannot be met: "
            f"the smallest possible is {8 * least / numel:.4f} bits per weight ({least} bytes)"
        )


def label(rule: Rule) -> str:
    """A rule in a few characters: the format, and the method if it has one."""
    name = rule.format.name if rule.format is not None else "dense"
    return f"{name} ({rule.method})" if rule.method else name
