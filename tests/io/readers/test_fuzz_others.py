"""Damaged folders of every program, by hypothesis: a reader gives valid weights, or an error that names the folder."""

from __future__ import annotations

import functools
import json
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import test_awq
import test_bitnet
import test_bitsandbytes
import test_compressed_tensors
import test_fp8
import test_gptq_folders as test_gptq
import test_hqq
import test_modelopt
import test_mxfp4
import test_quanto
import test_tables
import test_torchao
import torch
from expert_folders import write_stacks
from folders import save_state, write_folder
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from test_fuzz_readers import outcome
from torch import Tensor

from lowbit.io.readers.folder import FolderReader
from lowbit.io.readers.registry import READERS, open_checkpoint
from lowbit.weights.quantized import QuantTensor

fuzz = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
# Of the layers of a folder, these are enough.
KEPT = ("self_attn.q_proj", "mlp.down_proj", "experts")
CT = test_compressed_tensors


def folder(quantization: dict[str, Any], pack: Any) -> Callable[[Path], object]:
    return lambda path: write_folder(path, quantization, pack)


def torchao(path: Path) -> None:
    write_folder(path, test_torchao.TORCHAO, test_torchao.packer(torch.int8, 32))
    test_torchao.describe(path, "IntxUnpackedToInt8Tensor")


def anyprecision(path: Path) -> None:
    write_folder(path, {}, test_tables.planes(4, 4))
    config = json.loads((path / "config.json").read_text())
    del config["quantization_config"]
    (path / "config.json").write_text(json.dumps({**config, "anyprec": {"parent_precision": 4}}))


BUILDERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "gptq": ("gptq", folder(test_gptq.settings(4, 32), test_gptq.packer(4, 32, index=test_gptq.shuffled))),
    "gptq in planes": ("gptq", folder(*test_gptq.CASES["planes of 3"])),
    "awq": ("awq", folder(*test_awq.CASES["gemm 4 bits"])),
    "awq gemv": ("awq", folder(*test_awq.CASES["gemv"])),
    "nf4": ("bitsandbytes", folder(test_bitsandbytes.FOUR, test_bitsandbytes.packer(double=True))),
    "LLM.int8": ("bitsandbytes", folder(test_bitsandbytes.EIGHT, test_bitsandbytes.eight)),
    "packed": ("compressed-tensors", folder(*CT.PACKED["zeros of 4 bits"])),
    "packed act-order": ("compressed-tensors", folder(*CT.PACKED["act-order"])),
    "blocks of FP8": ("compressed-tensors", folder(*CT.FLOATS8["ragged blocks"][:2])),
    "nvfp4": ("compressed-tensors", folder(CT.fours("nvfp4", 16), CT.fp4(16))),
    "fp8": ("fp8", folder(*test_fp8.CASES["ragged blocks"][:2])),
    "fp8 of all experts": ("fp8", lambda path: write_stacks(path, test_fp8.fp8([48, 48]), 48)),
    "fp4": ("fp8", folder(*test_fp8.CASES["fp4, named scale"][:2])),
    "modelopt": ("modelopt", folder(*test_modelopt.CASES["both"][:2])),
    "hqq": ("hqq", folder(test_hqq.HQQ, test_hqq.packer(3, 32))),
    "hqq columns": ("hqq", folder(test_hqq.HQQ, test_hqq.packer(4, 32, axis=0))),
    "bitnet": ("bitnet", folder(test_bitnet.BITNET, test_bitnet.packer())),
    "squeezellm": ("squeezellm", folder(test_tables.SQUEEZE, test_tables.squeezed(4, 3))),
    "anyprecision": ("anyprecision", anyprecision),
    "mxfp4": ("mxfp4", test_mxfp4.gpt_oss),
    "quanto": ("quanto", lambda path: test_quanto.write(path, "qint4", test_quanto.grouped(4, 32))),
    "torchao": ("torchao", torchao),
}  # fmt: skip

STACKED = ("fp8 of all experts", "mxfp4")  # two stacks of four
Files = tuple[dict[str, Tensor], dict[str, str], dict[str, str]]


