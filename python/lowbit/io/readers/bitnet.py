"""BitNet of transformers: ternary weights, four to a byte, with one scale.

Row r + i * N / 4 is in bits 2i of byte row r, as code - 1. The scale divides ("bitlinear") or multiplies
("autobitlinear"). The model was trained with activations in int8; here they are taken as they are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from lowbit.files import shown
from lowbit.formats import parse
from lowbit.io.readers.codes import FLOATS, Spec, check, need, pack
from lowbit.io.readers.folder import FolderReader, Plan
from lowbit.weights.quantized import QuantTensor

_CLASSES = ("bitlinear", "autobitlinear")


class BitNetReader(FolderReader):
    """An open BitNet folder."""

    name = "bitnet"
    methods = frozenset({"bitnet"})
    parts = ("weight", "weight_scale")
    markers = ("weight_scale",)

    def _check_config(self) -> None:
        self._class = self.config.get("linear_class", "bitlinear")
        if self._class not in _CLASSES:
            raise ValueError(
                f"{self.path}: linear_class must be one of {_CLASSES}, got {shown(self._class)}"
            )
        mode = self.config.get("quantization_mode", "offline")
        if mode != "offline":
            raise ValueError(
                f"{self.path}: quantization_mode must be 'offline', got {shown(mode)}: such weights are dense, "
                "and rounded in every call"
            )
        if self.config.get("use_rms_norm"):
            raise ValueError(f"{self.path}: use_rms_norm must be false, got true")

    def _plan(self, layer: str, specs: Mapping[str, Spec]) -> Plan:
        check("weight", need(specs, "weight"), (None, None), (torch.uint8, *FLOATS))
        shape, dtype = need(specs, "weight_scale")
        if math.prod(shape) != 1 or dtype not in FLOATS:
            raise ValueError(f"weight_scale must be one float, got {dtype} of shape {shape}")
        (rows, k), stored = specs["weight"]
        n = 4 * rows if stored == torch.uint8 else rows
        return Plan((n, k), parse("ternary_row_fp32"))

    def _decode(self, plan: Plan, tensors: Mapping[str, Tensor]) -> QuantTensor | Tensor:
        assert plan.format is not None
        weight, scale = tensors["weight"], tensors["weight_scale"].reshape(1, 1).float()
        if weight.dtype == torch.uint8:
            codes = torch.cat([(weight >> 2 * i) & 3 for i in range(4)])
        elif bool(((weight == 0) | (weight.abs() == 1)).all()):
            codes = (weight + 1).to(torch.uint8)
        else:
            raise ValueError("weight must hold -1, 0 and 1")
        scale = 1 / scale if self._class == "bitlinear" else scale
        return pack(codes, plan.format, scales=scale.expand(plan.shape[0], 1))
