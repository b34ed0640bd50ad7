"""HQQ folders: every packing and both axes, against the formula written here; and against the library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from folders import check_layers, check_model, write_folder
from torch import Tensor

import lowbit
from lowbit.integrations.load import load_as_stored
from lowbit.io.readers.registry import open_checkpoint
from lowbit.nn import QuantLinear

HQQ = {"quant_method": "hqq", "quant_config": {}, "skip_modules": ["lm_head"]}
PACKINGS = {
    8: ("8bit_u8", 1, torch.uint8), 4: ("4bit_u8", 2, torch.uint8), 3: ("3bit_32", 10, torch.int32),
    2: ("2bit_u8", 4, torch.uint8), 1: ("1bit_u8", 8, torch.uint8),
}  # fmt: skip


def text(value: str) -> Tensor:
    return torch.tensor([ord(c) for c in value], dtype=torch.uint8)


def packer(
    bits: int, group: int, axis: int = 1, dtype: torch.dtype = torch.float32, **changed: Tensor
) -> Any:
    packing, slices, storage = PACKINGS[bits]

    def one(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        n, k = weight.shape
        groups = n * k // group
        rows, columns = (groups, group) if axis else (group, groups)
        codes = torch.randint(0, 2**bits, (rows, columns))
        shape = (groups, 1) if axis else (1, groups)
        scale = (torch.rand(shape) * 0.02 + 0.001).to(dtype)
        zero = (torch.rand(shape) * 2**bits).to(dtype)
        step = -(-rows // slices)
        packed = torch.zeros(step, columns, dtype=torch.int64)
        for row in range(rows):
            packed[row % step] |= codes[row] << bits * (slices - 1 - row // step)
        tensors = {
            "W_q": packed.to(storage),
            "scale": scale,
            "zero": zero,
            "shape": torch.tensor([n, k]),
            "axis": torch.tensor(axis, dtype=torch.int32),
            "nbits": torch.tensor(bits, dtype=torch.int32),
            "group_size": torch.tensor(group, dtype=torch.int32),
            "packing": text(packing),
            "quant_scale": torch.tensor(0, dtype=torch.uint8),
            "compute_dtype": text(str(dtype)),
            **changed,
        }
        decoded = (codes.float() - zero.float()) * scale.float()
        return tensors, decoded.reshape(n, k)

    return one


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", PACKINGS)
def test_rows_are_exact(tmp_path: Path, bits: int, dtype: torch.dtype) -> None:
    """Groups of 64 cross the 96 columns of down_proj: they are cut into 32. 1 bit is held in 2."""
    model = write_folder(tmp_path, HQQ, packer(bits, 64, dtype=dtype))
    found = check_layers(tmp_path, model, torch.float32)
    assert {w.format.bits for w in found.values()} == {max(bits, 2)}
    assert {w.format.group for w in found.values()} == {None, 32}
    check_model(tmp_path, model)


@pytest.mark.parametrize("bits", PACKINGS)
def test_columns_are_requantized_or_dense(tmp_path: Path, bits: int) -> None:
    """The reader's values are exact, a model's are so by choice; the warning says how far off they are otherwise."""
    model = write_folder(tmp_path, HQQ, packer(bits, 32, axis=0))
    reader = open_checkpoint(tmp_path)
    for name in reader.plans:
        assert torch.equal(reader.layer(name), model.get_submodule(name).weight)
    with pytest.warns(
        UserWarning,
        match=r"7 layers exactly \(its groups lie along columns, axis 0\), they are dense",
    ):
        exact = check_model(tmp_path, model, inexact="dense")
    assert not any(isinstance(m, QuantLinear) for m in exact.modules())
    for inexact in (None, "int6_g32_fp32"):
        wanted, worst = inexact or "int8_g32", 0.0
        with pytest.warns(
            UserWarning, match=f"quantized anew to {wanted}, with a relative"
        ) as told:
            loaded = lowbit.load_model(tmp_path, inexact=inexact)
        for name in reader.plans:
            weight = reader.layer(name)
            expected = lowbit.quantize(weight, wanted)
            got = loaded.get_submodule(name).quant_tensor()
            assert got.format == expected.format
            assert all(torch.equal(t, got.tensors[key]) for key, t in expected.tensors.items())
            worst = max(worst, float((expected.dequantize() - weight).norm() / weight.norm()))
        (message,) = [str(w.message) for w in told]
        assert f"a relative error of up to {worst:.2g}: model.layers.0" in message
    anew = lowbit.load_model(tmp_path, format="nf4")  # without a warning
    assert sum(isinstance(m, QuantLinear) for m in anew.modules()) == 7


def test_what_is_kept_is_exact(tmp_path: Path) -> None:
    """`lowbit quantize --quantized keep` writes no other values."""
    model = write_folder(tmp_path, HQQ, packer(4, 32, axis=0))
    with pytest.warns(UserWarning, match="they are dense"):
        kept, found = load_as_stored(tmp_path)
    assert not found.requantized
    name = "model.layers.0.mlp.up_proj"
    assert torch.equal(kept.get_submodule(name).weight, model.get_submodule(name).weight)


def test_the_choice_is_checked(tmp_path: Path) -> None:
    write_folder(tmp_path, HQQ, packer(4, 32, axis=0))
    with pytest.raises(ValueError, match="unknown format 'sparse'"):
        lowbit.load_model(tmp_path, inexact="sparse")


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "axis": ({"axis": 2}, "axis 0 or 1, got shape .* and axis 2"),
    "packing": ({"packing": text("9bit")}, "packing must be one of .* got '9bit'"),
    "other packing": ({"packing": text("2bit_u8")}, r"W_q must take \d+ bytes for .* packed as 2bit_u8"),
    "shape": ({"shape": torch.tensor([3, 7])}, "one shape that divides 21 weights"),
    "scales": ({"quant_scale": torch.tensor(1)}, "quant_scale must be 0"),
    "zeros": ({"zero": torch.zeros(3)}, "scale and zero must be floats of one shape"),
}  # fmt: skip


@pytest.mark.parametrize("case", CHANGES)
def test_contradictions_are_named(tmp_path: Path, case: str) -> None:
    changed, message = CHANGES[case]
    write_folder(tmp_path, HQQ, packer(4, 32, **changed))
    with pytest.raises(ValueError, match=message) as error:
        open_checkpoint(tmp_path)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("bits", [8, 4, 3, 2, 1])
def test_as_the_library(tmp_path: Path, bits: int, axis: int) -> None:
    quantize = pytest.importorskip("hqq.core.quantize")
    config = quantize.BaseQuantizeConfig(nbits=bits, group_size=32, axis=axis)

    def pack(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        linear = torch.nn.Linear(*reversed(weight.shape), bias=False)
        linear.weight.data = weight.clone()
        layer = quantize.HQQLinear(linear, config, compute_dtype=torch.float32, device="cpu")
        state = {k: v.detach() for k, v in layer.state_dict().items() if v is not None}
        return state, layer.dequantize().detach()

    model = write_folder(tmp_path, HQQ, pack)
    if axis:
        check_layers(tmp_path, model, torch.float32)
    else:
        reader = open_checkpoint(tmp_path)
        for name in reader.plans:
            assert torch.equal(reader.layer(name), model.get_submodule(name).weight)
