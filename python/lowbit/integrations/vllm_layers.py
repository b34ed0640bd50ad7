"""Which layers of a model vLLM computes with packed weights of a lowbit checkpoint: its `QuantizationConfig`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
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

from lowbit.integrations.served import Catalog
from lowbit.integrations.served_methods import METHOD, EmbeddingMethod, LinearMethod, ServedConfig


class LowbitLinearMethod(LinearMethod, LinearMethodBase):  # type: ignore[misc]
    """Computes linears of packed weights."""


class LowbitEmbeddingMethod(EmbeddingMethod, QuantizeMethodBase):  # type: ignore[misc]
    """Computes embeddings and heads of packed weights."""


class LowbitVllmConfig(ServedConfig, QuantizationConfig):  # type: ignore[misc]
    """What vLLM asks of a model whose config.json names "lowbit".

    Attributes:
        catalog: the packed layers of the checkpoint, by their names in vLLM.
    """

    def __init__(self) -> None:
        super().__init__()
        self.catalog = Catalog()

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
        """What computes a layer; None for the dense one of a kind that vLLM has one for.

        Raises:
            NotImplementedError: it is of experts, and the checkpoint has them packed.
        """
        shards = self.catalog.shards(prefix, self.packed_modules_mapping)
        device = current_platform.device_type
        if shards and device == "cpu":
            _allow_tiles()
        if isinstance(layer, LinearBase):
            return LowbitLinearMethod(shards, device) if shards else UnquantizedLinearMethod()
        if isinstance(layer, VocabParallelEmbedding):
            return LowbitEmbeddingMethod(shards, device) if shards else None
        if isinstance(layer, RoutedExperts):
            self.catalog.refuse_inside(prefix, "vLLM")
        return None


def _allow_tiles() -> None:
    """Asks the system for AMX, as dense products of torch do when they first run: vLLM's attention uses it without
    asking, and is an illegal instruction where every linear is packed.
    """
    if torch.cpu._is_amx_tile_supported():
        torch.cpu._init_amx()


def enter() -> None:
    """Tells vLLM of the method; again changes nothing."""
    if METHOD not in QUANTIZATION_METHODS:
        register_quantization_config(METHOD)(LowbitVllmConfig)
