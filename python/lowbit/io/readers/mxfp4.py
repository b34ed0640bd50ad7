"""MXFP4 of gpt-oss: all experts of a layer in one tensor.

`*_blocks` (E, N, K / 32, 16) uint8, the first value of a byte in its low half, times 2^(`*_scales` - 127), which are
(E, N, K / 32). The model has them transposed, (E, K, N).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lowbit.formats import FORMATS
from lowbit.io.readers.codes import Spec, check, need
from lowbit.io.readers.folder import FolderReader, Plan
from lowbit.weights.quantized import QuantTensor


class MXFP4Reader(FolderReader):
    """An open folder of gpt-oss."""

    name = "mxfp4"
    methods = frozenset({"mxfp4"})
    parts = ("blocks", "scales")
    markers = ("blocks",)
    separator = "_"

    def _stacked(self, layer: str, names: Mapping[str, str]) -> bool:
        return True

    def _plan(self, layer: str, specs: Mapping[str, Spec]) -> Plan:
        check("blocks", need(specs, "blocks"), (None, None, 16), (torch.uint8,))
        n, groups, _ = specs["blocks"][0]
        check("scales", need(specs, "scales"), (n, groups), (torch.uint8,))
        return Plan((n, 32 * groups), FORMATS["mxfp4"])

    def _decode(self, plan: Plan, tensors: Mapping[str, Tensor]) -> QuantTensor | Tensor:
        assert plan.format is not None
        # The very bytes of a canonical row.
        codes = tensors["blocks"].flatten(1).contiguous()
        return QuantTensor(
            plan.format, plan.shape, {"codes": codes, "scales": tensors["scales"].contiguous()}
        )
