"""Where the rows of a parameter lie in a GGUF file.

llama.cpp's converter puts rows in another order, and transformers' models split or fuse what checkpoints hold. Both
are known to transformers as functions of tensors: here they are given the numbers of rows.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
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
from lowbit.integrations.gguf_experts import as_converter, experts_apart, experts_together
from lowbit.integrations.gguf_fused import joined_in
from lowbit.io.readers.gguf import GGUFFile
from lowbit.weights import slices
from lowbit.weights.quantized import QuantTensor

ROPE_FACTORS = "rope_freqs.weight"
_HEAD = "lm_head.weight"
_Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Part:
    """`rows` of the tensor `stored`, all dimensions of which but the last of a weight count rows; of a bias all.

    Attributes:
        stored, rows: as above.
        alone: of a vector that is joined with others in `stored`: its own name, and where it lies; `rows` count there.
    """

    stored: str
    rows: range | Tensor
    alone: tuple[str, range] | None = None


@dataclass(frozen=True)
class Source:
    """What a parameter is made of: the rows of `parts` one after the other, in this `order` unless that is None.

    Zeros if there is no part.
    """

    parts: tuple[Part, ...]
    order: Tensor | None = None


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
    parameters = {
        name: p
        for name, p in model.state_dict().items()
        if name != _HEAD or not model.config.tie_word_embeddings
    }
    converted = any(known.get_name(name.rpartition(".")[0]) is None for name in parameters)
    found: dict[str, Source] = {}
    used: set[str] = {ROPE_FACTORS} if factors else set()
    # A layer at a time: the numbers of all rows of many experts would be as large as the model.
    for some in _by_layers(parameters):
        numbered = _Numbered(some)
        checkpoint = numbered.checkpoint(model) if converted else numbered.numbers
        wanted = {}
        for name, numbers in checkpoint.items():
            module, _, leaf = name.rpartition(".")
            wanted[f"{known.get_name(module)}.{leaf}"] = numbers
        for stored, numbers in wanted.items():
            joint = joined_in(file, stored)
            if joint is None and stored not in file.tensors and _may_lack(file, stored, optional):
                continue
            columns = numbered.columns(numbers)
            order = np.arange(numbers.shape[-1])
            if numbers.ndim == 1 and columns:
                order = processor.process(order, stored).weights
            whole, counts = stored, [len(order)]
            start = 0
            if joint is not None and wanted.keys() >= set(joint[1]):
                whole = joint[0]
                counts = [wanted[name].shape[-1] for name in joint[1]]
                start = sum(counts[: joint[1].index(stored)])
            _check_shape(file, whole, (*numbers.shape[:-1], sum(counts), *columns))
            used.add(whole)
            if numbers.ndim == 1 and not columns:
                own = None if whole == stored else (stored, range(start, start + len(order)))
                numbered.add(whole, numbers, order, own)
                continue
            experts = np.arange(numbers.size // len(order))[:, None] * sum(counts)
            numbered.add(whole, numbers.reshape(-1), (experts + start + order).reshape(-1))
        found.update(numbered.sources())
    if unknown := sorted(file.tensors.keys() - used):
        raise NotImplementedError(
            f"{file.path}: a {type(model).__name__} has no tensors {', '.join(map(shown, unknown[:8]))}"
        )
    return found


class _Numbered:
    """Parameters whose rows are numbered, over all of them, and what they turn out to be made of.

    Attributes:
        numbers: of the rows of each.
    """

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        counts = [len(p) for p in parameters.values()]
        self._edges = np.cumsum([0, *counts])
        self._names = list(parameters)
        self._columns = [tuple(p.shape[1:]) for p in parameters.values()]
        self._parts: list[list[tuple[Part, _Array]]] = [[] for _ in parameters]
        self.numbers: dict[str, _Array] = {
            name: np.arange(start, start + count)
            for name, start, count in zip(self._names, self._edges, counts, strict=False)
        }

    def checkpoint(self, model: PreTrainedModel) -> dict[str, _Array]:
        """The numbers of the rows of what llama.cpp's converter makes of the model's checkpoint: (N,), of all experts
        (E, N).
        """
        together = experts_together(self.numbers, model)
        fused = {n: torch.from_numpy(a) for n, a in together.items()}
        stored = {n: t.numpy() for n, t in revert_weight_conversion(model, fused).items()}
        return as_converter(experts_apart(stored))

    def columns(self, numbers: _Array) -> tuple[int, ...]:
        """Of the parameter that the first of these rows is in; none of a bias."""
        return self._columns[np.searchsorted(self._edges, numbers.flat[0], side="right") - 1]

    def add(
        self, stored: str, numbers: _Array, order: _Array, alone: tuple[str, range] | None = None
    ) -> None:
        """The rows with these numbers are the rows `order` of a tensor; `alone` as of a `Part`."""
        by = np.argsort(numbers)
        numbers, rows = numbers[by], order[by]
        starts = np.searchsorted(numbers, self._edges)
        for i in np.flatnonzero(np.diff(starts)):
            mine = slice(starts[i], starts[i + 1])
            part = Part(stored, _as_range(rows[mine]), alone)
            self._parts[i].append((part, numbers[mine] - self._edges[i]))

    def sources(self) -> dict[str, Source]:
        """Of every parameter."""
        made = {}
        for name, parts in zip(self._names, self._parts, strict=True):
            rows_of_all = sum(len(at) for _, at in parts)
            assert rows_of_all in (0, len(self.numbers[name])), name
            order = None
            if len(parts) > 1:
                order = np.argsort(np.concatenate([at for _, at in parts]))
            made[name] = Source(
                tuple(part for part, _ in parts),
                None if order is None or _is_run(order) else torch.from_numpy(order),
            )
        return made


def rows_of(weight: QuantTensor | Tensor, rows: Tensor) -> QuantTensor | Tensor:
    """Some rows of a weight of the file, in this order."""
    if not isinstance(weight, QuantTensor):
        return weight[rows]
    return slices.rows_of(weight, rows)


def joined(weights: Sequence[QuantTensor | Tensor]) -> QuantTensor | Tensor:
    """The rows of one weight of the file after the other; in fp32 if a format does not hold all."""
    if len(weights) == 1:
        return weights[0]
    packed = [w for w in weights if isinstance(w, QuantTensor)]
    whole = slices.stacked(packed) if len(packed) == len(weights) else None
    return torch.cat([dense(weight) for weight in weights]) if whole is None else whole


def dense(weight: QuantTensor | Tensor) -> Tensor:  # fp32
    """The values of a weight."""
    return weight.dequantize() if isinstance(weight, QuantTensor) else weight.float()


def _by_layers(parameters: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """The parameters of each layer, and those of none."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, p in parameters.items():
        number = re.search(r"\.\d+\.", name)
        found.setdefault(number[0] if number else "", {})[name] = p
    return list(found.values())


def _is_run(rows: _Array) -> bool:
    return bool((np.diff(rows) == 1).all())


def _as_range(rows: _Array) -> range | Tensor:
    if _is_run(rows):
        return range(int(rows[0]), int(rows[-1]) + 1)
    return torch.from_numpy(rows)


def _may_lack(file: GGUFFile, stored: str, optional: str) -> bool:
    first = re.sub(r"^blk\.\d+\.", "blk.0.", stored)
    return first not in file.tensors and re.fullmatch(optional, stored) is not None


def _check_shape(file: GGUFFile, stored: str, expected: tuple[int, ...]) -> None:
    if stored not in file.tensors:
        raise ValueError(f"{file.path}: tensor {stored!r} is missing")
    shape = file.tensors[stored].shape
    # A matrix of one row may be a vector: the gate of qwen2moe's shared expert is.
    if shape != expected and not (len(expected) == 2 and (1, *shape) == expected):
        raise ValueError(f"{file.path}: tensor {stored!r} must have shape {expected}, got {shape}")
