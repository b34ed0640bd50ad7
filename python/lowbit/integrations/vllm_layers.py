"""Linears, embeddings and heads of vLLM whose weights a lowbit checkpoint holds packed.

vLLM hands over every tensor of the checkpoint by the name of a parameter: those here are empty, and what they are given
is kept until all of a layer is there. It is then cut and joined as `lowbit.integrations.served` does.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    QKVParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.quantization import (
    QUANTIZATION_METHODS,
    register_quantization_config,
)
from vllm.model_executor.layers.quantization.base_config import (
    QuantizationConfig,
    QuantizeMethodBase,
)
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.model_loader.weight_utils import download_weights_from_hf
from vllm.platforms import current_platform

from lowbit.integrations.served import (
    Catalog,
    Pieces,
    Place,
    Product,
    Rows,
    Shard,
    Weight,
    rows_between,
)
from lowbit.ops.checks import FLOAT_DTYPES
from lowbit.weights.quantized import QuantTensor

METHOD = "lowbit"
_QKV = {"q": 0, "k": 1, "v": 2}
# The attribute of a layer that holds its packed weight.
_HELD = "lowbit_weight"


class LowbitVllmConfig(QuantizationConfig):  # type: ignore[misc]
    """What vLLM asks of a model whose config.json names "lowbit".

    Attributes:
        catalog: the packed layers of the checkpoint, by their names in vLLM.
    """

    def __init__(self) -> None:
        super().__init__()
        self.catalog = Catalog()

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

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> LowbitVllmConfig:
        """Of the `quantization_config` of config.json."""
        return cls()

    def maybe_update_config(
        self, model_name: str, hf_config: Any = None, revision: str | None = None
    ) -> None:
        """Reads which layers of the model are packed, and how.

        Raises:
            ValueError: its files are none of lowbit.
        """
        folder = Path(model_name)
        if not folder.is_dir():
            patterns = ["*.safetensors", "*.safetensors.index.json"]
            folder = Path(download_weights_from_hf(model_name, None, patterns, revision))
        self.catalog = Catalog.of(folder)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Gives the layers the names that they have in vLLM."""
        self.catalog = self.catalog.renamed(hf_to_vllm_mapper.map_name)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """What computes a layer; None for the dense one of a kind that vLLM has one for."""
        shards = self.catalog.shards(prefix, self.packed_modules_mapping)
        if isinstance(layer, LinearBase):
            return LowbitLinearMethod(shards) if shards else UnquantizedLinearMethod()
        if isinstance(layer, VocabParallelEmbedding):
            return LowbitEmbeddingMethod(shards) if shards else None
        if isinstance(layer, RoutedExperts):
            inside = f"{prefix}."
            packed = [name for name in self.catalog.layers if name.startswith(inside)]
            if packed:
                raise NotImplementedError(
                    f"{prefix}: experts that are packed are not computed in vLLM: the checkpoint has {len(packed)} "
                    f"(such as {packed[0]}); quantize it with --skip experts, or run it with lowbit.load_model"
                )
        return None


class _Held(nn.Parameter):
    """Stands for a tensor of the checkpoint; what is loaded into it goes to the pieces of its layer."""


def _expect(layer: nn.Module, pieces: Pieces, number: Any) -> None:
    """Gives a layer a parameter for each tensor that the checkpoint may have of it."""

    def load(name: str, _: Tensor, loaded: Tensor, shard: Any = None) -> None:
        shard = getattr(loaded, "shard_id", None) if shard is None else shard
        pieces.take(number(shard), name, loaded)

    for name, dtype in pieces.dtypes().items():
        p = _Held(torch.empty(0, dtype=dtype, device="cpu"), requires_grad=False)
        p.weight_loader = functools.partial(load, name)  # type: ignore[attr-defined]
        layer.register_parameter(name, p)


def _forget(layer: nn.Module) -> None:
    for name in [name for name, p in layer._parameters.items() if isinstance(p, _Held)]:
        del layer._parameters[name]


def _on_device(weights: list[Weight]) -> list[Weight]:
    device = current_platform.device_type
    return [w if w.device.type == device else w.to(device) for w in weights]


