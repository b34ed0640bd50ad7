"""Adapters of PEFT on packed linears; the oracle is PEFT on the dense model of the same values."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

import lowbit  # noqa: E402
from lowbit.nn import QuantLinear  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
IDS = torch.arange(20).view(2, 10)


def packed() -> Any:
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    lowbit.quantize_model(model, "nf4", progress=False)
    return model


def adapted(model: Any, targets: Any) -> Any:
    torch.manual_seed(1)
    config = peft.LoraConfig(
        r=4, target_modules=targets, task_type="CAUSAL_LM", init_lora_weights=False
    )
    return peft.get_peft_model(model, config).eval()


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], "all-linear"])
def test_lora(tmp_path: Path, targets: Any):
    """Output, gradients, saving, merging."""
    base = packed()
    model = adapted(copy.deepcopy(base), targets)
    dense = adapted(copy.deepcopy(base).dequantize(), targets)
    for one in (model, dense):
        one(IDS, labels=IDS).loss.backward()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * (4 if targets != "all-linear" else 14)
    assert all("lora_" in n for n in trained)
    own = dict(dense.named_parameters())
    for name, p in trained.items():
        torch.testing.assert_close(p.grad, own[name].grad, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        want = model(IDS).logits
        torch.testing.assert_close(want, dense(IDS).logits, rtol=1e-4, atol=1e-5)
        model.save_pretrained(tmp_path)
        again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
        assert torch.equal(again(IDS).logits, want)
        again.merge_adapter()
        torch.testing.assert_close(again(IDS).logits, want, rtol=1e-4, atol=1e-5)
        again.unmerge_adapter()
        assert torch.equal(again(IDS).logits, want)
        merged = again.merge_and_unload()
        torch.testing.assert_close(merged(IDS).logits, want, rtol=1e-4, atol=1e-5)
    left = sum(isinstance(m, QuantLinear) for m in merged.modules())
    assert left == (10 if targets != "all-linear" else 0)


def test_trainer_wants_adapters():
    """Its own check, as of bitsandbytes."""
    check = transformers.trainer_utils.validate_quantization_for_training
    with pytest.raises(ValueError, match="purely quantized"):
        check(packed())
    check(adapted(peft.prepare_model_for_kbit_training(packed()), "all-linear"))
