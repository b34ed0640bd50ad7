"""torchao folders: integers and FP8, against the formula written here; and the library's own tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import check_layers, check_model, linears, tiny, write_folder
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lowbit.io.readers.registry import open_checkpoint

TORCHAO = {"quant_method": "torchao", "quant_type": {}}


def packer(dtype: torch.dtype, group: int | None, *, bits: int = 8, zeros: bool = False) -> Any:
    def one(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        n, k = weight.shape
        groups = k // (group or k)
        half = 2 ** (bits - 1)
        if dtype == torch.int8:
            data = torch.randint(-half, half, (n, k), dtype=torch.int8)
        else:
            data = (weight * 1000).to(dtype)
        scale = (torch.rand(n, groups) * 0.01 + 0.001).bfloat16()
        zero = torch.randint(-half, half, (n, groups), dtype=torch.int8) * zeros
        tensors = {"_weight_qdata": data, "_weight_scale": scale}
        if dtype == torch.int8:
            tensors["_weight_zero_point"] = zero
        each = [t.float().repeat_interleave(k // groups, 1) for t in (zero, scale)]
        return tensors, (data.float() - each[0]) * each[1]

    return one


def describe(path: Path, kind: str, target: str = "int8") -> None:
    """What torchao writes into the header."""
    file = path / "model.safetensors"
    state = load_file(file)
    data = {"target_dtype": {"_type": "torch.dtype", "_data": target}}
    own = json.dumps({"_type": kind, "_data": data})
    names = [name.removesuffix("._weight_qdata") for name in state if "qdata" in name]
    save_file(state, file, {f"{name}.weight": own for name in names})


CASES = {
    "int8": (packer(torch.int8, None), "Int8Tensor", "int8", "int8_row_bf16"),
    "groups": (packer(torch.int8, 32), "IntxUnpackedToInt8Tensor", "int8", "int8_g32_bf16"),
    "int4": (packer(torch.int8, 32, bits=4), "IntxUnpackedToInt8Tensor", "int4", "int4_g32_bf16"),
    "int7": (packer(torch.int8, 32, bits=7), "IntxUnpackedToInt8Tensor", "int7", "int8_g32_bf16"),
    "zeros": (packer(torch.int8, 32, zeros=True), "IntxUnpackedToInt8Tensor", "int8", "uint8_g32_bf16"),
    "int4 zeros": (packer(torch.int8, 32, bits=4, zeros=True), "IntxUnpackedToInt8Tensor", "int4", "uint4_g32_bf16"),
    "fp8": (packer(torch.float8_e4m3fn, None), "Float8Tensor", "int8", "e4m3_row_bf16"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_layers_are_exact(tmp_path: Path, case: str) -> None:
    pack, kind, target, format = CASES[case]
    model = write_folder(tmp_path, TORCHAO, pack)
    describe(tmp_path, kind, target)
    found = check_layers(tmp_path, model, torch.float32)
    assert {w.format.name for w in found.values()} == {format}
    check_model(tmp_path, model)


@pytest.mark.parametrize(
    ("kind", "target", "message"),
    [
        ("Int4Tensor", "int8", "its type must be one of .* got 'Int4Tensor'"),
        ("Int8Tensor", "uint3", "target_dtype must be int2 to int8, got 'uint3'"),
        ("Float8Tensor", "int8", "_weight_qdata must be float8_e4m3fn, got int8"),
    ],
)
def test_contradictions_are_named(tmp_path: Path, kind: str, target: str, message: str) -> None:
    write_folder(tmp_path, TORCHAO, packer(torch.int8, 32))
    describe(tmp_path, kind, target)
    with pytest.raises(ValueError, match=message) as error:
        open_checkpoint(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_a_file_that_says_nothing_is_named(tmp_path: Path) -> None:
    write_folder(tmp_path, TORCHAO, packer(torch.int8, 32))
    with pytest.raises(ValueError, match="the metadata of the file must say what it is, got ''"):
        open_checkpoint(tmp_path)


def test_codes_out_of_range_are_named(tmp_path: Path) -> None:
    write_folder(tmp_path, TORCHAO, packer(torch.int8, 32))
    describe(tmp_path, "IntxUnpackedToInt8Tensor", "int4")
    with pytest.raises(ValueError, match=r"_weight_qdata must be in \[-8, 8\), got -1"):
        open_checkpoint(tmp_path).layer("model.layers.0.mlp.up_proj")


def test_as_the_library(tmp_path: Path) -> None:
    ao = pytest.importorskip("torchao.quantization")
    support = pytest.importorskip("torchao.prototype.safetensors.safetensors_support")
    granularity = pytest.importorskip("torchao.quantization.granularity")
    groups = granularity.PerGroup(32)
    for i, config in enumerate(
        (
            ao.Int8WeightOnlyConfig(),
            ao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=groups),
            ao.IntxWeightOnlyConfig(weight_dtype=torch.int3, granularity=groups),
            ao.Float8WeightOnlyConfig(),
        )
    ):
        folder = tmp_path / str(i)
        model = tiny().bfloat16()
        write_folder(folder, TORCHAO, packer(torch.int8, 32), model=tiny())
        ao.quantize_(model.model, config)
        for module in model.modules():
            for name, p in list(module._parameters.items()):
                if p is not None and type(p.data) is Tensor:
                    module._parameters[name] = nn.Parameter(p.data, False)
        state = {n: t.data if type(t) is nn.Parameter else t for n, t in model.state_dict().items()}
        tensors, metadata = support.flatten_tensor_state_dict(state)
        save_file(tensors, folder / "model.safetensors", metadata)
        reader = open_checkpoint(folder)
        assert set(reader.plans) == set(linears(model))
        for name in reader.plans:
            expected = model.get_submodule(name).weight.dequantize()
            assert torch.equal(reader.layer(name).dequantize(torch.bfloat16), expected), name
