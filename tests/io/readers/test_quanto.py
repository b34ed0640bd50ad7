"""quanto folders: int8, FP8, and groups whose rows the model tells, against the formula and the library's tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import check_model, linears, tiny, write_folder
from torch import Tensor

import lowbit
from lowbit.io.readers.folder import FolderReader
from lowbit.io.readers.registry import open_checkpoint


def write(path: Path, kind: str, pack: Any) -> Any:
    model = write_folder(path, {}, pack)
    config = json.loads((path / "config.json").read_text())
    del config["quantization_config"]
    (path / "config.json").write_text(json.dumps(config))
    names = {name: {"weights": kind, "activations": "none"} for name in linears(model)}
    (path / "quanto_qmap.json").write_text(json.dumps(names))
    return model


def bytes_of(dtype: torch.dtype, whole: bool = False) -> Any:
    def one(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        data = (weight * 1000).clamp(-127, 127).to(dtype)
        scale = torch.rand(() if whole else (len(weight), 1)) * 0.01 + 0.001
        extra = {"input_scale": torch.ones(()), "output_scale": torch.ones(())}
        return {"weight._data": data, "weight._scale": scale, **extra}, data.float() * scale

    return one


def grouped(bits: int, group: int, integer: bool = False) -> Any:
    def one(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        n, k = weight.shape
        rows = n * k // group
        codes = torch.randint(0, 2**bits, (rows, group))
        scale = torch.rand(rows, 1) * 0.01 + 0.001
        shift = torch.randn(rows, 1) * 0.1
        if integer:
            shift = torch.randint(0, 2**bits, (rows, 1)).to(torch.int8)
        step = -(-rows * bits // 8)
        packed = torch.zeros(step, group, dtype=torch.int64)
        for row in range(rows):
            packed[row % step] |= codes[row] << bits * (row // step)
        decoded = scale * (codes - shift) if integer else scale * codes - shift
        parts = {"weight._data._data": packed.to(torch.uint8), "weight._scale": scale}
        return {**parts, "weight._shift": shift}, decoded.view(n, k)

    return one


CASES = {
    "int8": ("qint8", bytes_of(torch.int8)),
    "int8, one scale": ("qint8", bytes_of(torch.int8, True)),
    "e4m3": ("qfloat8_e4m3fn", bytes_of(torch.float8_e4m3fn)),
    "e5m2": ("qfloat8_e5m2", bytes_of(torch.float8_e5m2)),
    "int4": ("qint4", grouped(4, 32)),
    "int2": ("qint2", grouped(2, 32)),
    "integer shifts": ("qint4", grouped(4, 32, True)),
}


@pytest.mark.parametrize("case", CASES)
def test_layers_are_exact(tmp_path: Path, case: str) -> None:
    kind, pack = CASES[case]
    model = write(tmp_path, kind, pack)
    reader = open_checkpoint(tmp_path)
    assert isinstance(reader, FolderReader)
    for name, module in linears(model).items():
        reader.fit(name, tuple(module.weight.shape))
        weight = reader.layer(name)
        assert torch.equal(lowbit.dequantize(weight), module.weight)
        assert weight.format.group == (32 if kind in ("qint4", "qint2") else None)
    check_model(tmp_path, model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight._scale": torch.ones(3, 1)}, r"weight._data._data must have 2 rows for the 3"),
        ({"weight._scale": torch.ones(192, 2)}, r"weight._scale must have shape \(any, 1\)"),
        ({"weight._data._data": torch.ones(2, 2)}, "weight._data._data must be uint8"),
    ],
)
def test_contradictions_are_named(tmp_path: Path, change: dict[str, Tensor], message: str) -> None:
    def pack(name: str, weight: Tensor) -> Any:
        tensors, decoded = grouped(4, 32)(name, weight)
        return {**tensors, **change}, decoded

    write(tmp_path, "qint4", pack)
    with pytest.raises(ValueError, match=message) as error:
        open_checkpoint(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_rows_that_no_model_has_are_named(tmp_path: Path) -> None:
    write(tmp_path, "qint4", grouped(4, 32))
    reader = open_checkpoint(tmp_path)
    with pytest.raises(ValueError, match=r"has shape \(128, 32\), the model's has \(64, 60\)"):
        reader.fit("model.layers.0.self_attn.q_proj", (64, 60))


@pytest.mark.parametrize("kind", ["qint8", "qint4", "qint2", "qfloat8_e4m3fn"])
def test_as_the_library(tmp_path: Path, kind: str) -> None:
    quanto = pytest.importorskip("optimum.quanto")
    model = tiny()
    quanto.quantize(model, weights=quanto.qtypes[kind], exclude="lm_head")
    quanto.freeze(model)
    model.save_pretrained(tmp_path)
    (tmp_path / "quanto_qmap.json").write_text(json.dumps(quanto.quantization_map(model)))
    reader = open_checkpoint(tmp_path)
    for name in reader.plans:
        weight = model.get_submodule(name).weight
        reader.fit(name, tuple(weight.shape))
        assert torch.equal(reader.layer(name).dequantize(), weight.dequantize())
