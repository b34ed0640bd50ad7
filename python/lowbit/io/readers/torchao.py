"""torchao as transformers saves it: integers of up to 8 bits in int8, and FP8.

W = (code - zero_point) * scale. What a tensor is stands in the metadata of its file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

import torch
from torch import Tensor

from lowbit.files import shown
from lowbit.io.readers.codes import FLOATS, Spec, affine, check, float8, need, of_rows, pack
from lowbit.io.readers.folder import FolderReader, Plan
from lowbit.weights.quantized import QuantTensor

_TYPES = ("Int8Tensor", "IntxUnpackedToInt8Tensor", "Float8Tensor")


class TorchAOReader(FolderReader):
    """An open folder of torchao."""

    name = "torchao"
    methods = frozenset({"torchao"})
    parts = ("_weight_qdata", "_weight_scale", "_weight_zero_point")
    markers = ("_weight_qdata", "_weight_scale")

    def _plan(self, layer: str, specs: Mapping[str, Spec]) -> Plan:
        kind, bits = self._kind(layer)
        dtype = torch.float8_e4m3fn if kind == "Float8Tensor" else torch.int8
        check("_weight_qdata", need(specs, "_weight_qdata"), (None, None), (dtype,))
        check("_weight_scale", need(specs, "_weight_scale"), (None, None), FLOATS)
        (n, k), ((blocks, groups), scale) = specs["_weight_qdata"][0], specs["_weight_scale"]
        if k % groups or n % blocks:
            raise ValueError(f"_weight_scale must divide a weight {(n, k)}, got {(blocks, groups)}")
        if kind == "Float8Tensor":
            return Plan((n, k), float8(k // groups, k, FLOATS[scale]), rows=n // blocks)
        zero = None
        if "_weight_zero_point" in specs:
            check(
                "_weight_zero_point", specs["_weight_zero_point"], (blocks, groups), (torch.int8,)
            )
            zeros = self._part(layer, "_weight_zero_point")
            zero = "int" if zeros is not None and bool(zeros.any()) else None
        format = affine(bits, k // groups, k, scale, zero)
        return Plan((n, k), format, bits=bits, rows=n // blocks)

    def _kind(self, layer: str) -> tuple[str, int]:
        """The type of a tensor and the bits of its codes."""
        file = self._files.get(f"{layer}._weight_qdata")
        text = "" if file is None else file.metadata.get(f"{layer}.weight", "")
        try:
            found = json.loads(text)
            kind, data = found["_type"], found.get("_data", {})
            target = data.get("target_dtype", {}).get("_data", "int8")
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise ValueError(
                f"the metadata of the file must say what it is, got {shown(text)}"
            ) from e
        if kind not in _TYPES:
            raise ValueError(f"its type must be one of {_TYPES}, got {shown(kind)}")
        match = re.fullmatch(r"int([2-8])", str(target))
        if not match:
            raise ValueError(f"target_dtype must be int2 to int8, got {shown(target)}")
        return kind, int(match[1])

    def _decode(self, plan: Plan, tensors: Mapping[str, Tensor]) -> QuantTensor | Tensor:
        assert plan.format is not None
        codes, n = tensors["_weight_qdata"], plan.shape[0]
        scales = of_rows(tensors["_weight_scale"], plan.rows, n)
        if plan.format.codec == "e4m3":
            made = {"codes": codes.view(torch.uint8).contiguous(), "scales": scales}
            return QuantTensor(plan.format, plan.shape, made)
        # Codes of 7 bits are held in 8.
        half = 1 << plan.format.bits - 1
        shifted = codes.int() + half
        low, high = (int(v) for v in shifted.aminmax())
        if low < 0 or high >= 2 * half:
            raise ValueError(
                f"_weight_qdata must be in [{-half}, {half}), got {low - half} to {high - half}"
            )
        named = {"scales": scales}
        if plan.format.zero == "int":
            zeros = tensors["_weight_zero_point"].int() + half
            if int(zeros.min()) < 0 or int(zeros.max()) >= 2 * half:
                raise ValueError(f"_weight_zero_point must be in [{-half}, {half})")
            named["zeros"] = of_rows(zeros.to(torch.uint8), plan.rows, n)
        return pack(shifted.to(torch.uint8), plan.format, **named)
