"""The table of quantization methods and the one function that calls them."""

from __future__ import annotations

import inspect
from collections.abc import Callable

from torch import Tensor

from lowbit.formats import Format, as_format
from lowbit.quantize import kmeans, rtn
from lowbit.tensor import QuantTensor

METHODS: dict[str, Callable[..., QuantTensor]] = {"kmeans": kmeans.quantize, "rtn": rtn.quantize}


def quantize(
    weight: Tensor,
    format: Format | str,
    method: str | None = None,
    *,
    weights: Tensor | None = None,
    table: Tensor | None = None,
) -> QuantTensor:
    """Quantizes a weight matrix.

    Args:
        weight: (N, K) in fp32, bf16, fp16 or fp64, finite, not empty; on any device, where the
            result is too.
        format: a Format, or a name that `lowbit.formats.parse` reads.
        method: "rtn" (round to nearest) or "kmeans" (fits the tables of a format without values of
            its own); by default the one of these that the format wants.
        weights: (N, K) or (K,), the importance of each weight; only for "kmeans".
        table: the values of a fitted format, fp32 in the shape that its `table_scope` asks for;
            only for "rtn".

    Raises:
        TypeError, ValueError: an argument is not what is said above, or a scale does not fit the
            format's dtype.
    """
    format = as_format(format)
    name = method
    if name is None:
        name = "kmeans" if format.fitted and table is None else "rtn"
    if name not in METHODS:
        raise ValueError(f"method must be one of {sorted(METHODS)}, got {method!r}")
    options = {"weights": weights, "table": table}
    given = {key: value for key, value in options.items() if value is not None}
    known = inspect.signature(METHODS[name]).parameters
    if unused := sorted(set(given) - set(known)):
        raise ValueError(f"method {name!r} takes no {unused[0]}")
    return METHODS[name](weight, format, **given)
