"""Folders of NVIDIA's ModelOpt: NVFP4 and FP8; its own tensors are the oracle where it is installed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from expert_folders import check, write
from folders import check_layers, check_model, write_folder
from torch import Tensor

import lowbit
from lowbit.io.readers.registry import open_checkpoint

# OCP MX, E2M1: the sign is the fourth bit.
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def modelopt(algorithm: str = "NVFP4", **more: Any) -> dict[str, Any]:
    return {
        "quant_method": "modelopt",
        "quant_algo": algorithm,
        "ignore": ["lm_head"],
        "producer": {"name": "modelopt", "version": "0.47.0"},
        **more,
    }


def nvfp4(shape: Any = ()) -> Any:
    """`shape` of the number that all scales are multiplied by."""

    def one(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        n, k = weight.shape
        codes = torch.randint(0, 16, (n, k), dtype=torch.uint8)
        scales = (torch.rand(n, k // 16) * 400 + 1).to(torch.float8_e4m3fn)
        factor = torch.rand(shape) * 1e-4 + 1e-5
        values = torch.tensor([*E2M1, *(-v for v in E2M1)])[codes.long()]
        each = (scales.float() * factor).repeat_interleave(16, 1)
        tensors = {
            "weight": codes[:, ::2] | codes[:, 1::2] << 4,
            "weight_scale": scales,
            "weight_scale_2": factor,
            "input_scale": torch.tensor(0.01),
        }
        return tensors, values * each

    return one


def fp8(rows: bool = False, shape: Any = ()) -> Any:
    """One scale, or one for each row; `shape` of the stored ones."""

    def one(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        codes = (weight * 1000).to(torch.float8_e4m3fn)
        scales = torch.rand(len(weight) if rows else 1, 1) * 0.02 + 0.001
        tensors = {"weight": codes, "weight_scale": scales.reshape(shape)}
        return {**tensors, "input_scale": torch.tensor(0.01)}, codes.float() * scales

    return one


def mixed(name: str, weight: Tensor) -> Any:
    return (nvfp4() if "mlp" in name else fp8())(name, weight)


CASES = {
    "nvfp4": (modelopt(), nvfp4(), {"nvfp4"}),
    "nvfp4, weights alone": (modelopt("W4A16_NVFP4"), nvfp4((1,)), {"nvfp4"}),
    "fp8": (modelopt("FP8"), fp8(), {"e4m3_row_fp32"}),
    "fp8, rows": (modelopt("FP8_PER_CHANNEL_PER_TOKEN"), fp8(True, (-1,)), {"e4m3_row_fp32"}),
    "both": (modelopt("MIXED_PRECISION"), mixed, {"nvfp4", "e4m3_row_fp32"}),
}


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_layers_are_exact(tmp_path: Path, case: str, apart: bool) -> None:
    """With the configuration in config.json, or `apart` as older folders have it."""
    quantization, pack, formats = CASES[case]
    model = write_folder(tmp_path, quantization, pack)
    if apart:
        config = json.loads((tmp_path / "config.json").read_text())
        del config["quantization_config"]
        (tmp_path / "config.json").write_text(json.dumps(config))
        own = {"quant_algo": quantization["quant_algo"], "exclude_modules": ["lm_head"]}
        written = {"producer": {"name": "modelopt"}, "quantization": own}
        (tmp_path / "hf_quant_config.json").write_text(json.dumps(written))
    found = check_layers(tmp_path, model, torch.float32)
    assert {w.format.name for w in found.values()} == formats
    check_model(tmp_path, model)


def test_experts(tmp_path: Path) -> None:
    oracle = write(tmp_path / "a", modelopt(), nvfp4(), "Qwen3Moe")
    names = check(lowbit.load_model(tmp_path / "a"), oracle)
    assert len(names) == 16


def test_what_modelopt_makes(tmp_path: Path) -> None:
    """Its own weights, and what it says that they stand for."""
    module = pytest.importorskip("modelopt.torch.quantization.qtensor.nvfp4_tensor")

    def pack(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        made, scales, factor = module.NVFP4QTensor.quantize(weight, 16)
        values = made.dequantize(
            torch.float32, scale=scales, double_scale=factor, block_sizes={-1: 16}
        )
        tensors = {
            "weight": made._quantized_data,
            "weight_scale": scales,
            "weight_scale_2": factor,
        }
        return tensors, values

    model = write_folder(tmp_path, modelopt(), pack)
    check_layers(tmp_path, model, torch.float32)


def lacking(part: str, **more: Tensor) -> Any:
    def one(name: str, weight: Tensor) -> Any:
        tensors, decoded = nvfp4()(name, weight)
        tensors = {**tensors, **more}
        tensors.pop(part, None)
        return tensors, decoded

    return one


BAD: dict[str, tuple[dict[str, Any], Any, str]] = {
    "AWQ": (modelopt("NVFP4_AWQ"), nvfp4(), "quant_algo must be one of NVFP4, .*, got 'NVFP4_AWQ'"),
    "no algorithm": (modelopt(), nvfp4(), "quant_algo must be one of .*, got None"),
    "x is scaled": (
        modelopt(), lacking("", pre_quant_scale=torch.ones(64)), "_proj': pre_quant_scale must not be there",
    ),
    "no second scale": (modelopt(), lacking("weight_scale_2"), "weight_scale_2 is missing"),
    "two second scales": (
        modelopt(), lacking("", weight_scale_2=torch.ones(2)), r"weight_scale_2 must be one float32, got .* \(2,\)",
    ),
    "another group": (
        modelopt(), lacking("", weight_scale=torch.ones(64, 2).to(torch.float8_e4m3fn)),
        r"weight_scale must have shape \((64|32|96), (4|6)\), got \(64, 2\)",
    ),
    "integers": (
        modelopt("MIXED_PRECISION"), lacking("", weight=torch.ones(64, 64, dtype=torch.int8)),
        "weight must be float8_e4m3fn, got int8",
    ),
    "blocks": (modelopt("FP8"), lacking("", weight=torch.ones(64, 64).to(torch.float8_e4m3fn)), "beside a weight"),
    "scales of blocks": (
        modelopt("FP8"), lambda name, w: ({**fp8()(name, w)[0], "weight_scale": torch.ones(2, 2)}, w),
        r"weight_scale must be one float32, got torch.float32 of shape \(2, 2\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_is_not_known_is_refused(tmp_path: Path, case: str) -> None:
    quantization, pack, message = BAD[case]
    if case == "no algorithm":
        del quantization["quant_algo"]
    write_folder(tmp_path, quantization, pack)
    with pytest.raises(ValueError, match=message) as error:
        open_checkpoint(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_a_configuration_that_is_none(tmp_path: Path) -> None:
    write_folder(tmp_path, {}, nvfp4())
    (tmp_path / "hf_quant_config.json").write_text('{"quantization": []}')
    with pytest.raises(ValueError, match="hf_quant_config.json: quantization must be an object"):
        open_checkpoint(tmp_path)
