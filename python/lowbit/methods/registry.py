"""The table of quantization methods and the one function that calls them."""

from __future__ import annotations

import inspect
import numbers
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowbit import packing
from lowbit.forking import alone_after_fork
from lowbit.formats import Format, as_format
from lowbit.methods import (
    bitnet,
    caldera,
    distq,
    fitting,
    gptq,
    grid,
    hqq,
    kde,
    kmeans,
    lattice,
    lloyd,
    multibit,
    nuuq,
    prune,
    rtn,
    scales,
    search,
    sparse,
    trellis,
    twn,
    vq,
)
from lowbit.text import did_you_mean
from lowbit.weights.quantized import QuantTensor, tensor_specs

# Keywords that are tensors, which `quantize_model` finds.
_TENSORS = ("held_out", "hessian", "table", "weights")
METHODS: dict[str, Callable[..., QuantTensor]] = {
    "bitnet": bitnet.quantize,
    "caldera": caldera.quantize,
    "distq": distq.quantize,
    "gptq": gptq.quantize,
    "hqq": hqq.quantize,
    "kde": kde.quantize,
    "kmeans": kmeans.quantize,
    "lattice": lattice.quantize,
    "lloyd": lloyd.quantize,
    "multibit": multibit.quantize,
    "nuuq": nuuq.quantize,
    "prune": prune.quantize,
    "rtn": rtn.quantize,
    "search": search.quantize,
    "trellis": trellis.quantize,
    "twn": twn.quantize,
    "vq": vq.quantize,
}
# The methods of structured formats, by codec: others choose a code for each weight.
_STRUCTURED = {"e8p": "lattice", "trellis": "trellis", "vector": "vq"}


@alone_after_fork
def quantize(
    weight: Tensor,
    format: Format | str,
    method: str | None = None,
    *,
    weights: Tensor | None = None,
    table: Tensor | None = None,
    hessian: Tensor | None = None,
    **options: Any,
) -> QuantTensor:
    """Quantizes a weight matrix.

    Args:
        weight: (N, K) in fp32, bf16, fp16 or fp64, finite, not empty; on any device, where the
            result is too.
        format: a Format, or a name that `lowbit.formats.parse` reads.
        method: "rtn" (round to nearest), "gptq" (least error of outputs), "caldera" (that, with a
            low-rank term), "hqq" (fits float zeros), "search" (the best scales, of either sign, and
            tables), "twn" (ternary with a threshold), "bitnet" (binary and ternary by mean|w|), or,
            for the tables of a format without values of its own, "kmeans" (the best ones), "lloyd"
            (Lloyd's algorithm), "kde" (from a sample), "distq" (quantiles), "multibit" (sums of
            signs), "prune" (k-means of what magnitude pruning leaves) or "nuuq" (integers; the
            result has another format); by default "rtn", for such tables "kmeans", or "search"
            where their scales are signed integers. Structured formats have one method each, the
            default: "lattice" (E8P), "trellis", or "vq" (tables of vectors).
        weights: (N, K) or (K,), the importance of each weight; only for "kmeans", "lloyd",
            "multibit", "prune", "search", "vq" and the choice of outliers.
        table: the values of a fitted format, fp32 in the shape that its `table_scope` asks for;
            only for "rtn" and "gptq".
        hessian: (K, K), the second moment of the inputs; for "gptq" and "caldera", which need it, and
            those of structured formats.
        options: further keywords of the method's own function, as `act_order` of "gptq".

    With outliers in the format, every method quantizes the rest of the weight as if they were not
    there: they take the mean of the others in their group, and k-means gives them no importance.
    With a rank in the format, the low-rank term of every method but "caldera" makes up for what the
    quantized matrix has lost.

    Warns:
        UserWarning: scales or outliers are so small that their dtype loses them (fp16 below about 1e-6): how many, and
            what to use instead.

    Raises:
        TypeError, ValueError: an argument is not what is said above, or a scale or an outlier does
            not fit the format's dtype.
        NotImplementedError: the format is of blocks of GGUF that nothing here makes ("iq2_xxs").
    """
    format = as_format(format)
    name = method
    if name is None:
        name = default_method(format) if table is None or format.structured else "rtn"
    check_options(name, options)
    tensors = {"weights": weights, "table": table, "hessian": hessian}
    _check_codec(format, name)
    given = {key: value for key, value in tensors.items() if value is not None} | options
    known = keywords(name)
    if format.outliers:
        return _with_outliers(weight, format, name, given)
    if format.rank and name != "caldera":
        tensor_specs(format, *weight.shape)
        qt = quantize(weight, format.matrix, name, **given)
        return caldera.correct(qt, weight, format, hessian)
    if unused := sorted(given.keys() - known.keys()):
        raise ValueError(f"method {name!r} takes no {unused[0]}")
    missing = sorted(key for key, p in known.items() if p.default is p.empty and key not in given)
    if missing:
        raise ValueError(f"method {name!r} needs {missing[0]}")
    made = METHODS[name](weight, format, **given)
    scales.warn_of_tiny(made)
    return made


