"""What becomes of weights whose values no format holds."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from lowbit.formats import Format, as_format
from lowbit.integrations.memory import return_freed_memory
from lowbit.methods import quantize
from lowbit.weights.quantized import QuantTensor

# A format to quantize them anew to; None leaves the choice to the reader.
Inexact = Format | Literal["dense"] | None


def as_inexact(value: Format | str | None) -> Inexact:
    """The choice that an argument stands for.

    Raises:
        ValueError: it is neither "dense" nor a format.
    """
    if value is None or value == "dense":
        return value  # type: ignore[return-value]
    return as_format(value)


def quantize_anew(weight: Tensor, format: Format) -> tuple[QuantTensor, float]:
    """A weight (N, K) in a format, and the error of its values by their size."""
    made = quantize(weight, format)
    size = float(weight.float().norm())
    error = float((made.dequantize() - weight).norm()) / size if size else 0.0
    return_freed_memory()
    return made, error
