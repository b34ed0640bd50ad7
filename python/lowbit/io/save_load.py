"""save and load: a model, or names with tensors, to and from the files of `native.py`.

Loading swaps the dense layers of a model for the quantized ones that the header names, and is
strict: names, shapes and formats are all compared before the model is touched.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.files import cut, shown
from lowbit.forking import alone_after_fork
from lowbit.formats import Format
from lowbit.io import extra_state
from lowbit.io.match import Match, own_state
from lowbit.io.native import (
    Header,
    dense_source,
    layer_source,
    marker_of,
    prefix_of,
    write_checkpoint,
)
from lowbit.io.readers.native import NativeReader
from lowbit.io.safetensors_file import FILE_NAME, Source
from lowbit.io.shards import parse_size, write_shards
from lowbit.nn import PackedModule, QuantLinear, ReorderedLinear
from lowbit.nn.conv import CONVOLUTIONS, packed_conv
from lowbit.nn.embedding import packed_embedding
from lowbit.nn.stand_ins import stand_ins
from lowbit.nn.surgery import replace
from lowbit.weights.quantized import QuantTensor

__all__ = ["load", "load_tensors", "save"]

SUFFIX = ".safetensors"


@alone_after_fork
def save(
    model_or_state: nn.Module | Mapping[str, Any],
    path: str | os.PathLike[str],
    *,
    max_shard_size: int | str | None = None,
) -> Path:
    """Writes a model, or what `load_tensors` gives, to one safetensors file, or to several of a folder.

    Quantized weights are converted to the canonical layout one at a time; shared tensors are
    written once. The file is complete or not there: a failure leaves what was at `path` before.
    A file that is replaced hands down its mode and owner, and a symlink to it stays.

    The extra state of a module (`get_extra_state`) is written too: a dict with strings as keys, a list,
    str, int, float, bool, None, a tensor, or these within each other. Hooks of state dicts are not
    called: what they add is not written. Files of a model of transformers also hold what makes it refuse them
    where lowbit is not imported (`lowbit.io.native.marker_of`).

    Args:
        model_or_state: a module, or names with Tensors, QuantTensors and extra states.
        path: the file if it ends in ".safetensors", else a folder, made if needed, that gets
            "model.safetensors".
        max_shard_size: bytes of tensors, or a text as in "5GB", beyond which a folder gets another file, and
            "model.safetensors.index.json", which `load`, `load_tensors` and `lowbit.load_model` read. A layer is
            never cut.

    Returns:
        The path of the file, or of the index.

    Raises:
        TypeError: a value is neither a dense tensor nor a QuantTensor, safetensors cannot hold its
            dtype, an extra state holds something else than named above (a tuple, bytes, a dict with
            other keys), or a name is no string.
        ValueError: a value is on the meta device; an extra state is deeper than 50 levels or holds an
            int of more than 64 bits; or a name is "__metadata__", not Unicode, or that of a tensor of
            a layer ("a.zeros" beside the layer "a"); `max_shard_size` is no size, or `path` is a file or a
            folder with a "model.safetensors" while there are several files to write.
    """
    limit = None if max_shard_size is None else parse_size(max_shard_size)
    if limit is not None and Path(path).suffix == SUFFIX:
        raise ValueError(f"path must be a folder with max_shard_size, got {path}")
    if isinstance(model_or_state, nn.Module):
        sources, header = module_sources(model_or_state)
    elif isinstance(model_or_state, Mapping):
        sources, header = _state_sources(model_or_state)
    else:
        raise TypeError(
            f"model_or_state must be an nn.Module or a mapping, got {type(model_or_state).__name__}"
        )
    file = Path(path)
    marked = hasattr(model_or_state, "save_pretrained")  # a model of transformers
    if limit is not None:
        return write_shards(file, sources, header, limit, marked=marked)
    if file.suffix != SUFFIX:
        file = file / FILE_NAME
    write_checkpoint(file, sources, header, marked=marked)
    return file


def _check_real(name: str, device: torch.device) -> None:
    if device.type == "meta":
        raise ValueError(f"{cut(name)} is on the meta device and holds no values")


def _same(qt: QuantTensor) -> QuantTensor:
    return qt


class _Collector:
    """Gathers sources; a dense tensor that is the same memory as an earlier one becomes a tie."""

    def __init__(self) -> None:
        self.sources: list[Source] = []
        self.header = Header({}, {})
        self._seen: dict[tuple[object, ...], str] = {}

    def dense(self, name: str, t: object) -> None:
        if not isinstance(t, Tensor):
            raise TypeError(
                f"{cut(name)} must be a Tensor or a QuantTensor, got {type(t).__name__}"
            )
        if t.layout != torch.strided:
            raise TypeError(f"{cut(name)} must be a dense tensor, got one of layout {t.layout}")
        _check_real(name, t.device)
        # What a lazy conjugate or negation looks like, not the memory below it.
        t = t.detach().resolve_conj().resolve_neg()
        memory = (t.device, t.data_ptr(), t.dtype, tuple(t.shape), t.stride())
        first = self._seen.setdefault(memory, name) if t.numel() else name
        if first != name:
            self.header.tied[name] = first
        else:
            self.sources.append(dense_source(name, t))

    def add(self, name: str, value: object) -> None:
        """A dense tensor, or under its name an extra state of any kind."""
        if isinstance(value, Tensor) or not extra_state.is_extra_state(name):
            self.dense(name, value)
            return
        inner: list[Tensor] = []

        def keep(t: Tensor) -> int:
            inner.append(t)
            return len(inner) - 1

        self.header.extra[name] = extra_state.encode(name, value, keep)
        for i, t in enumerate(inner):
            self.dense(f"{name}.{i}", t)

    def layer(
        self,
        name: str,
        identity: object,
        format: Format,
        shape: tuple[int, int],
        make: Callable[[], QuantTensor],
    ) -> None:
        first = self._seen.setdefault(("layer", id(identity)), name)
        if first != name:
            self.header.tied[name] = first
            return
        self.header.layers[name] = (format, shape)
        self.sources.append(layer_source(name, format, shape, make))


def module_sources(model: nn.Module) -> tuple[list[Source], Header]:
    """What `save` writes of a model: tensors to be made, and their meaning.

    Raises:
        TypeError, ValueError: as `save`.
    """
    found = _Collector()
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, PackedModule):
            # Tied modules hold one dict of buffers.
            _check_real(name, module.get_buffer("codes").device)
            found.layer(name, module._buffers, module.format, module.shape, module.quant_tensor)
        for key, value in own_state(module, prefix_of(name)).items():
            found.add(key, value)
    return found.sources, found.header


def checkpoint_state(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a checkpoint that another library writes: beside what `save` writes a marker that
    readers without lowbit stumble on, and the extra states of layers, for `load_state_dict`, which sees no metadata.

    Raises:
        TypeError, ValueError: as `save`.
    """
    sources, header = module_sources(model)
    state = {name: t for source in sources for name, t in source.make().items()}
    state.update(marker_of(header))
    for name in header.layers:
        layer: Any = model.get_submodule(name)
        state[f"{prefix_of(name)}_extra_state"] = layer.get_extra_state()
    return state, header.metadata()


