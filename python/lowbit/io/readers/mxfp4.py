"""MXFP4 of gpt-oss: all experts of a layer in one tensor, dense here until experts can be packed.

`*_blocks` (E, N, K / 32, 16) uint8, the first value of a byte in its low half, times 2^(`*_scales` - 127), which are
(E, N, K / 32). The model has them transposed, (E, K, N).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lowbit.codebooks.tables import E2M1_TABLE
from lowbit.float8 import e8m0_values
from lowbit.io.readers.codes import Spec, check, need
from lowbit.io.readers.folder import FolderReader, Plan
from lowbit.weights.quantized import QuantTensor

_LOSS = "its experts are one tensor of three dimensions"


class MXFP4Reader(FolderReader):
    """An open folder of gpt-oss."""

    name = "mxfp4"
    methods = frozenset({"mxfp4"})
    parts = ("blocks", "scales")
    markers = ("blocks",)
    separator = "_"

    def _plan(self, layer: str, specs: Mapping[str, Spec]) -> Plan:
        check("blocks", need(specs, "blocks"), (None, None, None, 16), (torch.uint8,))
        experts, n, groups, _ = specs["blocks"][0]
        check("scales", need(specs, "scales"), (experts, n, groups), (torch.uint8,))
        return Plan((32 * groups, n), None, _LOSS, experts=experts)

    def _decode(self, plan: Plan, tensors: Mapping[str, Tensor]) -> QuantTensor | Tensor:
        blocks, scales = tensors["blocks"], tensors["scales"]
        experts, k, n = plan.whole_shape
        table = torch.tensor(E2M1_TABLE, dtype=torch.float32, device=blocks.device)
        made = torch.empty(experts, k, n, dtype=torch.float32, device=blocks.device)
        for expert in range(experts):
            codes = torch.stack((blocks[expert] & 15, blocks[expert] >> 4), -1).flatten(2)
            values = table[codes.int()] * e8m0_values(scales[expert])[..., None]
            made[expert] = values.view(n, k).t()
        return made
