"""bitsandbytes: NF4 and FP4 with and without double quantization, and LLM.int8.

4 bits: W = quant_map[code] * absmax[i // blocksize] with i over the flattened weight, the first code of a byte in its
high half. 8 bits: W[n, k] = code[n, k] * SCB[n] / 127, here with the one scale SCB[n] / 127 of a row.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit.files import shown
from lowbit.formats import DQ_BLOCK, FORMATS, Format
from lowbit.io.foreign import quantization_config
from lowbit.io.readers.codes import Spec, affine, check, integer, need, pack
from lowbit.io.readers.folder import FolderReader, Plan
from lowbit.reference import dynamic_map
from lowbit.weights.quantized import QuantTensor

_STATES = ("weight.quant_state.bitsandbytes__nf4", "weight.quant_state.bitsandbytes__fp4")
_STORAGE = (torch.uint8, torch.int8, torch.bfloat16, torch.float16, torch.float32)
# Blocks that cross rows are cut where rows end; shorter pieces than this would take more bits than the codes.
_MIN_GROUP = 16


class BitsAndBytesReader(FolderReader):
    """An open bitsandbytes folder."""

    name = "bitsandbytes"
    methods = frozenset({"bitsandbytes", "bitsandbytes_4bit", "bitsandbytes_8bit"})
    parts = (
        "weight", "weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map", *_STATES,
        "SCB", "weight_format",
    )  # fmt: skip
    markers = ("weight.absmax", "weight.quant_map", *_STATES, "SCB")

    @classmethod
    def detect(cls, path: Path) -> bool:
        """By quant_method, which old folders leave out."""
        config = quantization_config(path)
        if config is None:
            return False
        old = config.get("load_in_4bit") or config.get("load_in_8bit")
        return config.get("quant_method") in cls.methods or (
            bool(old) and "quant_method" not in config
        )

    def _plan(self, layer: str, specs: Mapping[str, Spec]) -> Plan:
        if "SCB" in specs:
            check("weight", need(specs, "weight"), (None, None), (torch.int8,))
            n, k = specs["weight"][0]
            _check_numel("SCB", specs["SCB"], n, torch.float32)
            layout = self._part(layer, "weight_format")
            if layout is not None and (layout.numel() != 1 or int(layout) != 0):
                raise ValueError(f"weight_format must be 0 (row), got {layout.tolist()}")
            return Plan((n, k), affine(8, None, k, "fp32"))
        state = self._state(layer, specs)
        n, k = state["shape"]
        block = integer(state, "blocksize")
        blocks = -(-n * k // block)
        check("weight.quant_map", need(specs, "weight.quant_map"), (16,), (torch.float32,))
        shape, dtype = need(specs, "weight")
        if dtype not in _STORAGE or math.prod(shape) * dtype.itemsize < -(-n * k // 2):
            raise ValueError(
                f"weight must hold {-(-n * k // 2)} bytes for shape {(n, k)}, got {dtype} of shape {shape}"
            )
        nested = "nested_blocksize" in state or "weight.nested_absmax" in specs
        double = nested and self._check_nested(layer, specs, state, blocks)
        if not nested:
            check("weight.absmax", need(specs, "weight.absmax"), (blocks,), (torch.float32,))
        group = math.gcd(k, block)
        if k % 2 or group < min(block, k, _MIN_GROUP):
            return Plan((n, k), None, f"blocks of {block} weights cross rows of {k}")
        table = self._part(layer, "weight.quant_map")
        assert table is not None
        whole = k % block == 0
        scale = "dq8" if double and whole else "fp32"
        return Plan((n, k), _format(tuple(table.tolist()), group, k, scale))

    def _state(self, layer: str, specs: Mapping[str, Spec]) -> dict[str, Any]:
        name = next((part for part in _STATES if part in specs), None)
        if name is None:
            raise ValueError(f"weight.quant_state is missing, the layer has {', '.join(specs)}")
        check(name, specs[name], (None,), (torch.uint8,))
        raw = self._part(layer, name)
        assert raw is not None
        try:
            state = json.loads(bytes(raw.tolist()))
        except ValueError as e:
            raise ValueError(f"{name} must be JSON in bytes: {e}") from None
        shape = state.get("shape") if isinstance(state, dict) else None
        if not (
            isinstance(shape, list)
            and len(shape) == 2
            and all(isinstance(s, int) and 0 < s < 2**31 for s in shape)
        ):
            raise ValueError(f"{name}: shape must be two positive integers, got {shown(shape)}")
        assert isinstance(state, dict)
        return state

    def _check_nested(
        self, layer: str, specs: Mapping[str, Spec], state: Mapping[str, Any], blocks: int
    ) -> bool:
        """Whether the second level is that of "dq8"."""
        size = integer(state, "nested_blocksize")
        offset = state.get("nested_offset")
        if not isinstance(offset, int | float) or not math.isfinite(offset):
            raise ValueError(f"nested_offset must be a number, got {shown(offset)}")
        check("weight.absmax", need(specs, "weight.absmax"), (blocks,), (torch.uint8,))
        factors = need(specs, "weight.nested_absmax")
        check("weight.nested_absmax", factors, (-(-blocks // size),), (torch.float32,))
        check(
            "weight.nested_quant_map",
            need(specs, "weight.nested_quant_map"),
            (256,),
            (torch.float32,),
        )
        table = self._part(layer, "weight.nested_quant_map")
        assert table is not None
        return size == DQ_BLOCK and torch.equal(table, dynamic_map())

    def _decode(self, plan: Plan, tensors: Mapping[str, Tensor]) -> QuantTensor | Tensor:
        n, k = plan.shape
        if "SCB" in tensors:
            assert plan.format is not None
            scales = (tensors["SCB"].reshape(n, 1) / 127).float()
            return pack((tensors["weight"].int() + 128).to(torch.uint8), plan.format, scales=scales)
        state_name = next(part for part in _STATES if part in tensors)
        state = json.loads(bytes(tensors[state_name].flatten().tolist()))
        block = state["blocksize"]
        raw = tensors["weight"].contiguous().view(torch.uint8).flatten()[: -(-n * k // 2)]
        if plan.format is None:
            codes = torch.stack((raw >> 4, raw & 15), 1).flatten()[: n * k]
            factors = _absmax(tensors, state).repeat_interleave(block)[: n * k]
            return (tensors["weight.quant_map"][codes.long()] * factors).view(n, k)
        made = {"codes": ((raw >> 4) | (raw << 4)).view(n, k // 2)}
        if plan.format.scale == "dq8":
            made["scales"] = tensors["weight.absmax"].view(n, -1)
            made["scales2"] = tensors["weight.nested_absmax"]
            made["scales2_offset"] = torch.tensor(
                state["nested_offset"], dtype=torch.float32, device=raw.device
            )
        else:
            groups = plan.format.num_groups(k)
            first = torch.arange(n * groups, dtype=torch.int64, device=raw.device)
            first *= plan.format.group or k
            made["scales"] = _absmax(tensors, state)[first // block].view(n, groups)
        return QuantTensor(plan.format, plan.shape, made)


def _absmax(tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> Tensor:
    codes = tensors["weight.absmax"]
    if "weight.nested_absmax" not in tensors:
        return codes
    size = state["nested_blocksize"]
    factors = tensors["weight.nested_absmax"].repeat_interleave(size)[: codes.numel()]
    values: Tensor = tensors["weight.nested_quant_map"][codes.long()] * factors
    return values + torch.tensor(state["nested_offset"], dtype=torch.float32, device=codes.device)


def _format(table: tuple[float, ...], group: int, k: int, scale: str) -> Format:
    kind = "nf4" if table == FORMATS["nf4"].table else "bnb4"
    tail = "row" if group >= k else f"g{group}"
    return Format(
        name=f"{kind}_{tail}_{scale}",
        codec="lut",
        bits=4,
        group=None if group >= k else group,
        scale=scale,
        table=table,
    )


def _check_numel(part: str, spec: Spec, count: int, dtype: torch.dtype) -> None:
    if math.prod(spec[0]) != count or spec[1] != dtype:
        raise ValueError(f"{part} must be {count} {dtype}, got {spec[1]} of shape {spec[0]}")
