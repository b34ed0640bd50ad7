"""AWQ folders in four layouts, packed by the loops written here; and by GPTQModel's, where it is installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from folders import HIDDEN, check_layers, check_model, stream, write_folder
from torch import Tensor, nn

from lowbit.io.readers.registry import open_checkpoint

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def settings(version: str, bits: int = 4, group: int = 32, **more: Any) -> dict[str, Any]:
    own = {"quant_method": "awq", "bits": bits, "group_size": group, "zero_point": True}
    return {**own, "version": version, **more}


def numbers(n: int, k: int, bits: int, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (N, K), zeros and scales (N, groups)."""
    groups = -(-k // group)
    codes = torch.randint(0, 2**bits, (n, k))
    zeros = torch.randint(0, 2**bits, (n, groups))
    return codes, zeros, (torch.rand(n, groups) * 0.02 + 0.001).half()


def interleaved(codes: Tensor) -> Tensor:
    """Nibble i of a word holds column ORDER[i] of eight."""
    words = torch.zeros(codes.shape[0], codes.shape[1] // 8, dtype=torch.int64)
    for column in range(codes.shape[1]):
        place = ORDER.index(column % 8)
        words[:, column // 8] |= codes[:, column] << 4 * place
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int()


def packer(version: str, bits: int = 4, group: int = 32) -> Any:
    def one(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        n, k = weight.shape
        size = k if group == -1 else group
        codes, zeros, scales = numbers(n, k, bits, size)
        of = torch.arange(k) // size
        decoded = scales.float()[:, of] * (codes - zeros[:, of]).float()
        if version == "gemm":
            pack = interleaved if bits == 4 else (lambda c: stream(c, bits))
            made = {"qweight": pack(codes.t()), "qzeros": pack(zeros.t()), "scales": scales.t()}
            return made, decoded
        if version == "gemv":
            padded = [nn.functional.pad(t, (0, 32 - t.shape[1])) for t in (zeros, scales)]
            made = {
                "qweight": stream(codes, 4),
                "qzeros": stream(padded[0], 4),
                "scales": padded[1],
            }
            return made, decoded
        negative = -(scales.float() * zeros).half()
        decoded = scales.float()[:, of] * codes.float() + negative.float()[:, of]
        padded = [nn.functional.pad(t.t(), (0, 0, 0, 8 - t.shape[1])) for t in (negative, scales)]
        zeros_name = "scaled_zeros" if version == "llm-awq" else "qzeros"
        return {"qweight": fast(codes), zeros_name: padded[0], "scales": padded[1]}, decoded

    return one


def fast(codes: Tensor) -> Tensor:
    """Nibble by nibble, as the layout says: 64 columns of four rows follow each other."""
    n, k = codes.shape
    nibbles = torch.zeros(n // 4, 4 * k, dtype=torch.int64)
    for column in range(k):
        block, c = divmod(column, 64)
        half, inside = divmod(c, 32)
        a, b, low = inside // 8, inside % 8 // 2, inside % 2
        place = 32 * half + 8 * b + 4 * low + a
        for row in range(4):
            nibbles[:, 256 * block + 64 * row + place] = codes[row::4, column]
    words = (nibbles.view(n // 4, k, 4) << torch.tensor([0, 4, 8, 12])).sum(-1)
    return torch.where(words >= 1 << 15, words - (1 << 16), words).to(torch.int16)


CASES = {
    **{f"gemm {bits} bits": (settings("gemm", bits), packer("gemm", bits)) for bits in (2, 3, 4, 5, 6, 8)},
    "whole rows": (settings("GEMM", group=-1), packer("gemm", group=-1)),
    "short last group": (settings("gemm", group=40), packer("gemm", group=40)),
    "old names": (
        {"quant_method": "awq", "w_bit": 4, "q_group_size": 32, "version": "gemm"}, packer("gemm"),
    ),
    "AutoRound": (
        settings("gemm", packing_format="auto_round:auto_awq") | {"quant_method": "auto-round"}, packer("gemm"),
    ),
    "gemv": (settings("gemv"), packer("gemv")),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_layers_are_exact(tmp_path: Path, case: str) -> None:
    quantization, pack = CASES[case]
    model = write_folder(tmp_path, quantization, pack)
    check_layers(tmp_path, model, torch.float16)
    if case == "gemm 4 bits":
        check_model(tmp_path, model)


@pytest.mark.parametrize("version", ["gemv_fast", "llm-awq"])
def test_the_fast_layouts_are_exact(tmp_path: Path, version: str) -> None:
    """Products of scale and code plus the stored -scale * zero, in fp32."""
    skip = ("lm_head", "model.layers.0.mlp.down_proj")  # its 96 columns are not whole blocks of 64
    model = write_folder(tmp_path, settings(version), packer(version), skip=skip)
    check_layers(tmp_path, model, torch.float32, skip)


MESSAGES = {
    "version": ({"version": "gemx"}, r"version must be one of \('gemm', .* got 'gemx'"),
    "bits": ({"bits": 7}, r"bits of the configuration must be one of .* got 7"),
    "width": ({"bits": 8}, "qweight must have .* words of 8-bit codes for the .* out features"),
    "groups": ({"group_size": 64}, r"scales must have \d groups of 64 for .* in features, got \d"),
    "layout": ({"version": "gemv"}, "scales must have shape"),
}  # fmt: skip


@pytest.mark.parametrize("case", MESSAGES)
def test_a_contradicting_configuration_is_named(tmp_path: Path, case: str) -> None:
    change, message = MESSAGES[case]
    write_folder(tmp_path, {**settings("gemm"), **change}, packer("gemm"))
    with pytest.raises(ValueError, match=message) as error:
        open_checkpoint(tmp_path)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize("bits", [3, 4])
def test_as_gptqmodel(tmp_path: Path, bits: int) -> None:
    utils = pytest.importorskip("gptqmodel.quantization.awq.utils.packing_utils")

    def pack(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        n, k = weight.shape
        codes, zeros, scales = numbers(n, k, bits, 32)
        qweight, qzeros = utils.pack_awq(codes.t().int(), zeros.t().int(), bits)
        scales = scales.t().contiguous()
        decoded = utils.dequantize_gemm(qweight, qzeros, scales, bits, 32).t().float()
        return {"qweight": qweight, "qzeros": qzeros, "scales": scales}, decoded

    model = write_folder(tmp_path, settings("gemm", bits), pack)
    check_layers(tmp_path, model, torch.float16)


@pytest.mark.parametrize("version", ["gemv", "gemv_fast"])
def test_as_gptqmodel_packs(version: str) -> None:
    linear = pytest.importorskip(f"gptqmodel.nn_modules.qlinear.{version}_awq")
    codes = torch.randint(0, 16, (8, 2 * HIDDEN), dtype=torch.int32)
    if version == "gemv":
        assert torch.equal(linear.pack_awq_columns(codes, 4), stream(codes, 4))
    else:
        assert torch.equal(linear.pack_intweight(codes, 4, 64), fast(codes.long()))
