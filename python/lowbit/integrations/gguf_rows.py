"""Where the rows of a parameter lie in a GGUF file.

llama.cpp's converter puts rows in another order, and transformers' models split or fuse what checkpoints hold. Both
are known to transformers as functions of tensors: here they are given the numbers of rows.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_gguf_pytorch_utils import GGUFTensor, TensorProcessor

from lowbit.files import shown
from lowbit.io.readers.gguf import GGUFFile

ROPE_FACTORS = "rope_freqs.weight"
_HEAD = "lm_head.weight"


@dataclass(frozen=True)
class Source:
    """What a parameter is made of: the tensor `stored`, or zeros if that is None; `rows` of it, or None for all."""

    stored: str | None
    rows: Tensor | None


class FalconProcessor(TensorProcessor):  # type: ignore[misc]
    """Undoes what llama.cpp's converter does to the products of queries, keys and values of a Falcon.

    It has all queries, then all keys, then all values; transformers has them by the key heads. With a single key head
    both are the same.
    """

    def process(self, weights: Any, name: str, **kwargs: Any) -> GGUFTensor:
        """The tensor `name` in transformers' order."""
        if ".attn_qkv." in name:
            heads, kv_heads = self.config["num_attention_heads"], self.config["num_kv_heads"]
            parts = np.split(weights.reshape(heads + 2 * kv_heads, -1), (heads, heads + kv_heads))
            grouped = [p.reshape(kv_heads, -1, weights.size // len(weights)) for p in parts]
            weights = np.concatenate(grouped, axis=1).reshape(weights.shape)
        return GGUFTensor(weights, name, {})


def sources(
    file: GGUFFile, model: PreTrainedModel, processor: TensorProcessor, optional: str, factors: bool
) -> dict[str, Source]:
    """What every parameter of a model is made of; all tensors are there, with the right shapes, and no others are.

    Args:
        file: open.
        model: with nothing but linears that hold their weight as the file does.
        processor: of transformers' reader, of the architecture.
        optional: a pattern of tensors that a file may leave out, in all layers alike.
        factors: whether the file may hold factors of frequencies.

    Raises:
        ValueError: a tensor is missing or has another shape.
        NotImplementedError: the file has tensors that the model has not.
    """
    arch = str(file.metadata["general.architecture"])
    number = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    known = gguf.get_tensor_name_map(number, model.config.num_hidden_layers)
    found: dict[str, Source] = {}
    used: set[str] = {ROPE_FACTORS} if factors else set()
    parameters = {
        name: p
        for name, p in model.state_dict().items()
        if name != _HEAD or not model.config.tie_word_embeddings
    }
    checkpoint = {name: {name: np.arange(len(p))} for name, p in parameters.items()}
    if any(known.get_name(name.rpartition(".")[0]) is None for name in parameters):
        checkpoint = _converted(model, parameters)
    for name, parts in checkpoint.items():
        module, _, leaf = name.rpartition(".")
        stored = f"{known.get_name(module)}.{leaf}"
        shape = (
            sum(len(rows) for rows in parts.values()),
            *parameters[next(iter(parts))].shape[1:],
        )
        if stored not in file.tensors and _may_lack(file, stored, optional):
            found.update(dict.fromkeys(parts, Source(None, None)))
            continue
        _check_shape(file, stored, shape)
        used.add(stored)
        order = np.arange(shape[0])
        if len(shape) > 1:
            order = processor.process(order, stored).weights
        for parameter, rows in parts.items():
            at = torch.from_numpy(order[rows])
            whole = torch.equal(at, torch.arange(shape[0], dtype=at.dtype, device="cpu"))
            found[parameter] = Source(stored, None if whole else at)
    if unknown := sorted(file.tensors.keys() - used):
        raise NotImplementedError(
            f"{file.path}: a {type(model).__name__} has no tensors {', '.join(map(shown, unknown[:8]))}"
        )
    return found


def _converted(
    model: PreTrainedModel, parameters: Mapping[str, Tensor]
) -> dict[str, dict[str, np.ndarray[Any, Any]]]:
    """For every tensor of a checkpoint that transformers converts: the parameters in it, and the rows of each."""
    starts, numbered, start = {}, {}, 0
    for name, p in parameters.items():
        starts[name] = start
        numbered[name] = torch.arange(start, start + len(p), dtype=torch.int64, device="cpu")
        start += len(p)
    names, edges = list(starts), np.array([*starts.values(), start])
    found: dict[str, dict[str, np.ndarray[Any, Any]]] = {}
    for stored, numbers in revert_weight_conversion(model, numbered).items():
        at = np.argsort(numbers.numpy())
        owners = np.searchsorted(edges, numbers.numpy()[at], side="right") - 1
        found[stored] = {names[i]: at[owners == i] for i in np.unique(owners)}
    return found


def _may_lack(file: GGUFFile, stored: str, optional: str) -> bool:
    first = re.sub(r"^blk\.\d+\.", "blk.0.", stored)
    return first not in file.tensors and re.fullmatch(optional, stored) is not None


def _check_shape(file: GGUFFile, stored: str, expected: tuple[int, ...]) -> None:
    if stored not in file.tensors:
        raise ValueError(f"{file.path}: tensor {stored!r} is missing")
    shape = file.tensors[stored].shape
    if shape != expected:
        raise ValueError(f"{file.path}: tensor {stored!r} must have shape {expected}, got {shape}")
