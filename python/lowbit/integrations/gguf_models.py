"""GGUF files of architectures other than "llama": the transformers model with its linears and embeddings packed as
stored. Names are package `gguf`'s.
"""

from __future__ import annotations

import warnings
from typing import Any

import gguf
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from lowbit.files import shown
from lowbit.formats import Format, as_format
from lowbit.integrations.configuration import without_weights
from lowbit.integrations.gguf_configs import causal_config
from lowbit.io.readers.gguf import GGUFFile
from lowbit.io.readers.gguf_blocks import BLOCK_TYPES, DENSE_TYPES
from lowbit.methods import quantize
from lowbit.nn import PackedModule, QuantEmbedding, QuantLinear
from lowbit.nn.embedding import packed_embedding
from lowbit.nn.surgery import replace
from lowbit.weights.quantized import QuantTensor

# For tensors of types that no format holds.
NEAREST = "int8_g32"
_HEAD = "lm_head"


def load_causal(file: GGUFFile, dtype: torch.dtype, target: Format | None) -> PreTrainedModel:
    """Makes the model of a GGUF file.

    Args:
        file: open, of an architecture that is no "llama".
        dtype: of activations, norms and the rows that the embedding returns.
        target: requantize the linears of the layers to this format; None keeps them as stored.

    Raises:
        ImportError: accelerate is not installed.
        ValueError: the file is damaged, or lacks a tensor or a key.
        NotImplementedError: the architecture or something that the file asks for is not supported; the message says
            what can be done.
    """
    config = causal_config(file)
    config.dtype = dtype
    kind: Any = AutoModelForCausalLM._model_mapping[type(config)]
    model = without_weights(
        kind, config, f"{file.path}: transformers cannot make a {kind.__name__}"
    )
    requantized: dict[str, str] = {}
    names = _names(file, model)
    for stored, name in sorted(names.items(), key=lambda item: item[0].endswith(".weight")):
        _fill(model, file, stored, name, dtype, target, requantized)
    if model.config.tie_word_embeddings:
        _tie(model)
    warn_of_loss(file, requantized)
    made: PreTrainedModel = model.eval()
    return made


def is_held(file: GGUFFile, name: str) -> bool:
    """Whether a format, or a dense tensor, holds the values of a tensor."""
    kind = file.tensors[name].type
    return kind in BLOCK_TYPES or kind in DENSE_TYPES


def warn_of_loss(file: GGUFFile, requantized: dict[str, str]) -> None:
    """Names the tensors, with their types, that are quantized anew to NEAREST because no format holds them."""
    if requantized:
        kinds = ", ".join(sorted(set(requantized.values())))
        warnings.warn(
            f"{file.path}: no format holds {len(requantized)} tensors of type {kinds}; they are quantized anew to "
            f"{NEAREST}, with a loss: {', '.join(list(requantized)[:8])}",
            stacklevel=5,
        )


def _names(file: GGUFFile, model: PreTrainedModel) -> dict[str, str]:
    """Names in the file -> parameters of the model; all are there, with the right shapes, and no others are."""
    arch = str(file.metadata["general.architecture"])
    number = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    known = gguf.get_tensor_name_map(number, model.config.num_hidden_layers)
    names: dict[str, str] = {}
    for name, parameter in model.state_dict().items():
        module, _, leaf = name.rpartition(".")
        if module == _HEAD and model.config.tie_word_embeddings:
            continue
        stored = f"{known.get_name(module)}.{leaf}"
        if stored not in file.tensors:
            raise ValueError(f"{file.path}: tensor {stored!r} is missing")
        shape, expected = file.tensors[stored].shape, tuple(parameter.shape)
        if shape != expected:
            raise ValueError(
                f"{file.path}: tensor {stored!r} must have shape {expected}, got {shape}"
            )
        names[stored] = name
    if unknown := sorted(file.tensors.keys() - names.keys()):
        raise NotImplementedError(
            f"{file.path}: a {type(model).__name__} has no tensors {', '.join(map(shown, unknown[:8]))}"
        )
    return names


def _fill(
    model: PreTrainedModel,
    file: GGUFFile,
    stored: str,
    name: str,
    dtype: torch.dtype,
    target: Format | None,
    requantized: dict[str, str],
) -> None:
    """Gives a parameter its values, replacing its module where they are packed; biases come before weights."""
    parent, _, leaf = name.rpartition(".")
    module = model.get_submodule(parent)
    kind = file.tensors[stored].type
    held = is_held(file, stored)
    weight = file[stored] if held else file.dequantized(stored)
    packable = leaf == "weight" and isinstance(module, nn.Linear | nn.Embedding)
    if packable and target is not None and isinstance(module, nn.Linear) and parent != _HEAD:
        weight = quantize(_dense(weight), target)
    elif packable and not held:
        weight = quantize(_dense(weight), as_format(NEAREST))
        requantized[stored] = kind.name
    if not packable or not isinstance(weight, QuantTensor):
        values = _dense(weight)
        if leaf == "weight" and _adds_one(model) and values.dim() == 1:
            values = values - 1  # llama.cpp's norms have it
        module.register_parameter(leaf, nn.Parameter(values.to(dtype)))
        return
    made: PackedModule
    if isinstance(module, nn.Embedding):
        made = packed_embedding(module, weight, dtype)
    else:
        made = QuantLinear.from_quant_tensor(weight, module._parameters["bias"], dtype)
    replace(model, parent, made)
    made.set_weight_dtype(dtype)  # not that of the empty model


def _dense(weight: QuantTensor | Tensor) -> Tensor:  # fp32
    return weight.dequantize() if isinstance(weight, QuantTensor) else weight.float()


def _adds_one(model: PreTrainedModel) -> bool:
    return str(model.config.model_type).startswith("gemma")


def _tie(model: PreTrainedModel) -> None:
    embedding, head = model.get_input_embeddings(), model.get_submodule(_HEAD)
    if isinstance(embedding, QuantEmbedding):
        made = QuantLinear.tied_to(embedding)
        replace(model, _HEAD, made)
        made.set_weight_dtype(embedding.dtype)
    else:
        head.register_parameter("weight", embedding._parameters["weight"])