def _check_codec(format: Format, method: str) -> None:
    _refuse_blocks(format)
    fitting_method = _STRUCTURED.get(format.codec)
    if fitting_method is not None and method != fitting_method:
        raise ValueError(
            f"method must be {fitting_method!r} for format {format.name!r}, whose codec is {format.codec!r}, "
            f"got {method!r}"
        )


def _refuse_blocks(format: Format) -> None:
    if packing.is_blocks(format):
        raise NotImplementedError(
            f"format must be one that a method makes, got {format.name!r}, whose weights are read from GGUF files; "
            "of about as few bits are 'e8p', 'trellis2' and 'trellis3'"
        )


def _with_outliers(
    weight: Tensor, format: Format, method: str, given: dict[str, Any]
) -> QuantTensor:
    grid.check_weight(weight, format.matrix)
    importance = fitting.check_importance(given.pop("weights", None), weight)
    columns = sparse.find(weight, format, importance)
    if "weights" in keywords(method):
        ones = torch.ones(1, dtype=torch.float32, device=weight.device).expand(weight.shape)
        given["weights"] = sparse.without(ones if importance is None else importance, columns)
    rest = sparse.fill(weight, format, columns)
    qt = quantize(rest, format.matrix, method, **given)
    return sparse.add(qt, format, weight, columns)


def default_method(format: Format) -> str:
    """The method of a format where none is asked for.

    Raises:
        NotImplementedError: no method makes the blocks of the format.
    """
    _refuse_blocks(format)
    if format.structured:
        return _STRUCTURED[format.codec]
    if not format.fitted:
        return "rtn"
    return "search" if search.by_default(format) else "kmeans"


def check_options(method: str, options: Mapping[str, object]) -> None:
    """Compares further keywords of a method with what it takes.

    Raises:
        ValueError: there is no such method, or it takes no such keyword.
        TypeError: a value is not of the kind of the keyword's default, a bool or a number, nor a
            word that its annotation allows.
    """
    if method not in METHODS:
        hint = did_you_mean(str(method), METHODS)
        raise ValueError(
            f"method must be one of {', '.join(sorted(METHODS))}, got {method!r}{hint}"
        )
    known = keywords(method)
    for key, value in options.items():
        if key not in known:
            takes = f"it takes {', '.join(options_of(method)) or 'no options'}"
            hint = did_you_mean(key, options_of(method)) or f"; {takes}"
            raise ValueError(f"method {method!r} takes no {key}{hint}")
        if value is None and "None" in str(known[key].annotation):
            continue
        if isinstance(value, str) and repr(value) in str(known[key].annotation):
            continue
        default = known[key].default
        kinds: dict[type, type] = {bool: bool, int: numbers.Integral, float: numbers.Real}
        kind = kinds.get(type(default))
        if kind and (not isinstance(value, kind) or isinstance(value, bool) != (kind is bool)):
            expected = type(default).__name__
            raise TypeError(f"{key} of method {method!r} must be {expected}, got {value!r:.100}")


def options_of(method: str) -> dict[str, object]:
    """The further keywords of a method with their defaults: `options` of `quantize_model`."""
    return {key: p.default for key, p in keywords(method).items() if key not in _TENSORS}


@dataclass(frozen=True)
class MethodInfo:
    """What a method is.

    Attributes:
        summary: in one line.
        calibrates: whether it learns from `calibration` of `quantize_model`, "needs" it, or does not (False).
        options: its further keywords with their defaults.
    """

    summary: str
    calibrates: bool | str
    options: Mapping[str, object]


def describe() -> dict[str, MethodInfo]:
    """Every method by its name: what it does, whether it learns from calibration, and its options."""
    made = {}
    for name in sorted(METHODS):
        learns: bool | str = "needs" if "hessian" in keywords(name) else calibrates(name)
        summary = (inspect.getdoc(METHODS[name]) or "").partition("\n\n")[0].replace("\n", " ")
        made[name] = MethodInfo(summary, learns, options_of(name))
    return made


def calibrates(method: str | None) -> bool:
    """Whether a method takes what `quantize_model` learns from calibration."""
    return method is not None and not {"hessian", "weights"}.isdisjoint(keywords(method))


def keywords(method: str) -> dict[str, inspect.Parameter]:
    """What a method takes besides the weight and the format."""
    parameters = inspect.signature(METHODS[method]).parameters
    return {key: p for key, p in parameters.items() if p.kind is p.KEYWORD_ONLY}
