"""NVIDIA's ModelOpt: NVFP4, and FP8 with one scale or one for each row.

NVFP4: `weight` (N, K / 2) uint8, the first value of a byte in its low half; W = E2M1 * (`weight_scale` (N, K / 16) in
E4M3 * `weight_scale_2`, one fp32 number). FP8: `weight` (N, K) in E4M3, W = code * `weight_scale`. Activations are
taken as they are. The configuration is in config.json, or in hf_quant_config.json alone.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lowbit.files import shown
from lowbit.formats import FORMATS
from lowbit.io.readers.codes import Spec, check, float8, need, of_rows
from lowbit.io.readers.folder import FolderReader, Plan
from lowbit.weights.quantized import QuantTensor

_GROUP = 16
_ALGORITHMS = ("NVFP4", "W4A16_NVFP4", "FP8", "FP8_PER_CHANNEL_PER_TOKEN", "MIXED_PRECISION")
# What changes a product: x is scaled by it, or something is added.
_MORE = ("pre_quant_scale", "svdquant_lora_a", "svdquant_lora_b")


class ModelOptReader(FolderReader):
    """An open folder of ModelOpt."""

    name = "modelopt"
    methods = frozenset({"modelopt", "modelopt_fp4"})
    parts = ("weight", "weight_scale", "weight_scale_2", "input_scale", *_MORE)
    markers = ("weight_scale",)

    def _check_config(self) -> None:
        algorithm = self.config.get("quant_algo")
        if algorithm not in _ALGORITHMS:
            raise ValueError(
                f"{self.path}: quant_algo must be one of {', '.join(_ALGORITHMS)}, got {shown(algorithm)}"
            )

    def _plan(self, layer: str, specs: Mapping[str, Spec]) -> Plan:
        if more := [part for part in _MORE if part in specs]:
            raise ValueError(
                f"{' and '.join(more)} must not be there: no format holds what it does"
            )
        shape, dtype = need(specs, "weight")
        if dtype == torch.uint8:
            check("weight", (shape, dtype), (None, None), (torch.uint8,))
            n, k = shape[0], 2 * shape[1]
            check(
                "weight_scale", specs["weight_scale"], (n, -(-k // _GROUP)), (torch.float8_e4m3fn,)
            )
            _check_number("weight_scale_2", need(specs, "weight_scale_2"))
            return Plan((n, k), FORMATS["nvfp4"])
        check("weight", (shape, dtype), (None, None), (torch.float8_e4m3fn,))
        n, k = shape
        if "weight_scale_2" in specs:
            raise ValueError("weight_scale_2 must not be there beside a weight in E4M3")
        if specs["weight_scale"][0] in ((n,), (n, 1)) and n > 1:
            check("weight_scale", specs["weight_scale"], specs["weight_scale"][0], (torch.float32,))
            return Plan((n, k), float8(None, k, "fp32"))
        _check_number("weight_scale", specs["weight_scale"])
        return Plan((n, k), float8(None, k, "fp32"), rows=0)

    def _decode(self, plan: Plan, tensors: Mapping[str, Tensor]) -> QuantTensor | Tensor:
        assert plan.format is not None
        codes, scales = tensors["weight"], tensors["weight_scale"]
        if plan.format.codec == "lut":
            made = {
                "codes": codes,
                "scales": scales,
                "scales2": tensors["weight_scale_2"].reshape(1),
            }
        else:
            n = plan.shape[0]
            each = of_rows(scales.reshape(-1, 1), plan.rows or n, n)
            made = {"codes": codes.view(torch.uint8), "scales": each}
        return QuantTensor(
            plan.format, plan.shape, {key: t.contiguous() for key, t in made.items()}
        )


def _check_number(part: str, spec: Spec) -> None:
    if spec[1] != torch.float32 or spec[0] not in ((), (1,)):
        raise ValueError(f"{part} must be one float32, got {spec[1]} of shape {spec[0]}")
