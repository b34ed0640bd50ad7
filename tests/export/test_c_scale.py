"""The C rule of requantization at the ends of int32 and at ties, against Python's integers, which have no width."""

from __future__ import annotations

import math
import random
from fractions import Fraction
from importlib import resources
from pathlib import Path

import pytest
import torch
from c_programs import SANITIZED, needs_gcc, on_host

from lowbit.ops import int8

ENDS = (-(2**31), 2**31 - 1)
_MAIN = """\
#define MODEL_BITS 8
#define MODEL_DYADIC {dyadic}
#define MODEL_ROUNDING {rounding}
#include "kernels.h"
static const int32_t cases[][4] = {{{cases}}};
int main(void) {{
  for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); ++i) {{
    const int8_t shift = (int8_t)cases[i][2];
    const model_factor factor = {{&cases[i][1], &shift, 0}};
    if (model_scale(cases[i][0], &factor, 0) != cases[i][3]) return 1;
  }}
  return 0;
}}
"""


def expected(value: int, multiplier: int, shift: int, rounding: int | None) -> int:
    """gemmlowp's rule by `int8.rescale`, which has tests of its own, or a power of two that saturates."""
    if rounding is None:
        tensors = (torch.tensor([v], dtype=torch.int64) for v in (value, multiplier, shift))
        return int(int8.rescale(*tensors)[0])
    half = Fraction(rounding, 2) if shift > 0 else 0
    exact = math.floor(Fraction(value) / Fraction(2) ** shift + half)
    return min(max(exact, ENDS[0]), ENDS[1])


@needs_gcc
@pytest.mark.parametrize("rounding", [None, 0, 1], ids=["dyadic", "floor", "nearest"])
def test_ends_and_ties(rounding: int | None, tmp_path: Path) -> None:
    cases = []
    for _ in range(2000):
        # The sum and the half that is added to it fit: networks are checked for that.
        room = 0 if rounding is None else 2**29
        value = random.choice(
            [ENDS[0], ENDS[1] - room, -3, -1, 0, 1, 3, random.randint(-(2**30), 2**30)]
        )
        multiplier = random.choice([2**30, 2**31 - 1, random.randint(2**30, 2**31 - 1)])
        shift = random.randint(-31, 31) if rounding is None else random.randint(-30, 30)
        cases.append((value, multiplier, shift, expected(value, multiplier, shift, rounding)))
    text = ",".join(
        "{" + ",".join("-2147483647 - 1" if v == ENDS[0] else str(v) for v in case) + "}"
        for case in cases
    )
    kernels = resources.files("lowbit.export.c").joinpath("kernels.h").read_text()
    (tmp_path / "kernels.h").write_text(kernels)
    main = _MAIN.format(dyadic=int(rounding is None), rounding=rounding or 0, cases=text)
    (tmp_path / "main.c").write_text(main)
    assert on_host(tmp_path, *SANITIZED) == (0, "")