class LowbitLinearMethod(LinearMethodBase):  # type: ignore[misc]
    """Computes linears of packed weights.

    Args:
        shards: the linears of the checkpoint that the layer is.
    """

    def __init__(self, shards: list[Shard]) -> None:
        self.pieces = Pieces(shards)

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
        """Makes parameters that keep what they are given."""
        rank, world = getattr(layer, "tp_rank", 0), getattr(layer, "tp_size", 1)
        parts = None
        if isinstance(layer, QKVParallelLinear):
            heads = world // layer.num_kv_head_replicas
            parts = (world, heads, heads)
        sizes = tuple(output_partition_sizes)
        self.place = Place(rank, world, sizes, input_size_per_partition, parts)
        self.dtype = params_dtype
        _expect(layer, self.pieces, _number)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Cuts and joins what was loaded, and packs it for the kernels of the device.

        Raises:
            ValueError, NotImplementedError: naming the layer, and what is missing or cannot be cut.
        """
        if hasattr(layer, _HELD):
            return
        found = self.pieces.weights()
        names = [shard.name for shard in self.pieces.shards]
        weights = self.place.cut([weight for weight, _ in found], names)
        # A linear that is several matrices has what is beside it for all of them.
        extras = [more for _, more in found]
        extras = extras * len(weights) if len(extras) == 1 else extras
        _forget(layer)
        setattr(layer, _HELD, Product(_on_device(weights), extras, self.dtype))

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x W^T + bias."""
        made: Tensor = getattr(layer, _HELD)(x, bias)
        return made

    def dequantize_weight(self, layer: nn.Module) -> Tensor:
        """The dense weight, (N, K)."""
        made: Tensor = getattr(layer, _HELD).dequantize(self.dtype)
        return made


def _number(shard: Any) -> int:
    """That of a shard in a layer of vLLM."""
    if isinstance(shard, tuple):  # one of the checkpoint that is several of vLLM
        return int(shard[0])
    return 0 if shard is None else _QKV[shard] if isinstance(shard, str) else int(shard)


class LowbitEmbeddingMethod(QuantizeMethodBase):  # type: ignore[misc]
    """Computes embeddings and heads of packed weights, which may be one."""

    def __init__(self, shards: list[Shard]) -> None:
        self.pieces = Pieces(shards)
        # Not the module itself, which would make the embedding a part of the head.
        self._tied: list[nn.Module] = []

    def create_weights(
        self, layer: nn.Module, *sizes: Any, params_dtype: torch.dtype, **more: Any
    ) -> None:
        """Makes parameters that keep what they are given."""
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
        if hasattr(layer, _HELD):
            return
        if self._tied:
            embedding = self._tied[0]
            embedding.quant_method.process_weights_after_loading(embedding)  # type: ignore[union-attr, operator]
            return
        ((weight, _),) = self.pieces.weights()
        name, world = self.pieces.shards[0].name, layer.tp_size
        at: Any = layer.shard_indices
        start, stop = at.org_vocab_start_index, at.org_vocab_end_index
        if stop > weight.shape[0] or stop <= start or layer.num_added_embeddings:
            raise ValueError(
                f"{name}: process {layer.tp_rank} of {world} cannot have the rows from {start} to {stop} of "
                f"{weight.shape[0]}, and {layer.num_added_embeddings} that are added"
            )
        (mine,) = _on_device([rows_between(weight, start, stop)])
        assert isinstance(mine, QuantTensor)
        _forget(layer)
        setattr(layer, _HELD, Rows(mine, self.dtype))

    def embedding(self, layer: nn.Module, indices: Tensor) -> Tensor:
        """Rows of the weight."""
        made: Tensor = getattr(layer, _HELD)(indices)
        return made

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x W^T + bias; columns that vLLM pads its vocabulary with are zero."""
        owner = self._tied[0] if self._tied else layer
        columns: Any = layer.num_embeddings_per_partition
        made: Tensor = getattr(owner, _HELD).product(x, bias, columns)
        return made


def enter() -> None:
    """Tells vLLM of the method; again changes nothing."""
    if METHOD not in QUANTIZATION_METHODS:
        register_quantization_config(METHOD)(LowbitVllmConfig)
