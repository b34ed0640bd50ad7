"""Folders of transformers whose linears another program's kernels take: what GPTQ and compressed-tensors have alike."""

from __future__ import annotations

import functools
import json
import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lowbit.export.layers import (
    Exported,
    dense_tensors,
    on_cpu,
    order_of,
    packed_layers,
    shape_of,
    values_of,
)
from lowbit.files import staged, write_atomically
from lowbit.formats import Format, as_format
from lowbit.integrations.pretrained import check_folders, forget_quantization
from lowbit.io.foreign import CONFIG_NAME, read_json
from lowbit.io.safetensors_file import FILE_NAME, Source, Specs, write
from lowbit.methods import quantize
from lowbit.nn import PackedModule, QuantEmbedding
from lowbit.ptq.file import copy_rest
from lowbit.weights.quantized import SCALE_DTYPES, QuantTensor


@dataclass(frozen=True)
class Integers:
    """How a layer is written: the format of its codes, and whether its columns are in another order."""

    format: Format
    n: int
    k: int
    reordered: bool

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return self.format.bits

    @property
    def group(self) -> int:
        """Columns that share a scale; -1 for all."""
        return -1 if self.format.group is None or self.format.group >= self.k else self.format.group

    @property
    def groups(self) -> int:
        """How many of them there are."""
        return self.format.num_groups(self.k)

    @property
    def symmetric(self) -> bool:
        """Whether the zero point is the middle of the codes."""
        return self.format.zero is None

    @property
    def scale_dtype(self) -> torch.dtype:
        """Of the scales, as the format has it."""
        return SCALE_DTYPES[str(self.format.scale)]


@dataclass(frozen=True)
class Kind:
    """A program's layout.

    Attributes:
        name: of the program.
        obstacle: why a layer cannot be written; None if it can.
        specs: shapes and dtypes of a layer's tensors.
        tensors: a layer's tensors, of codes (N, K) uint8, the canonical tensors, and the group of each column.
        config: quantization_config, for all layers and the names of dense linears.
    """

    name: str
    obstacle: Callable[[Integers], str | None]
    specs: Callable[[Integers], Specs]
    tensors: Callable[[Integers, Tensor, QuantTensor, Tensor | None], dict[str, Tensor]]
    config: Callable[[Mapping[str, Integers], list[str]], dict[str, Any]]


def obstacle(how: Integers, bits: tuple[int, ...]) -> str | None:
    """Why no integers with a scale per group hold a format; None if they do."""
    f = how.format
    if f.codec != "affine" or f.zero not in (None, "int") or f.more_terms:
        return "is none of integers with integer zero points"
    if f.scale not in ("fp32", "fp16", "bf16"):
        return f"has scales in {f.scale}, not in fp32, fp16 or bf16"
    if f.bits not in bits:
        return f"has {f.bits} bits, not one of {bits}"
    return None


def write_folder(
    kind: Kind,
    model: PreTrainedModel,
    folder: str | os.PathLike[str],
    source: str | os.PathLike[str] | None,
    tokenizer: PreTrainedTokenizerBase | None,
    requantize: Format | str | None,
) -> Exported:
    """Writes a model in a program's layout: see `to_gptq`."""
    target = Path(folder)
    if source is not None:
        check_folders(source, target)
    again = None if requantize is None else as_format(requantize)
    done = Exported(target)
    sources: list[Source] = []
    layers: dict[str, Integers] = {}
    embedded: dict[str, PackedModule] = {}
    for name, module in packed_layers(model).items():
        if isinstance(module, QuantEmbedding):
            embedded[f"{name}.weight"] = module
            done.decoded.append(name)
            continue
        layers[name], kept = _plan(kind, name, module, again)
        (done.packed if kept else done.requantized)[name] = layers[name].format.name
        specs = {f"{name}.{part}": spec for part, spec in kind.specs(layers[name]).items()}
        make = functools.partial(_layer, kind, name, module, layers[name], kept)
        sources.append(Source(specs, make))
    if not layers:
        raise ValueError(
            "the model has no packed linear: quantize it first (lowbit.quantize_model)"
        )
    known = _names(model)
    for name, t in dense_tensors(model).items():
        if name not in known:
            # Frequencies of a GGUF file, for one.
            raise NotImplementedError(
                f"{name}: a {type(model).__name__} of this configuration has no such tensor, and would load without it"
            )
        if t.dim() > 1:
            done.dense.append(name.removesuffix(".weight"))
        sources.append(Source({name: (tuple(t.shape), t.dtype)}, functools.partial(_same, name, t)))
    for name, module in embedded.items():
        spec = (shape_of(module), module.dtype)
        sources.append(Source({name: spec}, functools.partial(_decoded, name, module)))
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    config = kind.config(layers, linears)
    with staged(target, FILE_NAME) as place:
        _write_rest(model, place, source, tokenizer)
        content = {**read_json(place / CONFIG_NAME), "quantization_config": config}
        content["architectures"] = [type(model).__name__]
        text = json.dumps(content, indent=2).encode()
        write_atomically(place / CONFIG_NAME, lambda f: f.write(text))
        write(place / FILE_NAME, sources, {"format": "pt"})
    return done


