"""Tiny models of many architectures of transformers, from their configurations: how much is packed, and that it
computes, is saved and loaded as the dequantized model.
"""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from dense_weights import weight_of
from torch import nn

transformers = pytest.importorskip("transformers")
pytest.importorskip("transformers.integrations.moe")
pytest.importorskip("accelerate")

import lowbit  # noqa: E402

SIZES = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "head_dim": 16, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "attention_dropout": 0.0, "num_experts": 4, "num_experts_per_tok": 2,
    "num_local_experts": 4, "moe_intermediate_size": 48,
}  # fmt: skip
GPT2 = {"n_embd": 64, "n_layer": 1, "n_head": 4, "n_positions": 64, "n_inner": 96}
PARTS = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
         "encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "d_model": 64, "decoder_start_token_id": 1}  # fmt: skip
T5 = {
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 96,
    "num_layers": 1,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
DEEPSEEK = {
    "n_routed_experts": 4, "n_group": 2, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 0,
    "q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16,
    "num_key_value_heads": 4, "head_dim": 8,
}  # fmt: skip
SPEECH = {"conv_dim": (16, 16), "conv_kernel": (5, 3), "conv_stride": (4, 2), "num_feat_extract_layers": 2,
          "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}  # fmt: skip
MAMBA = {"state_size": 8, "expand": 2}
# Kind of model, its further sizes, and the share of weights in matrices that must be packed. Less where convolutions,
# tables of positions or states, and routers of a few experts are a larger part of so small a model.
CAUSAL: dict[str, tuple[dict[str, Any], float]] = {
    **{name: ({}, 0.99) for name in (
        "Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "Gemma2", "Phi", "Phi3", "GPTNeoX", "StableLm",
        "Starcoder2", "Olmo2", "Cohere", "Granite", "SmolLM3", "Glm4", "Nemotron",
    )},
    "Falcon": ({"head_dim": None}, 0.99), "GPT2": (GPT2, 0.99), "GPTBigCode": (GPT2, 0.99),
    "GPTJ": ({**GPT2, "rotary_dim": 8}, 0.99),
    "GPTNeo": ({"attention_types": [[["global"], 1]], "num_layers": 1, "num_heads": 4}, 0.99),
    "CodeGen": ({**GPT2, "rotary_dim": 8}, 0.99),
    "OPT": ({"ffn_dim": 96, "word_embed_proj_dim": 64}, 0.85),
    "Bloom": ({"n_layer": 1, "n_head": 4}, 0.99), "Mpt": ({"d_model": 64, "n_heads": 4, "n_layers": 1}, 0.99),
    "Mamba": (MAMBA, 0.9), "Mamba2": ({**MAMBA, "num_heads": 8, "head_dim": 16, "n_groups": 1}, 0.9),
    "Mixtral": ({}, 0.95), "Qwen2Moe": ({"shared_expert_intermediate_size": 48}, 0.95), "Qwen3Moe": ({}, 0.95),
    "GptOss": ({}, 0.95), "DeepseekV3": (DEEPSEEK, 0.95), "Olmoe": ({}, 0.95), "GraniteMoe": ({}, 0.95),
}  # fmt: skip
OTHERS: dict[str, tuple[str, dict[str, Any], float]] = {
    "Bert": ("BertModel", {}, 0.99), "Roberta": ("RobertaModel", {}, 0.99), "Electra": ("ElectraModel", {}, 0.99),
    "Albert": ("AlbertModel", {"embedding_size": 32}, 0.99),
    "DistilBert": ("DistilBertModel", {"dim": 64, "n_heads": 4, "n_layers": 1, "hidden_dim": 96}, 0.99),
    "T5": ("T5ForConditionalGeneration", T5, 0.99),
    "Marian": ("MarianMTModel", PARTS, 0.9),
    "ViT": ("ViTModel", {"image_size": 32, "patch_size": 8}, 0.7),
    "Dinov2": ("Dinov2Model", {"image_size": 32, "patch_size": 8, "mlp_ratio": 2}, 0.7),
    "Whisper": (
        "WhisperForConditionalGeneration",
        {**PARTS, "num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 16}, 0.7,
    ),
    "Hubert": ("HubertModel", SPEECH, 0.7),
}  # fmt: skip
MODELS = {
    **{name: (f"{name}ForCausalLM", sizes, share) for name, (sizes, share) in CAUSAL.items()},
    **OTHERS,
}
MODELS["GPT2"] = ("GPT2LMHeadModel", *MODELS["GPT2"][1:])
COMPILED = ("Llama", "GPT2", "Bert", "ViT")


@pytest.fixture(autouse=True)
def no_bars():
    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.enable_progress_bar()


def build(name: str) -> Any:
    kind, sizes, _ = MODELS[name]
    torch.manual_seed(0)
    given = {key: value for key, value in {**SIZES, **sizes}.items() if value is not None}
    config = getattr(transformers, f"{name}Config")(**given)
    return getattr(transformers, kind)(config).eval()


def output(model: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    ids = torch.arange(3, 19).view(2, 8)
    given: dict[str, Any] = {}
    kind = model.main_input_name
    if kind == "pixel_values":
        given[kind] = torch.randn(2, 3, 32, 32, generator=generator)
    elif kind == "input_features":
        given[kind] = torch.randn(2, 8, 32, generator=generator)
    elif kind == "input_values":
        given[kind] = torch.randn(2, 400, generator=generator)
    else:
        given[kind] = ids
    if model.config.is_encoder_decoder:
        given["decoder_input_ids"] = ids[:, :5]
    with torch.no_grad():
        made = model(**given)
    return made.logits if "logits" in made else made.last_hidden_state


def quantized(model: Any) -> Any:
    """All that can be packed, embeddings and heads included."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what stays dense: the share is looked at
        return lowbit.quantize_model(model, {".*": "int8_g32"}, skip=(), progress=False)


@pytest.mark.parametrize("name", MODELS)
def test_architecture(tmp_path: Path, name: str):
    """Logits within what other orders of fp32 sums make in a layer with rows of a few hundred values: 1e-4 of the
    largest."""
    model = build(name)
    dense = copy.deepcopy(model)
    report = quantized(model)
    assert report.packed_share >= MODELS[name][2], report.left
    with torch.no_grad():
        for row in report.layers:
            layer = model.get_submodule(row.name)
            values = lowbit.dequantize(layer.quant_tensor())
            if isinstance(layer, lowbit.nn.QuantConv):
                values = layer.to_conv(torch.float32).weight
            weight_of(dense, row.name).copy_(values)
    want, found = output(dense), output(model)
    assert (found - want).abs().max() <= 1e-4 * want.abs().max()
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    state, own = again.state_dict(), model.state_dict()
    assert state.keys() == own.keys()
    assert all(torch.equal(state[key], t) for key, t in own.items())
    assert torch.equal(output(again), found)


@pytest.mark.parametrize("name", COMPILED)
def test_compiled(name: str):
    model = build(name)
    quantized(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    want = output(model)
    with torch.no_grad():
        found = output(_Like(compiled, model))
    assert (found - want).abs().max() <= 1e-5 * want.abs().max()


class _Like(nn.Module):
    """A compiled model with what `output` asks the model for."""

    def __init__(self, compiled: Any, model: Any) -> None:
        super().__init__()
        self.compiled = compiled
        self.main_input_name, self.config = model.main_input_name, model.config

    def forward(self, **given: Any) -> Any:
        return self.compiled(**given)
