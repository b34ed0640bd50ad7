"""to_gguf: a model as a GGUF file of llama.cpp.

Names come from package gguf's tensor name map, through transformers' use of it.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_gguf_pytorch_utils import TensorProcessor, get_gguf_hf_weights_map
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from lowbit.export.gguf_blocks import REQUANTIZED, block_type, to_blocks
from lowbit.export.gguf_metadata import add_config, add_tokenizer, architecture, rope
from lowbit.export.layers import (
    Exported,
    dense_tensors,
    on_cpu,
    order_of,
    packed_layers,
    shape_of,
    values_of,
)
from lowbit.files import shown, staged
from lowbit.integrations.gguf_keys import divided
from lowbit.integrations.transformers import copy_metadata
from lowbit.io.readers.gguf import GGUFFile
from lowbit.io.readers.gguf_blocks import BLOCK_TYPES, DENSE_TYPES
from lowbit.methods import quantize
from lowbit.nn import PackedModule
from lowbit.strides import bytes_of

_ROPE_FACTORS = "rope_freqs.weight"
# Keys of "general" that stay true of a model whose tensors have other types.
_DESCRIPTION = (
    "name", "author", "organization", "version", "basename", "finetune", "description", "size_label", "license",
    "url", "doi", "uuid", "repo_url", "source", "base_model", "tags", "languages", "datasets", "type",
)  # fmt: skip
_NAMES = {dtype: kind for kind, dtype in DENSE_TYPES.items()}


@dataclass(frozen=True)
class _Tensor:
    """A tensor of the file: its shape in elements, its type, and what makes its bytes (rows, row bytes)."""

    shape: tuple[int, ...]
    type: GGMLQuantizationType
    make: Callable[[], np.ndarray[Any, Any]]

    @property
    def byte_shape(self) -> tuple[int, ...]:
        """As package gguf wants it."""
        return gguf.quant_shape_to_byte_shape(self.shape, self.type)


def to_gguf(
    model: PreTrainedModel,
    path: str | os.PathLike[str],
    *,
    tokenizer: PreTrainedTokenizerBase | GGUFFile | None = None,
    requantize: str | None = None,
    pre: str | None = None,
) -> Exported:
    """Writes a model of transformers with packed weights as a GGUF file.

    A layer whose format is that of a GGUF type, but for how many weights share a scale, is written value for value;
    dense matrices in the narrowest of BF16, F16 and F32 that holds them, vectors in F32. What a format says of
    activations is not written. Nothing is written if anything raises.

    Args:
        model: llama, mistral, qwen2, qwen3, gemma2 or gemma3 (text), as `lowbit.load_model` or
            `lowbit.quantize_model` makes it. What is dense is best fp32, so that nothing is rounded twice.
        path: the file.
        tokenizer: of transformers, of byte pairs; or an open GGUF file, whose tokenizer and description (name,
            license) are copied; or None.
        requantize: the GGUF type (as in "Q8_0") of layers whose format has none. None: they are an error.
        pre: llama.cpp's name of how the tokenizer splits text, where it is not known here.

    Raises:
        ValueError: a layer's format has no GGUF type, or its scales do not fit it; the message names the layer. Or
            `requantize` is no such type.
        NotImplementedError: the architecture, its rope, a layer or the tokenizer is none that is written.

    Example:
        >>> lowbit.quantize_model(model, "q4_0")  # doctest: +SKIP
        >>> to_gguf(model, "model.gguf", tokenizer=tokenizer)  # doctest: +SKIP
    """
    if requantize is not None and requantize.upper() not in REQUANTIZED:
        raise ValueError(
            f"requantize must be one of {', '.join(sorted(REQUANTIZED))}, got {shown(requantize)}"
        )
    if pre is not None and not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ValueError(
            f"pre is for a tokenizer of transformers, got {pre!r} and {tokenizer!r:.100}"
        )
    target = Path(path)
    arch = architecture(model.config)
    done = Exported(target)
    kind = None if requantize is None else REQUANTIZED[requantize.upper()]
    tensors = _plan(model, arch, kind, done)
    if arch == "llama" and (factors := _rope_factors(model)) is not None:
        tensors[_ROPE_FACTORS] = _dense(factors, vector=True)
    with staged(target.parent, target.name) as place:
        writer = gguf.GGUFWriter(place / target.name, arch)
        add_config(writer, model.config)
        if isinstance(tokenizer, GGUFFile):
            copy_metadata(tokenizer, writer)
            for key in _DESCRIPTION:
                copy_metadata(tokenizer, writer, f"general.{key}")
        else:
            name = getattr(model.config, "_name_or_path", "")
            writer.add_name(Path(name).name or target.stem)
            if tokenizer is not None:
                add_tokenizer(writer, tokenizer, model.config.vocab_size, pre)
        try:
            _write(writer, tensors)
        finally:
            writer.close()
        with open(place / target.name, "rb") as f:
            os.fsync(f.fileno())
    return done


def _write(writer: gguf.GGUFWriter, tensors: dict[str, _Tensor]) -> None:
    for name, t in tensors.items():
        shape = t.byte_shape
        size = int(np.prod(shape, dtype=np.int64))
        writer.add_tensor_info(name, shape, np.dtype(np.uint8), size, raw_dtype=t.type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for t in tensors.values():
        # One at a time in memory.
        writer.write_tensor_data(t.make())


def _plan(
    model: PreTrainedModel, arch: str, target: GGMLQuantizationType | None, done: Exported
) -> dict[str, _Tensor]:
    """The tensors of the file by name. Raises before anything is written, but for scales that do not fit."""
    names = _names(model, arch)
    plan: dict[str, _Tensor] = {}
    head_dim = getattr(model.config, "head_dim", None)
    head_dim = head_dim or model.config.hidden_size // model.config.num_attention_heads

    def named(name: str) -> str:
        if name not in names:
            raise NotImplementedError(f"a {arch} of llama.cpp has no tensor {shown(name)}")
        return names[name]

    def rows(name: str, n: int) -> Tensor | None:
        rotated = arch == "llama" and name.rpartition(".")[0].endswith(("q_proj", "k_proj"))
        return _permutation(n, head_dim) if rotated else None

    for name, module in packed_layers(model).items():
        key = f"{name}.weight"
        kind = _type_of(name, module, target)
        kept = block_type(module.format, shape_of(module)[1]) == kind
        (done.packed if kept else done.requantized)[name] = kind.name
        make = functools.partial(_blocks, name, module, kind, kept, rows(key, shape_of(module)[0]))
        plan[named(key)] = _Tensor(shape_of(module), kind, make)
    for name, t in dense_tensors(model).items():
        if (order := rows(name, t.shape[0])) is not None:
            t = t[order.to(t.device)]
        if t.dim() > 1:
            done.dense.append(name.removesuffix(".weight"))
        elif arch.startswith("gemma") and name.endswith("norm.weight"):
            t = t.float() + 1  # llama.cpp multiplies by what it reads
        plan[named(name)] = _dense(t, vector=t.dim() == 1)
    place = {stored: i for i, stored in enumerate(names.values())}
    return dict(sorted(plan.items(), key=lambda item: place[item[0]]))


def _names(model: PreTrainedModel, arch: str) -> dict[str, str]:
    """The name in the file of every parameter that a dense model of this configuration has."""
    with torch.device("meta"):
        dense = type(model)(model.config)
    found = get_gguf_hf_weights_map(dense, TensorProcessor(), model_type=arch)
    return {name: stored for stored, name in found.items()}


def _type_of(
    name: str, module: PackedModule, target: GGMLQuantizationType | None
) -> GGMLQuantizationType:
    n, k = shape_of(module)
    format = module.format
    kind = None if order_of(module) is not None else block_type(format, k)
    if kind is not None:
        return kind
    if target is not None and k % gguf.GGML_QUANT_SIZES[target][0] == 0:
        return target
    if target is not None:
        raise ValueError(
            f"{name}: {k} columns are no whole blocks of {gguf.GGML_QUANT_SIZES[target][0]} for {target.name}"
        )
    formats = ", ".join(f"{t.name} ({b.format.name})" for t, b in BLOCK_TYPES.items())
    why = "with its columns in another order" if order_of(module) is not None else f"of {(n, k)}"
    raise ValueError(
        f"{name}: no GGUF type holds a weight {why} in format {format.name!r}. There are {formats}, with groups that "
        f"are multiples of theirs; or quantize it anew (--requantize, one of {', '.join(sorted(REQUANTIZED))})"
    )


def _blocks(
    name: str,
    module: PackedModule,
    kind: GGMLQuantizationType,
    kept: bool,
    rows: Tensor | None,
) -> np.ndarray[Any, Any]:
    weight = (
        module.quant_tensor() if kept else quantize(values_of(module), BLOCK_TYPES[kind].format)
    )
    try:
        blocks = to_blocks(on_cpu(weight), kind)
    except ValueError as e:
        raise ValueError(f"{name}, in format {weight.format.name!r}: as {kind.name} {e}") from e
    return blocks if rows is None else blocks[rows.numpy()]


def _dense(t: Tensor, vector: bool) -> _Tensor:
    dtype = torch.float32 if vector else _narrowest(t)

    def make() -> np.ndarray[Any, Any]:
        raw = bytes_of(t.to("cpu", dtype))
        return np.asarray(raw.view(*t.shape[:-1], -1).numpy())

    return _Tensor(tuple(t.shape), _NAMES[dtype], make)


def _narrowest(t: Tensor) -> torch.dtype:
    """Of bf16, fp16 and fp32 the first that holds every value."""
    values = t.float()
    for dtype in (torch.bfloat16, torch.float16):
        if t.dtype == dtype or torch.equal(values.to(dtype).float(), values):
            return dtype
    return torch.float32


def _permutation(n: int, head_dim: int) -> Tensor:
    """llama.cpp's order of a head's rows: the two of a rotated pair are neighbours."""
    order = torch.arange(n, dtype=torch.int64, device="cpu")
    return order.view(-1, 2, head_dim // 2).transpose(1, 2).flatten()


def _rope_factors(model: PreTrainedModel) -> Tensor | None:
    """By what llama.cpp shall divide each frequency beyond a linear scaling; None if by nothing."""
    parameters = rope(model.config)
    if parameters.get("rope_type") == "longrope":
        return torch.tensor(parameters["short_factor"], dtype=torch.float32, device="cpu")
    if parameters.get("rope_type") != "llama3":
        return None
    config: Any = type(model.config)(**model.config.to_dict())
    default = {"rope_type": "default", "rope_theta": parameters["rope_theta"]}

    def frequencies(rope: dict[str, Any]) -> Tensor:
        config.rope_parameters = rope
        return _frequencies(LlamaRotaryEmbedding(config))

    def read(factors: Tensor) -> Tensor:
        return frequencies(divided(default, factors.tolist(), config.max_position_embeddings))

    wanted = _frequencies(model.get_submodule("model.rotary_emb"))
    factors = frequencies(default) / wanted
    for other in (np.inf, -np.inf):
        # The neighbour, where it alone is read as the very frequency.
        near = torch.nextafter(factors, torch.full_like(factors, other))
        factors = torch.where((read(factors) != wanted) & (read(near) == wanted), near, factors)
    return factors


def _frequencies(rotary: nn.Module) -> Tensor:
    return rotary.get_buffer("inv_freq").float().cpu()
