"""Models of transformers whose code reads `layer.weight`, against the same model with the dequantized weights."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from dense_weights import weight_of
from torch import nn

import lowbit
from lowbit.nn import QuantEmbedding, QuantLinear

transformers = pytest.importorskip("transformers")

T5 = {
    "vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4,
    "decoder_start_token_id": 0, "dropout_rate": 0.0,
}  # fmt: skip
MAMBA = {"vocab_size": 64, "hidden_size": 32, "state_size": 8, "num_hidden_layers": 2}
# Class of the model, of its configuration, and what that is given.
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "T5 gated": ("T5ForConditionalGeneration", "T5Config", {**T5, "feed_forward_proj": "gated-gelu"}),
    "T5 relu": ("T5ForConditionalGeneration", "T5Config", T5),
    "LongT5": ("LongT5ForConditionalGeneration", "LongT5Config", {**T5, "local_radius": 4}),
    "Switch": (
        "SwitchTransformersForConditionalGeneration",
        "SwitchTransformersConfig",
        {**T5, "num_experts": 2, "router_jitter_noise": 0.0},
    ),
    "Mamba": ("MambaForCausalLM", "MambaConfig", MAMBA),
    "FalconMamba": ("FalconMambaForCausalLM", "FalconMambaConfig", MAMBA),
    "Mamba2": (
        "Mamba2ForCausalLM",
        "Mamba2Config",
        {**MAMBA, "num_heads": 4, "head_dim": 16, "n_groups": 1, "expand": 2},
    ),
    "Jamba": (
        "JambaForCausalLM",
        "JambaConfig",
        {
            "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 2, "num_experts_per_tok": 1,
            "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1,
            "mamba_d_state": 8, "mamba_dt_rank": 4, "use_mamba_kernels": False,
        },
    ),
    "RWKV": (
        "RwkvForCausalLM",
        "RwkvConfig",
        {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 3, "rescale_every": 1},
    ),
}  # fmt: skip
every_model = pytest.mark.parametrize("name", MODELS)


def build(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, dict[str, Any]]:
    cls, config, arguments = MODELS[name]
    model = getattr(transformers, cls)(getattr(transformers, config)(**arguments)).to(dtype).eval()
    ids = torch.randint(1, 64, (2, 8))
    inputs = {"input_ids": ids}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.randint(1, 64, (2, 5))
    return model, inputs


def quantized(model: nn.Module, format: Any = "int8", **options: Any) -> nn.Module:
    """Quantizes a model and gives the dense one with the same values."""
    made: dict[str, torch.Tensor] = {}

    def keep(name: str, weight: torch.Tensor, qt: lowbit.QuantTensor) -> None:
        made[name] = qt.dequantize(weight.dtype)

    dense = copy.deepcopy(model)
    lowbit.quantize_model(model, format, progress=False, on_layer=keep, **options)
    assert made
    with torch.no_grad():
        for name, weight in made.items():
            filters = weight_of(dense, name)
            if filters.dim() > 2:
                weight = lowbit.reference.to_filters(weight, filters.shape[2:])
            filters.copy_(weight)
    return dense


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.mark.filterwarnings("ignore::UserWarning")
@every_model
def test_forward_and_backward(name: str) -> None:
    torch.manual_seed(1)
    model, inputs = build(name)
    dense = quantized(model)
    labels = inputs.get("decoder_input_ids", inputs["input_ids"])
    for training in (False, True, False):
        gradients = []
        for each in (model, dense):
            each.train(training)
            each.zero_grad()
            with torch.set_grad_enabled(training):
                output = each(**inputs, labels=labels)
            if training:
                output.loss.backward()
                gradients.append(each.get_input_embeddings().weight.grad.clone())
            logits = output.logits.detach()
            if each is model:
                got = logits
        assert difference(got, logits) < 1e-4
        assert not training or difference(*gradients) < 1e-3


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["T5 gated", "T5 relu"])
def test_layers_that_stay_fp32(name: str, dtype: torch.dtype) -> None:
    """T5 casts its hidden states to the dtype of `wo`, which is kept in fp32."""
    model, inputs = build(name, dtype)
    for module in model.modules():
        if hasattr(module, "wo"):
            module.wo.float()
    dense = quantized(model)
    assert {m.wo.weight.dtype for m in model.modules() if hasattr(m, "wo")} == {torch.float32}
    with torch.no_grad():
        got, want = model(**inputs).logits, dense(**inputs).logits
    assert got.dtype == want.dtype
    assert difference(got.float(), want.float()) < 0.05


@pytest.mark.filterwarnings("ignore::UserWarning")
@every_model
def test_what_transformers_does_to_models(name: str) -> None:
    model, inputs = build(name)
    quantized(model)
    with torch.no_grad():
        before = model(**inputs).logits
        for change in (model.tie_weights, model.init_weights, model.post_init):
            change()
            assert torch.equal(model(**inputs).logits, before)
    assert model.dtype == torch.float32
    assert model.num_parameters() == sum({p: p.numel() for p in model.parameters()}.values())
    assert model.get_memory_footprint() < build(name)[0].get_memory_footprint()


def llama(tied: bool) -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=tied,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


IDS = torch.arange(8)[None]


def test_a_packed_embedding_with_its_packed_head_is_tied_already() -> None:
    model = llama(tied=True)
    quantized(model, {".*": "int8"}, skip=())
    with torch.no_grad():
        before = model(IDS).logits
        for change in (model.tie_weights, model.post_init, model.init_weights):
            change()
        assert torch.equal(model(IDS).logits, before)
    assert model.lm_head._buffers is model.model.embed_tokens._buffers
    assert "lm_head.weight" not in dict(model.named_parameters())


@pytest.mark.parametrize("packed", ["embed_tokens", "lm_head"])
def test_a_packed_layer_is_not_tied_to_a_dense_one(packed: str) -> None:
    model = llama(tied=True)
    quantized(model, {packed: "int8"}, skip=(), fuse=False)
    before = model(IDS).logits
    with pytest.raises((TypeError, NotImplementedError), match="packed"):
        model.tie_weights()
    assert torch.equal(model(IDS).logits, before)


def test_embeddings_are_resized_only_if_dense() -> None:
    model = llama(tied=True)
    quantized(model)
    assert isinstance(model.model.layers[0].mlp.up_proj, QuantLinear)
    model.resize_token_embeddings(70, mean_resizing=False)
    assert model(IDS).logits.shape[-1] == 70
    model = llama(tied=False)
    quantized(model, {".*": "int8"}, skip=())
    before = model(IDS).logits
    with pytest.raises(TypeError, match="QuantEmbedding"):
        model.resize_token_embeddings(70, mean_resizing=False)
    assert isinstance(model.get_input_embeddings(), QuantEmbedding)
    model.resize_token_embeddings(64)
    assert torch.equal(model(IDS).logits, before)
