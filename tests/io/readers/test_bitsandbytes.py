"""bitsandbytes folders: 4 bits with both tables, with and without double quantization, blocks that cross rows, and
LLM.int8, against the formula written here; and the library's own functions, where it is installed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import check_layers, check_model, tiny, write_folder
from torch import Tensor

import lowbit
from lowbit.formats import FORMATS
from lowbit.io.readers.registry import open_checkpoint
from lowbit.nn import QuantLinear
from lowbit.reference import dynamic_map

FP4 = (0, 0.0052083, 0.6667, 1, 0.3333, 0.5, 0.1667, 0.25)
TABLES = {
    "nf4": torch.tensor(FORMATS["nf4"].table),
    "fp4": torch.tensor([*FP4, *(-v for v in FP4)]),
}
FOUR = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
EIGHT = {"quant_method": "bitsandbytes", "load_in_8bit": True}


def packer(
    kind: str = "nf4",
    block: int = 64,
    *,
    double: bool = False,
    nested: int = 256,
    storage: torch.dtype = torch.uint8,
    **changed: Any,
) -> Any:
    table = TABLES[kind]

    def one(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        n, k = weight.shape
        codes, count = torch.randint(0, 16, (n * k,)), -(-n * k // block)
        raw = (codes[::2] << 4 | codes[1::2]).to(torch.uint8)
        state: dict[str, Any] = {"quant_type": kind, "blocksize": block, "shape": [n, k]}
        tensors = {"weight": raw[:, None].contiguous(), "weight.quant_map": table}
        absmax = torch.rand(count) + 0.1
        if double:
            index = torch.randint(0, 256, (count,), dtype=torch.uint8)
            factors = torch.rand(-(-count // nested)) + 0.1
            offset = 1.25
            state |= {
                "nested_blocksize": nested,
                "nested_dtype": "float32",
                "nested_offset": offset,
            }
            nested_map = dynamic_map()
            absmax = nested_map[index.long()] * factors[torch.arange(count) // nested] + offset
            tensors |= {"weight.nested_absmax": factors, "weight.nested_quant_map": nested_map}
            tensors["weight.absmax"] = index
        else:
            tensors["weight.absmax"] = absmax
        state |= changed
        if storage != torch.uint8:
            tensors["weight"] = raw.view(storage)[:, None].contiguous()
        raw_state = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
        tensors[f"weight.quant_state.bitsandbytes__{kind}"] = raw_state
        decoded = table[codes] * absmax[torch.arange(n * k) // block]
        return tensors, decoded.view(n, k)

    return one


CASES = {
    "nf4": (packer(), "nf4_row_fp32 nf4_g32_fp32"),
    "fp4": (packer("fp4", 32), "bnb4_g32_fp32"),
    "double": (packer(block=32, double=True), "nf4_g32_dq8"),
    "double in other blocks": (packer(block=32, double=True, nested=64), "nf4_g32_fp32"),
    "stored as bf16": (packer(block=32, storage=torch.bfloat16), "nf4_g32_fp32"),
    "blocks that cross rows": (packer(block=128), "nf4_row_fp32 nf4_g32_fp32"),
    "double across rows": (packer(block=64, double=True), "nf4_row_dq8 nf4_g32_fp32"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_layers_are_exact(tmp_path: Path, case: str) -> None:
    """64 features take whole blocks; 96 of down_proj do not, and are cut into 32."""
    pack, formats = CASES[case]
    model = write_folder(tmp_path, FOUR, pack)
    found = check_layers(tmp_path, model, torch.float32)
    assert {w.format.name for w in found.values()} == set(formats.split())
    check_model(tmp_path, model)


def test_blocks_that_no_group_follows_are_dense(tmp_path: Path) -> None:
    model = tiny(head_dim=10)
    model = write_folder(tmp_path, FOUR, packer(block=64), model=model)  # o_proj has 40 columns
    name = "model.layers.0.self_attn.o_proj"
    reader = open_checkpoint(tmp_path)
    assert reader.loss(name) == "blocks of 64 weights cross rows of 40"
    assert torch.equal(reader.layer(name), model.get_submodule(name).weight)
    with pytest.warns(UserWarning, match="no format holds 1 layers exactly"):
        loaded = check_model(tmp_path, model)
    assert isinstance(loaded.model.layers[0].self_attn.q_proj, QuantLinear)
    anew = lowbit.load_model(tmp_path, format="int8_g32")
    assert anew.get_submodule(name).format.name == "int8_g32"


def eight(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    codes = torch.randint(-128, 128, weight.shape, dtype=torch.int8)
    scb = torch.rand(len(weight)) + 0.1
    decoded = codes.float() * (scb / 127)[:, None]
    return {"weight": codes, "SCB": scb, "weight_format": torch.tensor(0, dtype=torch.uint8)}, decoded  # fmt: skip


def test_llm_int8(tmp_path: Path) -> None:
    model = write_folder(tmp_path, EIGHT, eight)
    found = check_layers(tmp_path, model, torch.float32)
    assert {w.format.name for w in found.values()} == {"int8_row_fp32"}
    check_model(tmp_path, model)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"shape": [64]}, r"shape must be two positive integers, got \[64\]"),
        ({"shape": [64, 2**20]}, r"weight must hold 33554432 bytes for shape \(64, 1048576\), got"),
        ({"blocksize": 0}, "blocksize of the configuration must be a positive integer, got 0"),
        ({"blocksize": 32}, r"weight.absmax must have shape \(\d+\), got"),
    ],
)
def test_a_contradicting_state_is_named(
    tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    write_folder(tmp_path, FOUR, packer(**changed))
    with pytest.raises(ValueError, match=message) as error:
        open_checkpoint(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_a_layout_for_gpus_is_refused(tmp_path: Path) -> None:
    def pack(name: str, weight: Tensor) -> Any:
        tensors, decoded = eight(name, weight)
        return tensors | {"weight_format": torch.tensor(1, dtype=torch.uint8)}, decoded

    write_folder(tmp_path, EIGHT, pack)
    with pytest.raises(ValueError, match=r"weight_format must be 0 \(row\), got 1"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [False, True])
def test_as_bitsandbytes(tmp_path: Path, kind: str, double: bool, dtype: torch.dtype) -> None:
    """For whole blocks: its own function for the CPU is wrong where they cross rows."""
    functional = pytest.importorskip("bitsandbytes.functional")

    def pack(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        q, state = functional.quantize_4bit(
            weight.to(dtype), blocksize=32, compress_statistics=double, quant_type=kind
        )
        tensors = {f"weight.{part}": t for part, t in state.as_dict(packed=True).items()}
        return {"weight": q, **tensors}, functional.dequantize_4bit(q, state).float()

    model = write_folder(tmp_path, FOUR, pack)
    check_layers(tmp_path, model, dtype)


def test_as_bitsandbytes_in_8_bits(tmp_path: Path) -> None:
    """The library multiplies by SCB first and by 1 / 127 then: one more rounding."""
    functional = pytest.importorskip("bitsandbytes.functional")

    def pack(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        q, scb, _ = functional.int8_vectorwise_quant(weight.half())
        return {"weight": q, "SCB": scb}, functional.int8_vectorwise_dequant(q, scb)

    model = write_folder(tmp_path, EIGHT, pack)
    reader = open_checkpoint(tmp_path)
    for name in reader.plans:
        expected = model.get_submodule(name).weight
        torch.testing.assert_close(reader.layer(name).dequantize(), expected, rtol=2**-22, atol=0)
