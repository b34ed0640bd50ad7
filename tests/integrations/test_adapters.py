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

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
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


def test_dora():
    """Its norms are those of the dequantized weight: the dense model of the same values gives the same."""
    base = packed()
    config: Any = dict(
        r=4, target_modules=["q_proj", "down_proj"], use_dora=True, init_lora_weights=False
    )
    made = []
    for one in (copy.deepcopy(base), copy.deepcopy(base).dequantize()):
        torch.manual_seed(1)
        made.append(peft.get_peft_model(one, peft.LoraConfig(**config)).eval())
    model, dense = made
    for one in made:
        one(IDS, labels=IDS).loss.backward()
    own = dict(dense.named_parameters())
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert any("magnitude" in name for name in trained)
    for name, p in trained.items():
        torch.testing.assert_close(p.grad, own[name].grad, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        want = model(IDS).logits
        torch.testing.assert_close(want, dense(IDS).logits, rtol=1e-4, atol=1e-5)
        model.merge_adapter()
        torch.testing.assert_close(model(IDS).logits, want, rtol=1e-4, atol=1e-5)
        model.unmerge_adapter()
        assert torch.equal(model(IDS).logits, want)


@pytest.mark.filterwarnings("ignore:Unmerge result can be inaccurate")
def test_ia3(tmp_path: Path):
    base = packed()
    config: Any = dict(
        target_modules=["k_proj", "down_proj"],
        feedforward_modules=["down_proj"],
        init_ia3_weights=False,
    )
    made = []
    for one in (copy.deepcopy(base), copy.deepcopy(base).dequantize()):
        torch.manual_seed(1)
        made.append(peft.get_peft_model(one, peft.IA3Config(**config)).eval())
    model, dense = made
    for one in made:
        one(IDS, labels=IDS).loss.backward()
    own = dict(dense.named_parameters())
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 4
    for name, p in trained.items():
        torch.testing.assert_close(p.grad, own[name].grad, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        want = model(IDS).logits
        torch.testing.assert_close(want, dense(IDS).logits, rtol=1e-4, atol=1e-5)
        model.save_pretrained(tmp_path)
        again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
        assert torch.equal(again(IDS).logits, want)
        model.merge_adapter()
        torch.testing.assert_close(model(IDS).logits, want, rtol=1e-4, atol=1e-5)
        model.unmerge_adapter()
        assert torch.equal(model(IDS).logits, want)


def test_a_run_of_trainer(tmp_path: Path):
    """Of what `load_model` and `from_pretrained` give, too: refused without adapters, trained with them."""
    packed().save_pretrained(tmp_path / "model")
    data = [{"input_ids": row, "labels": row} for row in torch.randint(64, (8, 12))]
    how = transformers.TrainingArguments(
        str(tmp_path / "out"), max_steps=4, per_device_train_batch_size=4, learning_rate=0.05, report_to=[],
        use_cpu=True, disable_tqdm=True, save_strategy="no", logging_strategy="no", seed=0,
    )  # fmt: skip
    for model in (
        lowbit.load_model(tmp_path / "model"),
        transformers.LlamaForCausalLM.from_pretrained(tmp_path / "model"),
    ):
        with pytest.raises(ValueError, match="purely quantized"):
            transformers.Trainer(model, how, train_dataset=data)
        before = {n: t.clone() for n, t in model.state_dict().items()}
        adapter = adapted(peft.prepare_model_for_kbit_training(model), "all-linear")
        ids = torch.stack([row["input_ids"] for row in data])
        with torch.no_grad():
            first = float(adapter(ids, labels=ids).loss)
        transformers.Trainer(adapter, how, train_dataset=data).train()
        with torch.no_grad():
            last = float(adapter.eval()(ids, labels=ids).loss)
        assert last < first
        after = adapter.unload().state_dict()
        assert all(torch.equal(after[name], t) for name, t in before.items())


def test_trainer_wants_adapters():
    """Its own check, as of bitsandbytes."""
    check = transformers.trainer_utils.validate_quantization_for_training
    with pytest.raises(ValueError, match="purely quantized"):
        check(packed())
    check(adapted(peft.prepare_model_for_kbit_training(packed()), "all-linear"))
