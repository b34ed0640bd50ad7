"""lowbit as a quantization method of diffusers: saved and loaded bit for bit, quantized on load, dense again."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

diffusers = pytest.importorskip("diffusers")

import lowbit  # noqa: E402
from lowbit.nn import QuantLinear  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
FORMAT = "int8_g32"


def dense() -> Any:
    torch.manual_seed(0)
    return diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=1, sample_size=8,
        patch_size=2, num_embeds_ada_norm=10,
    ).eval()  # fmt: skip


@torch.inference_mode()
def result(model: Any) -> Tensor:
    torch.manual_seed(1)
    x = torch.randn(1, 4, 8, 8).to(model.dtype)
    return model(x, timestep=torch.tensor([3]), class_labels=torch.tensor([1])).sample


def loaded(folder: Path, **more: Any) -> Any:
    """What must be complete."""
    model, info = diffusers.DiTTransformer2DModel.from_pretrained(
        folder, output_loading_info=True, **more
    )
    assert not any(info.values()), info
    return model


def packed() -> Any:
    model = dense()
    lowbit.quantize_model(model, FORMAT, progress=False)
    return model


def test_saved_and_loaded(tmp_path: Path) -> None:
    model = packed()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["quantization_config"] == {"quant_method": "lowbit"}
    found = loaded(tmp_path)
    assert torch.equal(result(found), result(model))
    assert isinstance(found.proj_out_1, QuantLinear)
    found.save_pretrained(tmp_path / "again")
    assert torch.equal(result(loaded(tmp_path / "again")), result(model))
    half = loaded(tmp_path, torch_dtype=torch.bfloat16)
    assert (half.dtype, half.proj_out_1.dtype) == (torch.bfloat16, torch.bfloat16)
    model.proj_out_1.set_activations("int8")
    model.proj_out_1.set_input_scale(0.0123)
    model.save_pretrained(tmp_path / "static")
    static = loaded(tmp_path / "static", torch_dtype=torch.bfloat16).proj_out_1
    assert torch.equal(static.input_scale, model.proj_out_1.input_scale)  # fp32: no weight
    codes = (m.proj_out_1.quant_tensor().codes for m in (half, model))
    assert torch.equal(*codes)


def test_quantized_on_load(tmp_path: Path) -> None:
    dense().save_pretrained(tmp_path)
    found = loaded(tmp_path, quantization_config=lowbit.LowbitConfig(FORMAT))
    assert torch.equal(result(found), result(packed()))
    assert found.is_quantized


def test_dense_again(tmp_path: Path) -> None:
    for make in (lambda model: model.dequantize(), lowbit.dequantize_model):
        model = packed()
        expected = result(model)
        make(model)
        assert type(model.proj_out_1) is nn.Linear
        torch.testing.assert_close(result(model), expected)
        model.save_pretrained(tmp_path)
        assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
        found = loaded(tmp_path)
        for a, b in zip(found.parameters(), model.parameters(), strict=True):
            assert torch.equal(a, b)


def test_within_another_module(tmp_path: Path) -> None:
    pipeline = nn.ModuleDict({"transformer": dense()})
    lowbit.quantize_model(pipeline, FORMAT, progress=False)
    pipeline["transformer"].save_pretrained(tmp_path)
    assert torch.equal(result(loaded(tmp_path)), result(packed()))


def test_bad_input(tmp_path: Path) -> None:
    model = packed()
    with pytest.raises(ValueError, match="safe_serialization must be True"):
        model.save_pretrained(tmp_path, safe_serialization=False)
    model.save_pretrained(tmp_path, max_shard_size="4KB")
    with pytest.raises(ValueError, match=r"must be one \.safetensors file"):
        loaded(tmp_path)
    dense().save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match="LowbitConfig needs a format"):
        loaded(tmp_path / "dense", quantization_config=lowbit.LowbitConfig())


def test_without_lowbit_diffusers_refuses_the_folder(tmp_path: Path) -> None:
    packed().save_pretrained(tmp_path)
    code = f"import diffusers; diffusers.DiTTransformer2DModel.from_pretrained({str(tmp_path)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode != 0
    assert "lowbit" in done.stderr
