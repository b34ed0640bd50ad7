"""SqueezeLLM and AnyPrecision folders, packed by what is written here, code by code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import check_layers, check_model, stream, write_folder
from torch import Tensor

from lowbit.io.readers.registry import open_checkpoint
from lowbit.io.readers.tables import _places

SQUEEZE = {"quant_method": "squeezellm", "wbits": 4}


def squeezed(
    bits: int, sparse: int = 0, dtype: torch.dtype = torch.float16, **changed: Tensor
) -> Any:
    """With 0 to `sparse` weights of every row in the sparse part."""

    def one(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        n, k = weight.shape
        codes = torch.randint(0, 2**bits, (n, k))
        table = torch.randn(n, 2**bits).to(dtype)
        tensors = {"qweight": stream(codes, bits).t(), "lookup_table": table}
        decoded = table.float().gather(1, codes)
        if sparse:
            rest = torch.zeros(n, k)
            for row in range(n):
                rest[row, torch.randperm(k)[: row % (sparse + 1)]] = torch.randn(())
            rest = rest.to(dtype)
            rows, columns = rest.nonzero(as_tuple=True)
            ends = torch.nn.functional.pad(rows.bincount(minlength=n).cumsum(0), (1, 0))
            tensors |= {"rows": ends.int(), "cols": columns.int(), "vals": rest[rows, columns]}
            decoded = decoded + rest.float()
        return {**tensors, **changed}, decoded

    return one


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("sparse", [0, 3])
@pytest.mark.parametrize("bits", [3, 4])
def test_squeezellm_is_exact(tmp_path: Path, bits: int, sparse: int, dtype: torch.dtype) -> None:
    model = write_folder(tmp_path, SQUEEZE, squeezed(bits, sparse, dtype))
    found = check_layers(tmp_path, model, torch.float32)
    assert {(w.format.bits, w.format.outliers) for w in found.values()} == {(bits, sparse)}
    check_model(tmp_path, model)


def test_a_full_sparse_part_is_dense(tmp_path: Path) -> None:
    model = write_folder(tmp_path, SQUEEZE, squeezed(4, 20))
    with pytest.warns(UserWarning, match="a row has 20 of .* weights in its sparse part"):
        check_model(tmp_path, model)


CHANGES: dict[str, tuple[dict[str, Tensor], str]] = {
    "table": ({"lookup_table": torch.zeros(64, 12)}, "lookup_table must have"),
    "ends": ({"rows": torch.zeros(65, dtype=torch.int32)}, "rows must ascend from 0 to"),
    "columns": ({"cols": torch.full((1,), 99)}, "cols must have shape"),
    "rows": ({"full_rows": torch.ones(2, 2)}, r"full_rows must be empty, got shape \(2, 2\)"),
}  # fmt: skip


@pytest.mark.parametrize("case", CHANGES)
def test_contradictions_are_named(tmp_path: Path, case: str) -> None:
    changed, message = CHANGES[case]
    write_folder(tmp_path, SQUEEZE, squeezed(4, 3, **changed))
    with pytest.raises(ValueError, match=message) as error:
        open_checkpoint(tmp_path)
    assert str(tmp_path) in str(error.value)


def planes(bits: int, high: int) -> Any:
    def one(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        n, k = weight.shape
        codes = torch.randint(0, 2**bits, (n, k))
        packed = torch.zeros(bits, n, k // 32, dtype=torch.int64)
        for column in range(k):
            word, bit = place(column, k)
            for plane in range(bits):
                packed[plane, :, word] |= ((codes[:, column] >> (bits - 1 - plane)) & 1) << bit
        packed = torch.where(packed >= 1 << 31, packed - (1 << 32), packed).int()
        table = torch.randn(n, 2**high).half()
        tensors = {"qweight": packed, f"lut{high}": table}
        if high > 3:
            tensors["lut3"] = torch.randn(n, 8).half()
        return tensors, table.float().gather(1, codes >> bits - high)

    return one


def place(column: int, k: int) -> tuple[int, int]:
    """The word of a plane and the bit: bytes of 8 columns go to the words of a block of 1024 in turn, highest first."""
    start = column // 1024 * 1024
    words = min(1024, k - start) // 32
    turn, word = divmod((column - start) // 8, words)
    return start // 32 + word, 31 - 8 * turn - column % 8


@pytest.mark.parametrize(("bits", "high"), [(4, 4), (8, 6), (8, 7), (3, 3)])
def test_anyprecision_is_exact(tmp_path: Path, bits: int, high: int) -> None:
    model = write_folder(tmp_path, {}, planes(bits, high))
    config = json.loads((tmp_path / "config.json").read_text())
    del config["quantization_config"]
    config["anyprec"] = {"seed_precision": 3, "parent_precision": bits}
    (tmp_path / "config.json").write_text(json.dumps(config))
    check_layers(tmp_path, model, torch.float32)
    check_model(tmp_path, model)


@pytest.mark.parametrize("k", [32, 96, 1024, 1056, 2080])
def test_places_of_columns(k: int) -> None:
    word, shift = _places(k)
    assert [*zip(word.tolist(), shift.tolist(), strict=True)] == [place(c, k) for c in range(k)]