@functools.cache
def built(name: str) -> Files:
    """Tensors, metadata and JSON files of a small folder."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as path:
        BUILDERS[name][1](Path(path))
        with safe_open(Path(path) / "model.safetensors", "pt") as f:
            names = [n for n in f.keys() if any(kept in n for kept in KEPT)]  # noqa: SIM118
            state, metadata = {n: f.get_tensor(n) for n in names}, f.metadata() or {}
        texts = {p.name: p.read_text() for p in Path(path).glob("*.json")}
    return state, metadata, texts


def read(files: Files) -> int:
    """Opens a folder with these files and reads every layer; returns how many were valid."""
    state, metadata, texts = files
    with tempfile.TemporaryDirectory() as path, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save_file(state, Path(path) / "model.safetensors", metadata)
        for name, text in texts.items():
            (Path(path) / name).write_text(text)
        reader = outcome(lambda: open_checkpoint(path), path)
        if not isinstance(reader, FolderReader):
            return 0
        valid = 0
        for name in reader.plans:
            weight = outcome(functools.partial(reader.layer, name), path)
            if weight is None:
                continue
            if isinstance(weight, QuantTensor):
                weight = weight.validate().dequantize()
            assert tuple(weight.shape) == reader.plans[name].shape
            valid += 1
        return valid


def test_every_reader_is_here() -> None:
    names = {reader.name for reader in READERS if issubclass(reader, FolderReader)}
    assert names == {name for name, _ in BUILDERS.values()}


@pytest.mark.parametrize("name", BUILDERS)
def test_the_undamaged_folder_is_read(name: str) -> None:
    assert read(built(name)) == (8 if name in STACKED else 2)


DTYPES = [
    torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float32,
    torch.float8_e4m3fn, torch.bool,
]  # fmt: skip


def random_bytes(t: Tensor, draw: Any) -> Tensor:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    size = t.numel() * t.element_size()
    raw = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator)
    return raw.view(t.dtype).view(t.shape)


def filled(t: Tensor, draw: Any) -> Tensor:
    byte = draw(st.sampled_from([0, 1, 0x7F, 0x80, 0xFF]))
    raw = torch.full((t.numel() * t.element_size(),), byte, dtype=torch.uint8)
    return raw.view(t.dtype).view(t.shape)


def cut(t: Tensor, draw: Any) -> Tensor:
    if not t.dim():
        return t[None]
    dim = draw(st.integers(0, t.dim() - 1))
    return t.narrow(dim, 0, draw(st.integers(0, max(0, t.shape[dim] - 1))))


def cast(t: Tensor, draw: Any) -> Tensor:
    return t.float().to(draw(st.sampled_from(DTYPES)))


def one_value(t: Tensor, draw: Any) -> Tensor:
    raw = t.clone().reshape(-1)
    if raw.numel():
        place = draw(st.integers(0, raw.numel() - 1))
        raw[place : place + 1] = filled(raw[place : place + 1], draw)
    return raw.view(t.shape)


def json_state(t: Tensor, draw: Any) -> Tensor:
    """Of a tensor that holds JSON, one value of it; else as `one_value`."""
    try:
        content = json.loads(bytes(t.flatten().tolist())) if t.dtype == torch.uint8 else None
    except ValueError:
        content = None
    if not isinstance(content, dict):
        return one_value(t, draw)
    return torch.tensor(list(json.dumps(changed(content, draw)).encode()), dtype=torch.uint8)


VALUES = [
    None, True, -1, 0, 1, 2, 3, 5, 7, 16, 128, 2**31, 2**70, 1.5, float("nan"), "", "4", "group", "gemv", [], [0, 0],
    [1, 2], ["a"], {}, {"a": 1},
]  # fmt: skip


def changed(content: Any, draw: Any) -> Any:
    """JSON with one value changed or missing, at any depth."""
    if not isinstance(content, dict | list) or not content or draw(st.integers(0, 3)) == 0:
        return draw(st.sampled_from(VALUES))
    if isinstance(content, list):
        place = draw(st.integers(0, len(content) - 1))
        return [changed(v, draw) if i == place else v for i, v in enumerate(content)]
    key = draw(st.sampled_from(sorted(content)))
    rest = {k: v for k, v in content.items() if k != key}
    return rest if draw(st.booleans()) else {**rest, key: changed(content[key], draw)}


CHANGES = [random_bytes, filled, cut, cast, one_value, json_state, lambda t, draw: t.reshape(-1)]


@pytest.mark.parametrize("name", BUILDERS)
@fuzz
@given(data=st.data())
def test_damaged_tensors(name: str, data: Any) -> None:
    state, metadata, texts = built(name)
    damaged = dict(state)
    for _ in range(data.draw(st.integers(1, 2))):
        victim = data.draw(st.sampled_from(sorted(damaged)))
        if data.draw(st.integers(0, 7)) == 0:
            del damaged[victim]
            continue
        change = data.draw(st.sampled_from(CHANGES))
        damaged[victim] = change(damaged[victim], data.draw).contiguous().clone()
    read((damaged, metadata, texts))


@pytest.mark.parametrize("name", BUILDERS)
@fuzz
@given(data=st.data())
def test_damaged_settings(name: str, data: Any) -> None:
    """The configuration, the other files, and what a header says."""
    state, metadata, texts = built(name)
    files = dict(texts)
    own = {n: text for n, text in files.items() if n != "config.json"}
    config = json.loads(files["config.json"])
    if metadata.get("format") is None and metadata and data.draw(st.booleans()):
        key = data.draw(st.sampled_from(sorted(metadata)))
        value = json.dumps(changed(json.loads(metadata[key]), data.draw))
        read((state, {**metadata, key: value}, texts))
        return
    if own and data.draw(st.booleans()):
        victim = data.draw(st.sampled_from(sorted(own)))
        files[victim] = json.dumps(changed(json.loads(own[victim]), data.draw))
    elif "quantization_config" in config:
        config["quantization_config"] = changed(config["quantization_config"], data.draw)
    else:
        config["anyprec"] = changed(config.get("anyprec"), data.draw)
    files["config.json"] = json.dumps(config)
    read((state, metadata, files))


def test_files_that_are_cut(tmp_path: Path) -> None:
    state, _, texts = built("gptq")
    save_state(tmp_path, state)
    (tmp_path / "config.json").write_text(texts["config.json"])
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    for size in (0, 7, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"model\.safetensors: not a readable safetensors"):
            open_checkpoint(tmp_path)
