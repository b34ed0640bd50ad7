"""FP8 folders: blocks that do not divide the weight, powers of two, one scale, scales of rows; transformers' own
dequantization with the blocks of the configuration is the oracle.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from folders import check_layers, check_model, write_folder
from torch import Tensor

from lowbit.io.readers.registry import open_checkpoint

E8M0 = getattr(torch, "float8_e8m0fnu", None)


def fp8(block: list[int] | None = None, **more: Any) -> dict[str, Any]:
    return {
        "quant_method": "fp8",
        "weight_block_size": block,
        "activation_scheme": "dynamic",
        **more,
    }


def packer(
    rows: int,
    group: int,
    part: str = "weight_scale_inv",
    shape: Any = None,
    powers: Any = None,
    codes: Any = None,
) -> Any:
    """Scales of blocks of rows x group; `shape` of the stored ones, `codes` in another dtype."""

    def one(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        n, k = weight.shape
        values = (weight * 1000).to(torch.float8_e4m3fn)
        scales = torch.rand(-(-n // (rows or n)), -(-k // (group or k))) * 0.02 + 0.001
        stored = scales
        if powers is not None:
            stored = torch.randint(115, 130, scales.shape).to(torch.uint8)
            scales = torch.exp2(stored.float() - 127)
            stored = stored.view(powers)
        each = scales.repeat_interleave(rows or n, 0)[:n].repeat_interleave(group or k, 1)[:, :k]
        stored = stored if shape is None else stored.reshape(shape)
        return {"weight": values.view(codes or values.dtype), part: stored}, values.float() * each

    return one


def with_bound(name: str, weight: Tensor) -> Any:
    tensors, decoded = packer(1, 0, "weight_scale")(name, weight)
    return {**tensors, "input_scale_ub": torch.tensor([1200.0])}, decoded


def fp4(part: str = "weight_scale_inv", powers: Any = torch.uint8) -> Any:
    """MXFP4 as experts of DeepSeek-V4 have it; transformers' own dequantization says what the values are."""

    def one(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        module = pytest.importorskip("transformers.integrations.finegrained_fp8")
        n, k = weight.shape
        codes = torch.randint(-128, 128, (n, k // 2), dtype=torch.int8)
        scales = torch.randint(116, 123, (n, k // 32), dtype=torch.uint8)
        decoded = module.Fp8Dequantize(None)._dequantize_one(codes, scales, torch.float32)
        return {"weight": codes, part: scales.view(powers)}, decoded

    return one


CASES = {
    "whole blocks": (fp8([32, 32]), packer(32, 32), "e4m3_g32_fp32"),
    "ragged blocks": (fp8([48, 40]), packer(48, 40), "e4m3_g40_fp32"),
    "blocks larger than the weight": (fp8([128, 128]), packer(128, 128), "e4m3_row_fp32"),
    "default blocks": ({"quant_method": "fp8"}, packer(128, 128), "e4m3_row_fp32"),
    "one scale": (fp8(), packer(0, 0, shape=()), "e4m3_row_fp32"),
    "one weight_scale": (fp8(), packer(0, 0, "weight_scale", (1,)), "e4m3_row_fp32"),
    "bytes of powers": (fp8([32, 32]), packer(32, 32, powers=torch.uint8), "e4m3_g32_e8m0"),
    "mxfp8": (fp8([1, 32], quant_method="mxfp8"), packer(1, 32, powers=torch.uint8), "e4m3_g32_e8m0"),
    "fbgemm": ({"quant_method": "fbgemm_fp8"}, with_bound, "e4m3_row_fp32"),
    "fp4": (fp8(expert_dtype="fp4"), fp4(), "mxfp4"),
    "fp4, named scale": (fp8([128, 128]), fp4("scale"), "mxfp4"),
    "blocks named scale": (fp8([32, 32]), packer(32, 32, "scale"), "e4m3_g32_fp32"),
    "rows, one dimension": ({"quant_method": "fbgemm_fp8"}, packer(1, 0, "weight_scale", (-1,)), "e4m3_row_fp32"),
}  # fmt: skip
if E8M0 is not None:
    CASES["fp4, E8M0"] = fp8(scale_fmt="ue8m0"), fp4("scale", E8M0), "mxfp4"
    CASES["E8M0"] = fp8([32, 32], scale_fmt="ue8m0"), packer(32, 32, powers=E8M0), "e4m3_g32_e8m0"


@pytest.mark.parametrize("case", CASES)
def test_layers_are_exact(tmp_path: Path, case: str) -> None:
    quantization, pack, format = CASES[case]
    model = write_folder(tmp_path, quantization, pack)
    found = check_layers(tmp_path, model, torch.float32)
    assert format in {w.format.name for w in found.values()}
    check_model(tmp_path, model)


@pytest.mark.parametrize("block", [[32, 32], [48, 40]])
def test_as_transformers(tmp_path: Path, block: list[int]) -> None:
    """In fp32, where it rounds no scale."""
    module = pytest.importorskip("transformers.integrations.finegrained_fp8")
    if not hasattr(module, "_dequantize_fp8_weight"):
        pytest.skip("this version of transformers has another function")

    def pack(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        tensors, _ = packer(*block)(name, weight)
        parts = tensors["weight"], tensors["weight_scale_inv"]
        return tensors, module._dequantize_fp8_weight(*parts, block, torch.float32)

    model = write_folder(tmp_path, fp8(block), pack)
    check_layers(tmp_path, model, torch.float32)


def plain_int8(name: str, weight: Tensor) -> Any:
    """Not two codes a byte: what other programs mean by int8."""
    return {"weight": (weight * 100).to(torch.int8), "scale": torch.ones(len(weight), 1)}, weight


def floats(name: str, weight: Tensor) -> Any:
    tensors, decoded = fp4("scale")(name, weight)
    return {**tensors, "scale": tensors["scale"].float()}, decoded


CHANGES: dict[str, tuple[dict[str, Any], Any, str]] = {
    "other blocks": (fp8([64, 64]), packer(32, 32), r"weight_scale_inv must have shape \(1, \d\) for blocks of 64"),
    "no blocks": (fp8(), packer(32, 32), "weight_scale_inv must be one number without weight_block_size"),
    "int8": (fp8(), plain_int8, r"layer .*_proj': scale must be \S+ or uint8, got float32"),
    "fp4 with scales in floats": (fp8(), floats, r"scale must be \S+ or uint8, got float32"),
    "fp4 in blocks": (
        fp8(), packer(32, 32, powers=torch.uint8, codes=torch.int8),
        r"weight_scale_inv must have shape \((64|32|96), (4|6)\), got",
    ),
    "bad blocks": (fp8([0, 32]), packer(32, 32), r"weight_block_size must be two .*, got \[0, 32\]"),
}  # fmt: skip


@pytest.mark.parametrize("case", CHANGES)
def test_a_contradicting_configuration_is_named(tmp_path: Path, case: str) -> None:
    quantization, pack, message = CHANGES[case]
    write_folder(tmp_path, quantization, pack)
    with pytest.raises(ValueError, match=message) as error:
        open_checkpoint(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_a_weight_without_its_scale_is_not_taken_for_a_dense_one(tmp_path: Path) -> None:
    def pack(name: str, weight: Tensor) -> Any:
        tensors, decoded = packer(32, 32)(name, weight)
        if "q_proj" in name:
            del tensors["weight_scale_inv"]
        return tensors, decoded

    write_folder(tmp_path, fp8([32, 32]), pack)
    with pytest.raises(ValueError, match=r"q_proj.weight is torch.float8_e4m3fn, and the tensors"):
        open_checkpoint(tmp_path)
