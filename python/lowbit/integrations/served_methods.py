"""Computes layers of serving programs (vLLM, SGLang) of packed weights: the methods that their base classes ask for.

The program hands over every tensor of the checkpoint by the name of a parameter: those here are empty, and what they
are given is kept until all of a layer is there. It is then cut and joined as `served` does.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.integrations.served import Pieces, Place, Product, Rows, Shard, Weight, rows_between
from lowbit.ops.checks import FLOAT_DTYPES
from lowbit.weights.quantized import QuantTensor

METHOD = "lowbit"
_QKV = {"q": 0, "k": 1, "v": 2}
# The attribute of a layer that holds its packed weight.
HELD = "lowbit_weight"


class ServedConfig:
    """What configurations of every program say of the method."""

    @classmethod
    def get_name(cls) -> str:
        """As in config.json."""
        return METHOD

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        """The dtypes of activations."""
        return list(FLOAT_DTYPES)

    @classmethod
    def get_min_capability(cls) -> int:
        """Of GPUs: that of the CUDA and Triton kernels."""
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None: formats are in the metadata of the tensors' files."""
        return []


class _Stand(nn.Parameter):
    """Stands for a tensor of the checkpoint; what is loaded into it goes to the pieces of its layer."""


def _expect(layer: nn.Module, pieces: Pieces, number: Callable[[Any], int]) -> None:
    """Gives a layer a parameter for each tensor that the checkpoint may have of it."""

    def load(name: str, _: Tensor, loaded: Tensor, shard: Any = None) -> None:
        shard = getattr(loaded, "shard_id", None) if shard is None else shard
        pieces.take(number(shard), name, loaded)

    for name, dtype in pieces.dtypes().items():
        p = _Stand(torch.empty(0, dtype=dtype, device="cpu"), requires_grad=False)
        p.weight_loader = functools.partial(load, name)  # type: ignore[attr-defined]
        layer.register_parameter(name, p)


def _forget(layer: nn.Module) -> None:
    for name in [name for name, p in layer._parameters.items() if isinstance(p, _Stand)]:
        del layer._parameters[name]


def _number(shard: Any) -> int:
    """That of a shard in a layer; of one that is several of the program's, of the first."""
    if isinstance(shard, tuple):
        return int(shard[0])
    return 0 if shard is None else _QKV[shard] if isinstance(shard, str) else int(shard)


class _Method:
    """A method of one layer.

    Args:
        shards: the linears of the checkpoint that the layer is.
        device: where it runs.
    """

    def __init__(self, shards: list[Shard], device: str = "cpu") -> None:
        super().__init__()
        self.pieces = Pieces(shards)
        self.device = device

    def _here(self, weights: list[Weight]) -> list[Weight]:
        return [w if w.device.type == self.device else w.to(self.device) for w in weights]


class LinearMethod(_Method):
    """Computes linears, several of the checkpoint in one."""

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **more: Any,
    ) -> None:
        """Makes parameters that keep what they are given; the arguments are the program's."""
        rank, world = getattr(layer, "tp_rank", 0), getattr(layer, "tp_size", 1)
        parts = None
        # Processes that are more than the heads of k and v hold the same ones.
        if (replicas := getattr(layer, "num_kv_head_replicas", None)) is not None:
            parts = (world, world // replicas, world // replicas)
        sizes = tuple(output_partition_sizes)
        self.place = Place(rank, world, sizes, input_size_per_partition, parts)
        self.dtype = params_dtype
        _expect(layer, self.pieces, _number)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Cuts and joins what was loaded, and packs it for the kernels of the device.

        Raises:
            ValueError, NotImplementedError: naming the layer, and what is missing or cannot be cut.
        """
        if hasattr(layer, HELD):
            return
        found = self.pieces.weights()
        names = [shard.name for shard in self.pieces.shards]
        weights = self.place.cut([weight for weight, _ in found], names)
        # A linear that is several matrices has what is beside it for all of them.
        extras = [more for _, more in found]
        extras = extras * len(weights) if len(extras) == 1 else extras
        _forget(layer)
        setattr(layer, HELD, Product(self._here(weights), extras, self.dtype))

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x W^T + bias."""
        made: Tensor = getattr(layer, HELD)(x, bias)
        return made

    def dequantize_weight(self, layer: nn.Module) -> Tensor:
        """The dense weight, (N, K)."""
        made: Tensor = getattr(layer, HELD).dequantize(self.dtype)
        return made


class EmbeddingMethod(_Method):
    """Computes embeddings and heads, which may be of one weight."""

    def __init__(self, shards: list[Shard], device: str = "cpu") -> None:
        super().__init__(shards, device)
        # Not the module itself, which would make the embedding a part of the head.
        self._tied: list[nn.Module] = []

    def create_weights(
        self, layer: nn.Module, *sizes: Any, params_dtype: torch.dtype, **more: Any
    ) -> None:
        """Makes parameters that keep what they are given; the arguments are the program's."""
        self.dtype = params_dtype
        _expect(layer, self.pieces, lambda shard: 0)

    def tie_weights(self, layer: nn.Module, embed_tokens: nn.Module) -> nn.Module:
        """Makes a head take the weight of an embedding."""
        self._tied = [embed_tokens]
        _forget(layer)
        return layer

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Takes the rows of this process.

        Raises:
            ValueError: naming the layer, and what is missing.
        """
        if hasattr(layer, HELD):
            return
        if self._tied:
            embedding: Any = self._tied[0]
            embedding.quant_method.process_weights_after_loading(embedding)
            return
        ((weight, _),) = self.pieces.weights()
        at: Any = layer.shard_indices
        start, stop = at.org_vocab_start_index, at.org_vocab_end_index
        if stop > weight.shape[0] or stop <= start or layer.num_added_embeddings:
            raise ValueError(
                f"{self.pieces.shards[0].name}: process {layer.tp_rank} of {layer.tp_size} cannot have the rows from "
                f"{start} to {stop} of {weight.shape[0]}, and {layer.num_added_embeddings} that are added"
            )
        (mine,) = self._here([rows_between(weight, start, stop)])
        assert isinstance(mine, QuantTensor)
        _forget(layer)
        setattr(layer, HELD, Rows(mine, self.dtype))

    def embedding(self, layer: nn.Module, indices: Tensor) -> Tensor:
        """Rows of the weight."""
        made: Tensor = getattr(layer, HELD)(indices)
        return made

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x W^T + bias; columns that the program pads its vocabulary with are zero."""
        owner = self._tied[0] if self._tied else layer
        columns: Any = layer.num_embeddings_per_partition
        made: Tensor = getattr(owner, HELD).product(x, bias, columns)
        return made
