"""Which layers of a model SGLang computes with packed weights of a lowbit checkpoint: its `QuantizationConfig`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from sglang.srt.layers import quantization
from sglang.srt.layers.linear import LinearBase
from sglang.srt.layers.quantization.base_config import (
    LinearMethodBase,
    QuantizationConfig,
    QuantizeMethodBase,
)
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod
from sglang.srt.layers.vocab_parallel_embedding import VocabParallelEmbedding
from torch import nn

from lowbit.integrations.served import Catalog
from lowbit.integrations.served_methods import METHOD, EmbeddingMethod, LinearMethod, ServedConfig

# Of linears that are one in SGLang, where a model does not say which.
_PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


class LowbitLinearMethod(LinearMethod, LinearMethodBase):  # type: ignore[misc]
    """Computes linears of packed weights."""


class LowbitEmbeddingMethod(EmbeddingMethod, QuantizeMethodBase):  # type: ignore[misc]
    """Computes embeddings and heads of packed weights."""


class LowbitSglangConfig(ServedConfig, QuantizationConfig):  # type: ignore[misc]
    """What SGLang asks of a model whose config.json names "lowbit".

    Args:
        catalog: the packed layers of the checkpoint.
    """

    def __init__(self, catalog: Catalog) -> None:
        super().__init__()
        self.catalog = catalog

    def get_scaled_act_names(self) -> list[str]:
        """None."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> LowbitSglangConfig:
        """Of the `quantization_config` of config.json, to which SGLang adds the configuration of the model.

        Raises:
            ValueError: the model is no folder, or its files are none of lowbit.
        """
        folder = Path(getattr(config.get("hf_config"), "_name_or_path", ""))
        if not folder.is_dir() or folder == Path():
            raise ValueError(
                f"the model must be a folder, as formats are in its files, got {str(folder)!r}"
            )
        made = cls(Catalog.of(folder))
        made.packed_modules_mapping = config.get("packed_modules_mapping") or {}
        return made

    def apply_weight_name_mapper(self, hf_to_sglang_mapper: Any) -> None:
        """Gives the layers the names that they have in SGLang."""
        self.catalog = self.catalog.renamed(hf_to_sglang_mapper._map_name)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """What computes a layer; None for the dense one of a kind that SGLang has one for.

        Raises:
            NotImplementedError: it is of experts, and the checkpoint has them packed.
        """
        shards = self.catalog.shards(prefix, {**_PACKED, **self.packed_modules_mapping})
        device = torch.get_default_device().type
        if isinstance(layer, LinearBase):
            return LowbitLinearMethod(shards, device) if shards else UnquantizedLinearMethod()
        if isinstance(layer, VocabParallelEmbedding):
            return LowbitEmbeddingMethod(shards, device) if shards else None
        self.catalog.refuse_inside(prefix, "SGLang")
        return None


def enter() -> None:
    """Tells SGLang of the method; again changes nothing."""
    for methods in (
        quantization.BASE_QUANTIZATION_METHODS,
        quantization.QUANTIZATION_METHODS,
        quantization.CPU_QUANTIZATION_METHODS,
    ):
        methods[METHOD] = LowbitSglangConfig
