"""Convolutional models of transformers: quantized, saved, loaded, quantized as they load, and made dense again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForImageClassification,
    ConvNextConfig,
    ConvNextForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
)

import lowbit

MODELS: dict[str, Any] = {
    "ResNet": lambda: ResNetForImageClassification(
        ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic")
    ),
    "ConvNext": lambda: ConvNextForImageClassification(
        ConvNextConfig(hidden_sizes=[16, 32, 32, 32], depths=[1, 1, 1, 1])
    ),
}


@pytest.mark.parametrize("format", ["nf4", "int8_a8"])
@pytest.mark.parametrize("name", MODELS)
def test_there_and_back(name: str, format: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = MODELS[name]().eval(), torch.randn(1, 3, 64, 64)
    model.save_pretrained(tmp_path / "dense")
    report = lowbit.quantize_model(model, format, progress=False)
    assert not report.left
    assert any(isinstance(module, lowbit.nn.QuantConv2d) for module in model.modules())
    with torch.no_grad():
        expected = model(x).logits
        model.save_pretrained(tmp_path / "packed")
        loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "packed").eval()
        assert torch.equal(loaded(x).logits, expected)
        made = AutoModelForImageClassification.from_pretrained(
            tmp_path / "dense", quantization_config=lowbit.LowbitConfig(format)
        ).eval()
        assert torch.equal(made(x).logits, expected)
        assert lowbit.dequantize_model(loaded)
        assert not any(isinstance(module, lowbit.nn.PackedModule) for module in loaded.modules())
        tolerance = 1e-4 if format == "nf4" else 0.1
        assert (loaded(x).logits - expected).abs().max() <= tolerance * expected.abs().max()