def _state_sources(state: Mapping[str, Any]) -> tuple[list[Source], Header]:
    found = _Collector()
    for name, value in state.items():
        if not isinstance(name, str):
            raise TypeError(f"names must be strings, got {shown(name)}")
        if isinstance(value, QuantTensor):
            _check_real(name, value.device)
            found.layer(name, value, value.format, value.shape, functools.partial(_same, value))
        else:
            found.add(name, value)
    return found.sources, found.header


def load_tensors(
    path: str | os.PathLike[str], device: torch.device | str = "cpu", *, mmap: bool = True
) -> dict[str, Any]:
    """Reads a checkpoint without a model.

    Args:
        path: a safetensors file that `save` or `quantize_file` wrote, or a folder with one or with
            an index.
        device: where the tensors go.
        mmap: leave tensors on the CPU in the mapped file, read as they are used. If the file is
            then cut (by `cp new old`, `rsync --inplace`, a writer that is not `save`), the next use
            kills the process (SIGBUS); if it is overwritten, values change. False reads copies.

    Returns:
        A QuantTensor for the name of every layer and a Tensor for every other; tied names give the
        same object. Names of extra states (m._extra_state) give what `get_extra_state` gave.

    Raises:
        FileNotFoundError: there is no file.
        ValueError: the file is damaged or not a lowbit checkpoint; the message names file, tensor
            and value.
    """
    checkpoint = NativeReader(path, mmap)
    state: dict[str, Any] = {
        name: checkpoint.weight(name, device) for name in checkpoint.header.layers
    }
    state.update((name, checkpoint.tensor(name, device)) for name in checkpoint.dense)
    state.update((name, state[first]) for name, first in checkpoint.header.tied.items())
    state.update((name, checkpoint.extra(name, device)) for name in checkpoint.header.extra)
    return {name: value for name, value in state.items() if name not in checkpoint.inner}


