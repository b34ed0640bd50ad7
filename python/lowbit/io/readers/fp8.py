"""FP8 of transformers: "fp8" with a scale per block (DeepSeek, Qwen) or tensor, "mxfp8", and "fbgemm_fp8" per row.

W = code * scale, whatever the name `weight_scale_inv` says; DeepSeek-V4 calls it `scale`. Activations are taken as they
are. Experts have a tensor each, or one for all: `a.gate_up_proj` (E, N, K) with scales (E, ...) in
`a.gate_up_proj_scale_inv`. Those of DeepSeek-V4 ("expert_dtype": "fp4") are MXFP4: (N, K / 2) int8, two E2M1 values a
byte and the first in its low half, with scales (N, K / 32).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lowbit.files import shown
from lowbit.formats import FORMATS
from lowbit.io.readers.codes import FLOATS, Spec, check, float8, of_rows
from lowbit.io.readers.folder import FolderReader, Plan
from lowbit.weights.quantized import QuantTensor

_POWERS = (getattr(torch, "float8_e8m0fnu", torch.uint8), torch.uint8)
_SCALES = ("weight_scale_inv", "weight_scale", "scale")
_FP4_GROUP = 32
_CODES = (torch.float8_e4m3fn, torch.int8)


class FP8Reader(FolderReader):
    """An open folder of FP8 weights."""

    name = "fp8"
    methods = frozenset({"fp8", "mxfp8", "fbgemm_fp8"})
    parts = ("weight", *_SCALES, "input_scale", "input_scale_ub", "activation_scale")
    markers = _SCALES

    def _check_config(self) -> None:
        default = {"fp8": [128, 128], "mxfp8": [1, 32]}.get(self.config["quant_method"])
        block = self.config.get("weight_block_size", default)
        if block is not None and not (
            isinstance(block, list)
            and len(block) == 2
            and all(isinstance(b, int) and 0 < b < 2**31 for b in block)
        ):
            raise ValueError(
                f"{self.path}: weight_block_size must be two positive integers, got {shown(block)}"
            )
        self._block: list[int] | None = block

    def _find_layers(self) -> dict[str, dict[str, str]]:
        found = super()._find_layers()
        for layer, parts in list(found.items()):
            # A scale of another thing may have this name.
            if parts.keys() <= {"weight", "scale"} and not self._has_codes(f"{layer}.weight"):
                del found[layer]
        for name, (shape, dtype) in self.dense.items():
            if len(shape) == 3 and dtype in _CODES and f"{name}_scale_inv" in self.dense:
                parts = {"weight": name, "weight_scale_inv": f"{name}_scale_inv"}
                if (own := f"{name}_activation_scale") in self.dense:
                    parts["activation_scale"] = own
                found[name] = parts
        return found

    def _has_codes(self, name: str) -> bool:
        return name in self.dense and self.dense[name][1] in _CODES

    def _stacked(self, layer: str, names: Mapping[str, str]) -> bool:
        return names.get("weight") == layer

    def _plan(self, layer: str, specs: Mapping[str, Spec]) -> Plan:
        if "weight" not in specs:
            raise ValueError(f"weight is missing, the layer has {', '.join(specs)}")
        check("weight", specs["weight"], (None, None), _CODES)
        n, k = specs["weight"][0]
        part = next(name for name in _SCALES if name in specs)
        shape, dtype = specs[part]
        if specs["weight"][1] == torch.int8:
            # No other layout in int8 is known: not of blocks, nor of scales in floats.
            check(part, specs[part], (n, -(-2 * k // _FP4_GROUP)), _POWERS)
            return Plan((n, 2 * k), FORMATS["mxfp4"])
        if dtype not in FLOATS and dtype not in _POWERS:
            raise ValueError(f"{part} must be float or E8M0, got {dtype}")
        scale = FLOATS.get(dtype, "e8m0")
        if shape in ((), (1,), (1, 1)) and (part == "weight_scale" or self._block is None):
            return Plan((n, k), float8(None, k, scale), rows=0)
        if part == "weight_scale" and shape in ((n,), (n, 1)):
            return Plan((n, k), float8(None, k, scale))
        rows, group = self._block or (n, k)
        wanted = (-(-n // rows), -(-k // group))
        if layer in self.stacks and shape == (2, wanted[1]) and wanted[0] == 1 and n % 2 == 0:
            rows = n // 2  # gates, and what they multiply
        elif self._block is None:
            raise ValueError(f"{part} must be one number without weight_block_size, got {shape}")
        elif shape != wanted:
            raise ValueError(
                f"{part} must have shape {wanted} for blocks of {rows} x {group} of a weight {(n, k)}, "
                f"got {shape}"
            )
        return Plan((n, k), float8(group, k, scale), rows=rows)

    def _decode(self, plan: Plan, tensors: Mapping[str, Tensor]) -> QuantTensor | Tensor:
        assert plan.format is not None
        scales = next(tensors[name] for name in _SCALES if name in tensors)
        if plan.format.scale == "e8m0":
            scales = scales.view(torch.uint8)
        n = plan.shape[0]
        blocks = scales if scales.dim() == 2 else scales.reshape(-1, 1)
        codes = tensors["weight"].view(torch.uint8).contiguous()
        made = {"codes": codes, "scales": of_rows(blocks, plan.rows or n, n)}
        return QuantTensor(plan.format, plan.shape, made)
