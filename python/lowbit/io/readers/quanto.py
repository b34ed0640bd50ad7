"""quanto: int8 and FP8 with a scale per row, int4 and int2 with scales and shifts per group.

W = scale * code - shift, or scale * (code - shift) where the shift is an integer. Groups of int4 and int2 lie one
after the other, in slices of a byte; how many make a row only the model knows (`fit`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from lowbit.formats import Format
from lowbit.io.readers.codes import FLOATS, Spec, affine, check, float8, need, pack
from lowbit.io.readers.folder import FolderReader, Plan
from lowbit.weights.quantized import QuantTensor

_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_BITS = {"qint4": 4, "qint2": 2}


class QuantoReader(FolderReader):
    """An open folder of quanto, with its quanto_qmap.json."""

    name = "quanto"
    methods = frozenset({"quanto"})
    parts = (
        "weight._data", "weight._data._data", "weight._scale", "weight._shift", "input_scale", "output_scale",
    )  # fmt: skip
    markers = ("weight._data", "weight._data._data", "weight._scale")

    def _plan(self, layer: str, specs: Mapping[str, Spec]) -> Plan:
        scale = need(specs, "weight._scale")
        if "weight._data" in specs:
            check("weight._data", specs["weight._data"], (None, None), (torch.int8, *_FLOAT8))
            (n, k), dtype = specs["weight._data"]
            if scale[0] not in ((), (1,), (n, 1)) or scale[1] not in FLOATS:
                raise ValueError(f"weight._scale must be one float or ({n}, 1), got {scale}")
            if dtype == torch.int8:
                return Plan(
                    (n, k), affine(8, None, k, scale[1]), rows=1 if scale[0] == (n, 1) else 0
                )
            format = float8(None, k, FLOATS[scale[1]])
            if dtype == torch.float8_e5m2:
                format = Format(
                    name=format.name.replace("e4m3", "e5m2"),
                    codec="e5m2",
                    bits=8,
                    scale=format.scale,
                )
            return Plan((n, k), format, rows=1 if scale[0] == (n, 1) else 0)
        own = self.config.get("map", {}).get(layer)
        kind = own.get("weights") if isinstance(own, dict) else None
        if not isinstance(kind, str) or kind not in _BITS:
            raise ValueError(f"quanto_qmap.json must say one of {tuple(_BITS)}, got {kind!r:.100}")
        bits = _BITS[kind]
        check("weight._data._data", need(specs, "weight._data._data"), (None, None), (torch.uint8,))
        check("weight._scale", scale, (None, 1), FLOATS)
        stored, group = specs["weight._data._data"][0]
        rows = scale[0][0]
        if stored != -(-rows * bits // 8) or group * bits % 8:
            raise ValueError(
                f"weight._data._data must have {-(-rows * bits // 8)} rows for the {rows} groups of "
                f"weight._scale, and whole bytes a group, got {(stored, group)}"
            )
        shift = need(specs, "weight._shift")
        check("weight._shift", shift, scale[0], (*FLOATS, torch.int8, torch.uint8, torch.int32))
        zero = "min" if shift[1] in FLOATS else "float"
        return Plan((rows, group), affine(bits, group, group, scale[1], zero), bits=bits, rows=rows)

    def fit(self, layer: str, shape: tuple[int, ...]) -> None:
        """Makes rows of the groups of a layer, as long as the model's."""
        plan = self.plans[layer]
        if plan.bits and len(shape) == 2 and math.prod(shape) == math.prod(plan.shape):
            n, k = shape
            group = math.prod(plan.shape) // plan.rows
            if k % group == 0 and plan.format is not None:
                dtype, zero = plan.format.scale, plan.format.zero
                assert dtype is not None
                format = affine(plan.bits, group, k, dtype, zero)
                self.plans[layer] = Plan((n, k), format, bits=plan.bits, rows=plan.rows)
        super().fit(layer, shape)

    def _decode(self, plan: Plan, tensors: Mapping[str, Tensor]) -> QuantTensor | Tensor:
        assert plan.format is not None
        n, k = plan.shape
        scales = tensors["weight._scale"]
        if "weight._data" in tensors:
            data, scales = tensors["weight._data"], scales.reshape(-1, 1).expand(n, 1)
            if data.dtype == torch.int8:
                return pack((data.int() + 128).to(torch.uint8), plan.format, scales=scales)
            made = {"codes": data.view(torch.uint8).contiguous(), "scales": scales.contiguous()}
            return QuantTensor(plan.format, plan.shape, made)
        packed, bits = tensors["weight._data._data"], plan.bits
        codes = torch.cat([(packed >> bits * i) & ((1 << bits) - 1) for i in range(8 // bits)])
        groups = plan.format.num_groups(k)
        shift = tensors["weight._shift"]
        zeros = -shift if shift.is_floating_point() else shift
        named = {"scales": scales.view(n, groups), "zeros": zeros.to(scales.dtype).view(n, groups)}
        return pack(codes[: plan.rows].reshape(n, k), plan.format, **named)