def common(layers: Mapping[str, Integers]) -> tuple[int, int]:
    """Bits and group of most layers."""
    return Counter((how.bits, how.group) for how in layers.values()).most_common(1)[0][0]


def words(codes: Tensor, bits: int) -> Tensor:
    """Rows of codes (R, C) as little-endian streams in words (R, ceil(C * bits / 32)) int32."""
    rows, count = codes.shape
    spread = (codes.unsqueeze(-1) >> torch.arange(bits, dtype=torch.uint8, device="cpu")) & 1
    spread = nn.functional.pad(spread.flatten(1), (0, -count * bits % 32)).view(rows, -1, 4, 8)
    shifts = torch.arange(8, dtype=torch.uint8, device="cpu")
    packed = (spread << shifts).sum(-1, dtype=torch.uint8)
    return packed.flatten(1).contiguous().view(torch.int32)


def _names(model: PreTrainedModel) -> set[str]:
    """What a dense model of this configuration has."""
    with torch.device("meta"):
        return set(type(model)(model.config).state_dict())


def _plan(
    kind: Kind, name: str, module: PackedModule, again: Format | None
) -> tuple[Integers, bool]:
    """How a layer is written, and whether as it is."""
    n, k = shape_of(module)
    how = Integers(module.format, n, k, order_of(module) is not None)
    why = kind.obstacle(how)
    if why is None:
        return how, True
    if again is None:
        raise ValueError(
            f"{name}: format {module.format.name!r} of a weight {(n, k)} {why}: {kind.name} does not hold it; quantize "
            "it anew (--requantize FORMAT, as in int4_g128)"
        )
    how = Integers(again, n, k, False)
    if why := kind.obstacle(how):
        raise ValueError(
            f"requantize must be a format that {kind.name} holds: {again.name!r} of {name}, a weight {(n, k)}, {why}"
        )
    return how, False


def _layer(
    kind: Kind, name: str, module: PackedModule, how: Integers, kept: bool
) -> dict[str, Tensor]:
    weight = on_cpu(module.quant_tensor() if kept else quantize(values_of(module), how.format))
    codes, index = weight.unpack(), None
    if how.reordered:
        order = order_of(module)
        assert order is not None
        inverse = torch.argsort(order.cpu())
        codes = codes[:, inverse]
        index = (inverse // (how.format.group or how.k)).to(torch.int32)
    made = kind.tensors(how, codes, weight, index)
    return {f"{name}.{part}": t for part, t in made.items()}


def _same(name: str, t: Tensor) -> dict[str, Tensor]:
    return {name: t}


def _decoded(name: str, module: PackedModule) -> dict[str, Tensor]:
    return {name: values_of(module).to(module.dtype)}


def _write_rest(
    model: PreTrainedModel,
    place: Path,
    source: str | os.PathLike[str] | None,
    tokenizer: PreTrainedTokenizerBase | None,
) -> None:
    """The configuration and what else a folder holds beside the weights."""
    if source is not None:
        copy_rest(Path(source), place)
    else:
        model.config.save_pretrained(place)
        if model.generation_config is not None:
            model.generation_config.save_pretrained(place)
    if tokenizer is not None:
        tokenizer.save_pretrained(place)
    forget_quantization(place)