@alone_after_fork
def load(
    model: nn.Module,
    path: str | os.PathLike[str],
    device: torch.device | str = "cpu",
    *,
    mmap: bool = True,
) -> nn.Module:
    """Loads a checkpoint into a model.

    Each layer that the header names takes the place of the `nn.Linear`, `nn.Embedding` or convolution of that
    name, or fills a quantized one of the same format; every other tensor is copied into the model,
    in the model's dtype. What the model shares, it still shares. Extra states are given to
    `set_extra_state`.

    Args:
        model: as it was before it was quantized, or quantized alike; parameters on the meta device
            get the dtype of the file.
        path: as for `load_tensors`.
        device: where tensors of the meta device go; others stay where they are.
        mmap: as for `load_tensors`; what replaces tensors of the meta device stays in the mapped
            file, what is copied into the model does not.

    Returns:
        The model.

    Raises:
        FileNotFoundError: there is no file.
        ValueError: the file is damaged or not a lowbit checkpoint; or names, shapes or formats
            differ from the model's, and then the model is unchanged and the message lists all of
            them.
        Whatever `set_extra_state` of a module raises; the model is then loaded in part.
    """
    checkpoint = NativeReader(path, mmap)
    with stand_ins(model, checkpoint.header.layers):
        _fill(model, checkpoint, device)
    return model


def _fill(model: nn.Module, checkpoint: NativeReader, device: torch.device | str) -> None:
    match = Match(model, checkpoint)
    state: dict[str, Any] = {}
    made: dict[str, PackedModule] = {}
    for name in checkpoint.header.layers:
        module = match.modules[name]
        weight = checkpoint.weight(name, _device_of(module, device))
        if isinstance(module, PackedModule):
            made[name] = module
            state.update((prefix_of(name) + key, t) for key, t in weight.tensors.items())
        else:
            reordered = f"{prefix_of(name)}input_order" in match.wanted
            made[name] = _quantized(module, weight, reordered)
    for name, first in match.tied.items():
        made[name] = _tied(match.modules[name], match.modules[first], made[first])
    for name, module in made.items():
        replace(model, name, module)
    for name in match.wanted:
        stored = checkpoint.header.tied.get(name, name)
        if stored in checkpoint.dense:
            state[name] = checkpoint.tensor(stored, device)
    state.update((name, checkpoint.extra(name, device)) for name in match.extra)
    assign = any(isinstance(t, Tensor) and t.is_meta for t in match.wanted.values())
    model.load_state_dict(state, strict=False, assign=assign)
    if assign:
        match.restore_sharing(model)


def _device_of(module: Any, default: torch.device | str) -> torch.device | str:
    name = "codes" if isinstance(module, PackedModule) else "weight"
    tensor = getattr(module, name)
    return default if tensor.is_meta else tensor.device


def _quantized(module: Any, weight: QuantTensor, reordered: bool = False) -> PackedModule:
    """The quantized module with this weight in place of a dense one; bias and order are loaded later."""
    made: PackedModule
    if isinstance(module, nn.Embedding):
        made = packed_embedding(module, weight, module.weight.dtype)
    elif isinstance(module, CONVOLUTIONS):
        made = packed_conv(module, weight, _bias(module, weight.device))
    else:
        kind = ReorderedLinear if reordered else QuantLinear
        made = kind.from_quant_tensor(weight, _bias(module, weight.device))
    return made.train(module.training)


def _tied(module: nn.Module, first: nn.Module, made: PackedModule) -> PackedModule:
    """What `module` becomes if it shares the weight of `first`, which became `made`."""
    if module is first:
        return made
    if isinstance(module, nn.Linear):
        device = _device_of(made, "cpu")
        return QuantLinear.tied_to(made, _bias(module, device)).train(module.training)
    if isinstance(module, nn.Embedding):
        module = _quantized(module, made.quant_tensor())
    if isinstance(module, CONVOLUTIONS):
        module = packed_conv(module, made.quant_tensor(), _bias(module, _device_of(made, "cpu")))
    assert isinstance(module, PackedModule)
    module.share_weight(made)
    return module


def _bias(linear: Any, device: torch.device | str) -> Tensor | None:
    if linear.bias is None or not linear.bias.is_meta:
        return linear.bias
    return torch.zeros_like(linear.bias, device=device)
