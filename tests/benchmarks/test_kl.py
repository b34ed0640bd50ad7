"""benchmarks/kl.py: what it reports of formats and types, and the tables and the plot of its file."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import report
import report_quality
from adapters.base import Unsupported

from lowbit.methods import quantize
from lowbit.ptq import InputStatistics

ROW = {
    "data": "gptq",
    "bits_per_weight": 4.25,
    "kl": 0.0512,
    "perplexity": 10.4,
    "cpu_seconds": 61.4,
}
DATA = {
    "weights": {
        "machine": {"cpu": "a CPU", "versions": {"lowbit": "1"}, "commit": "0123456789"},
        "rows": [{"format": "km4", "bits_per_weight": 4.254, "errors": {"Gaussian": 0.00523}}],
    },
    "models": {
        "smollm2": {
            "machine": {"cpu": "a CPU", "versions": {"lowbit": "1"}, "commit": "0123456789"},
            "title": "SmolLM2 (Llama)",
            "windows": [16, 8],
            "dense": {"perplexity": 10.24},
            "rows": [
                {"format": "km4", **ROW},
                {"format": "ggml IQ4_XS", **ROW, "data": "importance", "kl": 0.0856},
            ],
        }
    },
}


def inputs() -> InputStatistics:
    found = InputStatistics(64)
    found.update(
        torch.randn(256, 64, generator=torch.Generator().manual_seed(1)) * torch.arange(1, 65)
    )
    return found


def test_table_has_what_the_file_says():
    text = report_quality.kl_tables(DATA)
    assert "| km4 | 4.25 | 0.523 |" in text
    assert "| km4 | 4.25 |  |  | 0.0512 / 10.4 / 61 |" in text
    assert "| ggml IQ4_XS | 4.25 |  | 0.0856 / 10.4 / 61 |  |" in text
    assert "IQ4_KS (4.27 bits) 0.0587" in text
    assert report.documents({"kl": DATA})["kl"].startswith("# Divergence of quantized")


def test_plot_is_drawn(tmp_path: Path):
    pytest.importorskip("matplotlib")
    import plots

    assert plots.draw_kl(DATA, tmp_path).read_bytes()[:4] == b"\x89PNG"


def test_formats_are_quantized_with_what_they_are_given():
    pytest.importorskip("libggml")
    pytest.importorskip("transformers")
    import kl

    weight, known = torch.randn(16, 64, generator=torch.Generator().manual_seed(0)), inputs()
    plain, size = kl.quantized(weight, "km4", kl.NONE, known)
    assert torch.equal(plain, quantize(weight, "km4").dequantize())
    assert size == quantize(weight, "km4").nbytes
    weighted, _ = kl.quantized(weight, "nf4", kl.IMPORTANCE, known)
    counts = known.relative_diagonal
    assert torch.equal(weighted, quantize(weight, "nf4", "search", weights=counts).dequantize())
    learned, _ = kl.quantized(weight, "km4", kl.GPTQ, known)
    h = known.relative_hessian
    losses = [float((((m - weight) @ h) * (m - weight)).sum()) for m in (learned, plain)]
    assert losses[0] < losses[1]
    names = {name for name, _ in kl.cases()}
    assert names >= {*kl.FORMATS, "ggml IQ4_XS"}


def test_types_of_ggml():
    pytest.importorskip("libggml")
    from adapters import ggml

    weight, counts = torch.randn(16, 64, generator=torch.Generator().manual_seed(0)), torch.ones(64)
    # Blocks of 32, and of 256: four rows together.
    for kind, bits in (("Q4_0", 4.5), ("IQ4_XS", 4.25), ("Q4_K", 4.5)):
        made, size = ggml.quantized(weight, kind, counts)
        assert 8 * size == bits * weight.numel()
        error = (made - weight).square().sum() / weight.square().sum()
        # 16 levels of N(0, 1) leave 0.0095 at best; a scale for each 32 makes it less.
        assert 0.002 < error < 0.0095
    with pytest.raises(Unsupported, match="N must be a multiple of 4 where K is 64, got 6"):
        ggml.quantized(weight[:6], "Q4_K")


def test_permuted_channels_are_the_same_model():
    transformers = pytest.importorskip("transformers")
    import kl_models

    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    weight = model.model.layers[1].mlp.down_proj.weight.detach().clone()
    ids = torch.arange(20)[None]
    with torch.no_grad():
        before = model(ids).logits
        kl_models.permute(model, 0)
        # Sums in another order.
        torch.testing.assert_close(model(ids).logits, before, rtol=1e-4, atol=1e-5)
    assert not torch.equal(model.model.layers[1].mlp.down_proj.weight, weight)
    assert sorted(weight.flatten().tolist()) == sorted(
        model.model.layers[1].mlp.down_proj.weight.flatten().tolist()
    )
