"""Folders of compressed-tensors: every format and strategy, against the formula written here; and the library's own
compressors, where it is installed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from folders import check_layers, check_model, stream, write_folder
from torch import Tensor

from lowbit.codebooks.tables import E2M1_TABLE
from lowbit.io.readers.compressed_tensors import second_level
from lowbit.io.readers.registry import open_checkpoint

E2M1 = torch.tensor(E2M1_TABLE)
SKIP = ("lm_head", "model.layers.0.self_attn.k_proj")


def settings(format: str, targets: Any = ("Linear",), **weights: Any) -> dict[str, Any]:
    scheme = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "channel", **weights}
    group = {"targets": list(targets), "weights": scheme, "input_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": format,
        "config_groups": {"group_0": group},
        "ignore": list(SKIP),
        "quantization_status": "compressed",
    }


def whole_codes(codes: Tensor, bits: int) -> Tensor:
    """As versions before 0.18: no code crosses a word."""
    each = 32 // bits
    padded = torch.nn.functional.pad(codes.long(), (0, -codes.shape[1] % each))
    words = (padded.view(len(codes), -1, each) << (torch.arange(each) * bits)).sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int()


def integers(
    bits: int,
    group: int | None = None,
    *,
    rows: int = 1,
    zeros: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    old: bool = False,
    packed: bool = True,
    index: bool = False,
) -> Any:
    """Scales of `rows` x `group` blocks (0 rows: of the tensor)."""
    store = whole_codes if old else stream

    def one(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        n, k = weight.shape
        size = group or k
        half = 2 ** (bits - 1)
        codes = torch.randint(0, 2**bits, (n, k))
        groups = -(-k // size)
        scales = (torch.rand(-(-n // rows) if rows else 1, groups) * 0.02 + 0.001).to(dtype)
        zero = torch.randint(0, 2**bits, (n, groups)) if zeros else torch.full((n, groups), half)
        of = torch.arange(k) // size
        tensors = {"weight_scale": scales if rows else scales[0]}
        if index:
            of = of[torch.randperm(k)]
            tensors["weight_g_idx"] = of.int()
        if packed:
            tensors |= {"weight_packed": store(codes, bits), "weight_shape": torch.tensor([n, k])}
        else:
            tensors["weight"] = (codes - half).to(torch.int8)
        if zeros:
            stored = (zero - half).to(torch.int8)
            tensors["weight_zero_point"] = store(zero.t(), bits).t() if packed else stored
        expanded = scales.float().repeat_interleave(rows or n, 0)[:n]
        return tensors, (codes - zero[:, of]).float() * expanded[:, of]

    return one


def grouped(bits: int, symmetric: bool = True, **more: Any) -> dict[str, Any]:
    more = {"num_bits": bits, "strategy": "group", "group_size": 32, "symmetric": symmetric, **more}
    return settings("pack-quantized", **more)


BLOCK = {"strategy": "block", "block_structure": [48, 32]}
PACKED = {
    **{f"{bits} bits": (grouped(bits), integers(bits, 32)) for bits in range(2, 9)},
    **{f"old {bits} bits": (grouped(bits), integers(bits, 32, old=True)) for bits in (3, 5, 6, 7)},
    **{
        f"zeros of {bits} bits": (grouped(bits, False), integers(bits, 32, zeros=True))
        for bits in (3, 4, 7, 8)
    },
    "old zeros": (grouped(3, False), integers(3, 32, zeros=True, old=True)),
    "channel": (settings("pack-quantized"), integers(4)),
    "channel with zeros": (settings("pack-quantized", symmetric=False), integers(4, zeros=True)),
    "fp16": (grouped(4), integers(4, 32, dtype=torch.float16)),
    "act-order": (grouped(4, actorder="group"), integers(4, 32, index=True)),
    "act-order with zeros": (grouped(4, False), integers(4, 32, index=True, zeros=True)),
    "int8": (settings("int-quantized", num_bits=8), integers(8, packed=False)),
    "int8 tensor": (
        settings("int-quantized", num_bits=8, strategy="tensor"), integers(8, rows=0, packed=False)),
    "int8 zeros": (
        settings("int-quantized", num_bits=8, symmetric=False), integers(8, zeros=True, packed=False)),
    "int8 blocks": (
        settings("naive-quantized", num_bits=8, **BLOCK), integers(8, 32, rows=48, packed=False)),
    "4 bits in int8": (settings("naive-quantized"), integers(4, packed=False)),
}  # fmt: skip


@pytest.mark.parametrize("case", PACKED)
def test_integers_are_exact(tmp_path: Path, case: str) -> None:
    quantization, pack = PACKED[case]
    model = write_folder(tmp_path, quantization, pack, skip=SKIP)
    found = check_layers(tmp_path, model, torch.float32, SKIP)
    bits = quantization["config_groups"]["group_0"]["weights"]["num_bits"]
    assert {w.format.bits for w in found.values()} == {bits + (bits == 7)}
    if case in ("act-order", "old zeros", "int8 tensor"):
        check_model(tmp_path, model)


def fp8(shape: Any, dtype: torch.dtype = torch.bfloat16, powers: bool = False) -> Any:
    """Scales of blocks of `shape(n, k)`."""

    def one(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        n, k = weight.shape
        rows, group = shape(n, k)
        codes = weight.mul(1000).to(torch.float8_e4m3fn)
        scales = (torch.rand(-(-n // rows), -(-k // group)) * 0.02 + 0.001).to(dtype)
        stored = scales
        if powers:
            stored = torch.randint(110, 130, scales.shape).to(torch.uint8)
            scales = torch.exp2(stored.float() - 127)
        each = scales.float().repeat_interleave(rows, 0)[:n].repeat_interleave(group, 1)[:, :k]
        stored = stored.reshape(-1) if (rows, group) == (n, k) else stored
        extra = {"weight": codes, "weight_scale": stored, "input_scale": torch.ones(1)}
        return extra, codes.float() * each

    return one


def floats(format: str = "float-quantized", **more: Any) -> dict[str, Any]:
    return settings(format, num_bits=8, type="float", **more)


GROUPS32 = {"strategy": "group", "group_size": 32}
FLOATS8 = {
    "tensor": (floats(strategy="tensor"), fp8(lambda n, k: (n, k)), "e4m3_row_bf16"),
    "channel": (floats(), fp8(lambda n, k: (1, k)), "e4m3_row_bf16"),
    "channel fp32": (floats(), fp8(lambda n, k: (1, k), torch.float32), "e4m3_row_fp32"),
    "ragged blocks": (floats(**BLOCK), fp8(lambda n, k: (48, 32)), "e4m3_g32_bf16"),
    "mxfp8": (floats("mxfp8-quantized", **GROUPS32), fp8(lambda n, k: (1, 32), powers=True), "e4m3_g32_e8m0"),
}  # fmt: skip


@pytest.mark.parametrize("case", FLOATS8)
def test_fp8_is_exact(tmp_path: Path, case: str) -> None:
    quantization, pack, format = FLOATS8[case]
    model = write_folder(tmp_path, quantization, pack, skip=SKIP)
    found = check_layers(tmp_path, model, torch.float32, SKIP)
    assert {w.format.name for w in found.values()} == {format}
    check_model(tmp_path, model)


def fp4(group: int, divisor: float = 2048.0) -> Any:
    def one(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        n, k = weight.shape
        codes = torch.randint(0, 16, (n, k))
        tensors = {"weight_packed": (codes[:, ::2] | codes[:, 1::2] << 4).to(torch.uint8)}
        if group == 16:
            stored = (torch.rand(n, k // group) * 400 + 1).to(torch.float8_e4m3fn)
            scales = stored.float() / divisor
            tensors["weight_global_scale"] = torch.tensor([divisor])
        else:
            stored = torch.randint(110, 130, (n, k // group)).to(torch.uint8)
            scales = torch.exp2(stored.float() - 127)
        tensors["weight_scale"] = stored
        return tensors, E2M1[codes] * scales.repeat_interleave(group, 1)

    return one


def fours(format: str, group: int) -> dict[str, Any]:
    return settings(f"{format}-pack-quantized", type="float", group_size=group, strategy="group")


@pytest.mark.parametrize("group", [16, 32])
def test_fp4_is_exact(tmp_path: Path, group: int) -> None:
    name = {16: "nvfp4", 32: "mxfp4"}[group]
    model = write_folder(tmp_path, fours(name, group), fp4(group), skip=SKIP)
    found = check_layers(tmp_path, model, torch.float32, SKIP)
    assert {w.format.name for w in found.values()} == {name}
    check_model(tmp_path, model)


def test_nvfp4_is_divided_as_the_library_divides(tmp_path: Path) -> None:
    """In bf16, which is what it computes; with one scale level where multiplying would give other numbers."""
    torch.manual_seed(1)
    divisors = torch.rand(20000) * 3000 + 1
    wrong = next(d for d in divisors if not second_level(d.reshape(1))[1])
    for divisor, format in ((float(divisors[0]), "nvfp4"), (float(wrong), "e2m1_g16_fp32")):
        model = write_folder(tmp_path, fours("nvfp4", 16), fp4(16, divisor), skip=SKIP)
        found = check_layers(tmp_path, model, torch.bfloat16, SKIP)
        assert {w.format.name for w in found.values()} == {format}


def test_targets_choose_a_group(tmp_path: Path) -> None:
    """A name before a pattern, a pattern before a class; and a format of each group."""
    q_proj = "model.layers.0.self_attn.q_proj"
    four, eight, three = integers(4, 32), fp8(lambda n, k: (1, k)), integers(3, 32)

    def pack(name: str, weight: Tensor) -> Any:
        return (three if name == q_proj else eight if "self_attn" in name else four)(name, weight)

    quantization = {**grouped(4), "format": "mixed-precision"}
    more = [floats(targets=["re:.*self_attn.*"]), grouped(3, targets=[q_proj])]
    for i, other in enumerate(more):
        group = other["config_groups"]["group_0"]
        quantization["config_groups"][f"group_{i + 1}"] = {**group, "format": other["format"]}
    model = write_folder(tmp_path, quantization, pack, skip=SKIP)
    found = check_layers(tmp_path, model, torch.float32, SKIP)
    kinds = {name.rpartition(".")[2]: w.format.name for name, w in found.items()}
    assert kinds["q_proj"] == "int3_g32_bf16"
    assert kinds["v_proj"] == "e4m3_row_bf16"
    assert kinds["up_proj"] == "int4_g32_bf16"


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "bits": (grouped(9), "num_bits of the configuration must be one of .* got 9"),
    "width": (grouped(8), "weight_packed must have .* words for weight_shape .* in 8 bits"),
    "group": (grouped(4, group_size=16), r"weight_scale must have shape \(.*\) for strategy 'group'"),
    "strategy": (grouped(4, strategy="rows"), "strategy must be one of .* got 'rows'"),
    "zeros": (grouped(4, False), "weight_zero_point is missing, the layer has weight_packed"),
    "type": (floats(), "weight is missing, the layer has"),
    "format": ({**grouped(4), "format": "marlin-24"}, "format must be one of .* got 'marlin-24'"),
    "targets": (grouped(4, targets=["re:.*x"]), "no group of the configuration has it as a target"),
    "groups": ({**grouped(4), "config_groups": {"a": {}}}, "config_groups must map names to groups"),
    "sparse": ({**grouped(4), "sparsity_config": {"format": "sparse-24"}}, "'dense', got 'sparse-24'"),
}  # fmt: skip


@pytest.mark.parametrize("case", CHANGES)
def test_a_contradicting_configuration_is_named(tmp_path: Path, case: str) -> None:
    quantization, message = CHANGES[case]
    write_folder(tmp_path, quantization, integers(4, 32), skip=SKIP)
    with pytest.raises(ValueError, match=message) as error:
        open_checkpoint(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_nan_is_named(tmp_path: Path) -> None:
    def pack(name: str, weight: Tensor) -> Any:
        tensors, decoded = fp8(lambda n, k: (1, k))(name, weight)
        tensors["weight"].view(torch.uint8)[0, 0] = 0x7F
        return tensors, decoded

    write_folder(tmp_path, floats(), pack, skip=SKIP)
    with pytest.raises(ValueError, match="the weight holds NaN or inf in e4m3"):
        open_checkpoint(tmp_path).layer("model.layers.0.mlp.up_proj")


@pytest.mark.parametrize(
    ("format", "weights"),
    [
        ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 32}),
        (
            "pack-quantized",
            {"num_bits": 3, "strategy": "group", "group_size": 32, "symmetric": False},
        ),
        ("pack-quantized", {"num_bits": 4, "strategy": "channel", "symmetric": False}),
        ("int-quantized", {"num_bits": 8, "strategy": "channel"}),
        ("float-quantized", {"num_bits": 8, "strategy": "channel", "type": "float"}),
        ("float-quantized", {"num_bits": 8, "strategy": "tensor", "type": "float"}),
        ("float-quantized", {"num_bits": 8, "type": "float", **BLOCK}),
        ("nvfp4-pack-quantized", {"type": "float", "strategy": "tensor_group", "group_size": 16}),
        ("mxfp4-pack-quantized", {"type": "float", "strategy": "group", "group_size": 32}),
        ("mxfp8-quantized", {"num_bits": 8, "type": "float", **GROUPS32}),
    ],
)
def test_as_the_library(tmp_path: Path, format: str, weights: dict[str, Any]) -> None:
    base = pytest.importorskip("compressed_tensors.compressors.base")
    pytest.importorskip("compressed_tensors.compressors")
    scheme_of = pytest.importorskip("compressed_tensors.quantization")
    arguments = {"num_bits": 4, "type": "int", "symmetric": True, **weights}
    scheme = scheme_of.QuantizationScheme(
        targets=["Linear"], weights=scheme_of.QuantizationArgs(**arguments)
    )
    compressor = base.BaseCompressor.get_value_from_registry(format)

    def pack(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        n, k = weight.shape
        rows, group = {"tensor": (n, k), "block": (48, 32)}.get(weights.get("strategy"), (1, k))
        group = weights.get("group_size", group)
        shape = (-(-n // rows), -(-k // group))
        scales = (torch.rand(shape) * 0.02 + 0.01).bfloat16()
        state = {"weight": weight.bfloat16(), "weight_scale": scales}
        if format.startswith("mx"):
            scales.copy_(torch.exp2(torch.randint(-6, -3, shape).float()))
        if format.startswith("nvfp4"):
            state["weight_global_scale"] = torch.tensor([1234.5])
            state["weight_scale"] = (torch.rand(shape) * 50 + 10).to(torch.float8_e4m3fn).float()
        if arguments["symmetric"] is False:
            low, high = -(2 ** (arguments["num_bits"] - 1)), 2 ** (arguments["num_bits"] - 1)
            state["weight_zero_point"] = torch.randint(low, high, shape, dtype=torch.int8)
        if rows == n:
            state["weight_scale"] = scales.reshape(-1)
        made = compressor.compress(state, scheme)
        return made, compressor.decompress(dict(made), scheme)["weight"].float()

    model = write_folder(tmp_path, settings(format, **weights), pack, skip=SKIP)
    check_layers(tmp_path, model, torch.bfloat16, SKIP)
