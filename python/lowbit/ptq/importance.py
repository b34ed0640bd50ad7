"""What each input feature of a linear counts, as a file that llama.cpp reads and writes: an imatrix.

Layers have llama.cpp's names in it (of a model that llama.cpp does not know, or a layer, its own) and
what they hold is summed over tokens of the dense model.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.files import shown
from lowbit.nn.names import listed
from lowbit.nn.stand_ins import stand_ins
from lowbit.ptq.calibration import InputStatistics, as_batches, calibrate
from lowbit.ptq.progress import bar

_SHOWN = 3


def collect_importance(
    model: nn.Module, calibration: Iterable[Any], *, progress: bool = True
) -> dict[str, InputStatistics]:
    """Runs a model and collects the squares of the inputs of every `nn.Linear`, by its name,
    and of what computes one under another name, experts included.

    Args:
        model: dense; it is left as it is.
        calibration: as in `quantize_model`.
        progress: show a bar on stderr.

    Raises:
        TypeError, ValueError: `calibration` is no sequence of inputs, the model has no linear, or an
            input holds NaN or inf.

    Example:
        >>> statistics = collect_importance(model, batches)  # doctest: +SKIP
        >>> save_importance("model.imatrix.gguf", model, statistics)  # doctest: +SKIP
        >>> quantize_model(model, "kmeans4", importance="model.imatrix.gguf")  # doctest: +SKIP
    """
    batches = as_batches(calibration)
    with stand_ins(model):
        names = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]
        if not names:
            raise ValueError("model must have an nn.Linear, it has none")
        with bar(len(batches), "importance", progress) as advance:
            return calibrate(model, names, (), batches, advance)


def save_importance(
    path: str | os.PathLike[str],
    model: nn.Module,
    statistics: Mapping[str, InputStatistics],
    *,
    dataset: str = "",
    chunk_size: int = 512,
) -> None:
    """Writes an imatrix file, a GGUF. Layers that no input has reached, or zeros alone, are not in it.

    Args:
        path: the file; if anything raises, what was there stays.
        model: what the statistics are of.
        statistics: by the names of its linears, as `collect_importance` makes them.
        dataset: what the inputs were, for whoever reads the file.
        chunk_size: tokens of an input, at least 1: llama.cpp counts in chunks of so many.

    Raises:
        ImportError: package gguf is not installed.
        ValueError: nothing is known of any layer, the sum of a layer's squares does not fit fp32, or
            `chunk_size` is below 1.
    """
    imatrix = _imatrix()
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    stored = _stored_names(model, statistics)
    entries = {}
    for name, found in statistics.items():
        if found.missing is not None:
            continue
        sums = found.square_sums.float().cpu()
        if not bool(torch.isfinite(sums).all()) or not bool(sums.any()):
            top = float(found.absmax.max())
            raise ValueError(f"{name}: squares of inputs up to {top:.3g} do not fit fp32")
        counts = torch.tensor([found.samples], dtype=torch.float32, device="cpu")
        entries[stored[name]] = imatrix.Entry(sums[None], counts, stored[name])
    if not entries:
        raise ValueError(
            f"statistics say nothing of any layer: {listed(statistics) or 'there is none'}"
        )
    chunks = math.ceil(max(found.samples for found in statistics.values()) / chunk_size)
    imatrix.write(path, imatrix.Imatrix(entries, (dataset,), chunks, chunk_size))


def load_importance(path: str | os.PathLike[str], model: nn.Module) -> dict[str, Tensor]:
    """The mean square of each input feature, (K,) fp32 on the CPU, by the names of a model's linears.

    Args:
        path: an imatrix of llama.cpp, in a GGUF or in the older binary form, or of `save_importance`.
        model: the model that it is of; linears without an entry are left out.

    Warns:
        UserWarning: the file has entries of matrices that the model has not.

    Raises:
        ImportError: package gguf is not installed.
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, of another model, or an entry has another length than its layer
            has inputs, or holds NaN, inf, or zeros alone; the message names file, tensor and value.
    """
    imatrix = _imatrix()
    entries = imatrix.read(path).entries
    linears = _linears(model)
    stored = _stored_names(model, linears)
    found, used = {}, set()
    for name, linear in linears.items():
        entry = entries.get(stored[name]) or entries.get(f"{name}.weight")
        if entry is None:
            continue
        used.add(id(entry))
        what = f"{path}: tensor {shown(entry.tensor)}"
        if tuple(entry.sums.shape) != (1, linear.in_features):
            size = " x ".join(map(str, entry.sums.shape)).removeprefix("1 x ")
            raise ValueError(
                f"{what} has {size} values; layer {name!r} has {linear.in_features} input features"
            )
        if not float(entry.counts):
            continue
        found[name] = _checked(f"{what}: ", entry.means[0])
    if not used:
        raise ValueError(
            f"{path}: is the imatrix of another model: it has {_some(entries)}; expected names such as "
            f"{_some(stored.values())}"
        )
    if unused := sorted(key for key, entry in entries.items() if id(entry) not in used):
        warnings.warn(
            f"{path}: {len(unused)} entries are of matrices that a {type(model).__name__} has not: "
            f"{listed(unused)}",
            stacklevel=2,
        )
    return found


def as_importance(
    importance: Mapping[str, Tensor] | str | os.PathLike[str] | None, model: nn.Module
) -> dict[str, Tensor] | None:
    """What `quantize_model` was given, checked: the importance of input features by names of linears.

    Raises:
        TypeError, ValueError: as `load_importance`; a name is not one of a linear of the model.
    """
    if importance is None:
        return None
    if not isinstance(importance, Mapping):
        return load_importance(importance, model)
    linears = _linears(model)
    for name, values in importance.items():
        if name not in linears:
            raise ValueError(f"importance names {name!r:.200}, which is no nn.Linear of the model")
        if not isinstance(values, Tensor) or not values.is_floating_point():
            got = values.dtype if isinstance(values, Tensor) else type(values).__name__
            raise TypeError(f"importance of {name!r} must be a floating tensor, got {got}")
        features = linears[name].in_features
        if tuple(values.shape) != (features,):
            raise ValueError(
                f"importance of {name!r} must have shape ({features},), a value for each input feature, "
                f"got {tuple(values.shape)}"
            )
        _checked(f"importance of {name!r}: ", values)
    return dict(importance)


def _checked(what: str, values: Tensor) -> Tensor:
    bad = ~(torch.isfinite(values) & (values >= 0))
    if bool(bad.any()):
        k = int(bad.nonzero()[0])
        raise ValueError(
            f"{what}value {k} is {float(values[k])}; expected a finite number that is not negative"
        )
    if not bool(values.any()):
        raise ValueError(f"{what}all {len(values)} values are 0: no input feature would count")
    return values


def _linears(model: nn.Module) -> dict[str, nn.Linear]:
    named = model.named_modules(remove_duplicate=False)
    return {name: module for name, module in named if isinstance(module, nn.Linear)}


def _stored_names(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """The name of the weight's tensor in a file, by that of the module."""
    config: Any = getattr(model, "config", None)
    names = list(names)
    own = {name: f"{name}.weight" for name in names}
    if not hasattr(config, "get_text_config"):
        return own
    config = config.get_text_config()
    layers = getattr(config, "num_hidden_layers", 0)
    return own | _imatrix().tensor_names(config.model_type, layers, names)


def _some(names: Iterable[str]) -> str:
    found = list(names)
    return ", ".join(map(shown, found[:_SHOWN])) + (", ..." if len(found) > _SHOWN else "")


def _imatrix() -> Any:
    try:
        from lowbit.io import imatrix
    except ModuleNotFoundError as e:
        raise ImportError(
            f"{e.name} is not installed; imatrix files need it: pip install 'lowbit[models]'"
        ) from None
    return imatrix
