"""GGUF files of architectures whose configuration and names transformers and package gguf know: the transformers model
with its linears and embeddings packed as stored.

What transformers would change in the values of linears other than the order of rows stays with its own loader; the
error says how to go on from there.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.modeling_gguf_pytorch_utils import (
    GGUF_SUPPORTED_ARCHITECTURES,
    TENSOR_PROCESSORS,
    TensorProcessor,
    get_gguf_hf_weights_map,
    load_gguf_checkpoint,
)

from lowbit.files import shown
from lowbit.formats import Format, as_format
from lowbit.integrations.configuration import errors_of, quiet, without_weights
from lowbit.io.readers.gguf import GGUFFile
from lowbit.io.readers.gguf_blocks import BLOCK_TYPES, DENSE_TYPES
from lowbit.methods import quantize
from lowbit.nn import PackedModule, QuantEmbedding, QuantLinear
from lowbit.nn.embedding import packed_embedding
from lowbit.nn.surgery import replace
from lowbit.weights.quantized import QuantTensor

# Architectures whose linears transformers takes as they are: the others reorder, split or transpose them.
_AS_STORED = frozenset(
    ("qwen2", "qwen3", "gemma2", "gemma3", "phi3", "starcoder2", "stablelm", "smollm3", "olmo2", "granite")
)  # fmt: skip
# For tensors of types that no format holds.
_NEAREST = "int8_g32"


def load_causal(file: GGUFFile, dtype: torch.dtype, target: Format | None) -> PreTrainedModel:
    """Makes the model of a GGUF file.

    Args:
        file: open, of an architecture that is no "llama".
        dtype: of activations, norms and the rows that the embedding returns.
        target: requantize the linears of the layers to this format; None keeps them as stored.

    Raises:
        ValueError: the file is damaged, or lacks a tensor or a key.
        NotImplementedError: the architecture or something that the file asks for is not supported; the message says
            what can be done.
    """
    arch = file.metadata.get("general.architecture")
    config = _config(file, arch)
    config.dtype = dtype
    kind: Any = AutoModelForCausalLM._model_mapping[type(config)]
    model = without_weights(
        kind, config, f"{file.path}: transformers cannot make a {kind.__name__}"
    )
    processor = TENSOR_PROCESSORS.get(str(arch), TensorProcessor)(config=config.to_dict())
    names: dict[str, str] = get_gguf_hf_weights_map(model, processor)
    _check(file, model, names)
    requantized: dict[str, str] = {}
    for stored, name in names.items():
        if stored in file.tensors:
            _fill(model, file, stored, name, processor, dtype, target, requantized)
    _tie(model)
    missing = sorted(
        n for n, t in model.state_dict().items() if isinstance(t, Tensor) and t.is_meta
    )
    if missing:
        raise ValueError(f"{file.path}: lacks the tensors of {', '.join(missing[:8])}")
    if requantized:
        kinds = ", ".join(sorted(set(requantized.values())))
        warnings.warn(
            f"{file.path}: no format holds {len(requantized)} tensors of type {kinds}; they are quantized anew to "
            f"{_NEAREST}, with a loss: {', '.join(list(requantized)[:8])}",
            stacklevel=4,
        )
    model.generation_config = GenerationConfig.from_model_config(config)
    made: PreTrainedModel = model.eval()
    return made


def _config(file: GGUFFile, arch: object) -> Any:
    if arch not in _AS_STORED:
        known = arch in GGUF_SUPPORTED_ARCHITECTURES
        how = (
            "transformers reads it dense: AutoModelForCausalLM.from_pretrained(folder, gguf_file=name), then "
            "lowbit.quantize_model"
            if known
            else "convert it to a folder of transformers first"
        )
        raise NotImplementedError(
            f"{file.path}: architecture {shown(arch)}; expected 'llama' or one of {sorted(_AS_STORED)}: {how}"
        )
    kind = file.metadata.get(f"{arch}.rope.scaling.type", "none")
    factor = file.metadata.get(f"{arch}.rope.scaling.factor", 1.0)
    if kind != "none" and factor not in (0.0, 1.0):
        raise NotImplementedError(
            f"{file.path}: rope scaling {shown(kind)} by {shown(factor)} of a {arch}; expected none"
        )
    with errors_of(f"{file.path}: transformers refuses the configuration"), quiet():
        found = load_gguf_checkpoint(str(file.files[0]))["config"]
        config = AutoConfig.for_model(**found)
    config.tie_word_embeddings = "output.weight" not in file.tensors
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise ValueError(f"{file.path}: tensor 'token_embd.weight' is missing")
    config.vocab_size = embedding.shape[0]
    return config


def _check(file: GGUFFile, model: nn.Module, names: dict[str, str]) -> None:
    if unknown := sorted(file.tensors.keys() - names.keys()):
        raise NotImplementedError(
            f"{file.path}: a {type(model).__name__} has no tensors {', '.join(map(shown, unknown[:8]))}"
        )
    wanted = model.state_dict()
    for stored, name in names.items():
        if stored not in file.tensors:
            continue
        shape, expected = file.tensors[stored].shape, tuple(wanted[name].shape)
        if shape != expected:
            raise ValueError(
                f"{file.path}: tensor {shown(stored)} must have shape {expected}, got {shape}"
            )


def _fill(
    model: nn.Module,
    file: GGUFFile,
    stored: str,
    name: str,
    processor: TensorProcessor,
    dtype: torch.dtype,
    target: Format | None,
    requantized: dict[str, str],
) -> None:
    """Gives a parameter its values, replacing its module where they are packed."""
    parent, _, leaf = name.rpartition(".")
    module = model.get_submodule(parent)
    weight: QuantTensor | Tensor
    packable = leaf == "weight" and isinstance(module, nn.Linear | nn.Embedding)
    kind, inner = file.tensors[stored].type, type(module) is nn.Linear and parent != "lm_head"
    if kind in BLOCK_TYPES or kind in DENSE_TYPES:
        weight = file[stored]
    else:
        weight = file.dequantized(stored)
        if packable and not (target is not None and inner):
            weight = quantize(weight, as_format(_NEAREST))
            requantized[stored] = kind.name
    if packable and target is not None and inner:
        weight = quantize(
            weight.dequantize() if isinstance(weight, QuantTensor) else weight.float(), target
        )
    if not isinstance(weight, QuantTensor) or not packable:
        values = weight.dequantize() if isinstance(weight, QuantTensor) else weight.float()
        values = torch.from_numpy(np.array(processor.process(values.numpy(), name=stored).weights))
        module.register_parameter(leaf, nn.Parameter(values.to(dtype), requires_grad=False))
        return
    made: PackedModule
    if isinstance(module, nn.Embedding):
        made = packed_embedding(module, weight, dtype)
        module._buffers.pop("embed_scale", None)  # `made` has it
    else:
        made = QuantLinear.from_quant_tensor(weight, None, dtype)
        if module.bias is not None:
            made.bias = module.bias
    replace(model, parent, made)
    made.set_weight_dtype(dtype)


def _tie(model: PreTrainedModel) -> None:
    if not model.config.tie_word_embeddings:
        return
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if isinstance(embedding, QuantEmbedding):
        name = next(n for n, module in model.named_modules() if module is head)
        made = QuantLinear.tied_to(embedding)
        replace(model, name, made)
        made.set_weight_dtype(embedding.dtype)
    else:
        head.weight = embedding.weight
