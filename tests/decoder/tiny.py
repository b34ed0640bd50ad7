"""Tiny random decoders of several architectures: packed, and with the same numbers in dense weights."""

from __future__ import annotations

import copy
import math

import torch
import transformers

import lowbit
from lowbit.nn import QuantLinear

LENGTH = 150  # more than two blocks of 64 positions
WINDOW = 70  # begins within a block, and spans blocks
VOCAB = 203

_SIZES = {
    "vocab_size": VOCAB, "hidden_size": 72, "intermediate_size": 101, "num_hidden_layers": 3,
    "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 20,
    "max_position_embeddings": LENGTH + 10, "tie_word_embeddings": False, "pad_token_id": 0,
    "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
_SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]
_YARN = {
    "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 40,
}  # fmt: skip
_LLAMA3 = {**_YARN, "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}

# Name of the architecture in transformers, and what its configuration says beside the sizes.
CASES = {
    "llama3": ("Llama", {"rope_parameters": _LLAMA3, "attention_bias": True, "mlp_bias": True}),
    "linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}),
    "yarn": ("Llama", {"rope_parameters": _YARN}),
    "mistral": ("Mistral", {"sliding_window": WINDOW}),
    "qwen2": ("Qwen2", {
        "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1,
        "tie_word_embeddings": True,
    }),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "smollm3": ("SmolLM3", {
        "no_rope_layers": [1, 0, 1], "use_sliding_window": True, "sliding_window": WINDOW,
        "layer_types": _SLIDING,
    }),
    "granite": ("Granite", {
        "attention_multiplier": 0.3, "residual_multiplier": 0.4, "embedding_multiplier": 3.0,
        "logits_scaling": 2.5,
    }),
    "phi3": ("Phi3", {
        "hidden_size": 96, "intermediate_size": 128, "num_attention_heads": 3,
        "num_key_value_heads": 1, "head_dim": 32, "sliding_window": WINDOW,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.625},
    }),
    "gemma": ("Gemma", {"tie_word_embeddings": True}),
    "gemma2": ("Gemma2", {
        "query_pre_attn_scalar": 11, "attn_logit_softcapping": 1.5, "final_logit_softcapping": 2.0,
        "sliding_window": WINDOW, "layer_types": _SLIDING,
    }),
    "gemma3": ("Gemma3", {
        "query_pre_attn_scalar": 7, "final_logit_softcapping": 2.0, "sliding_window": 33,
        "layer_types": _SLIDING, "rope_parameters": {
            "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 4.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
        },
    }),
}  # fmt: skip


def tiny(case: str, dtype=torch.float32, format="int4_g32", prepare=None, **changes):
    """(the packed model, transformers' own dense model with the same numbers); prepare(model) before it is packed."""
    architecture, options = CASES[case]
    kind = getattr(transformers, f"{architecture}ForCausalLM")
    config = kind.config_class(**{**_SIZES, **options, **changes})
    config._attn_implementation = "eager"
    torch.manual_seed(len(case))
    model = kind(config).eval()
    plain_norms = not architecture.startswith("Gemma")  # Gemma adds 1 itself
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape)
        # Norms about 1; linears that keep the size of what they are given.
        vector = parameter.dim() == 1
        scale = 0.3 if vector else parameter.shape[1] ** -0.5
        parameter.data = noise * scale + (vector and plain_norms)
    if prepare is not None:
        prepare(model)
    packed = copy.deepcopy(model).to(dtype)
    lowbit.quantize_model(packed, format, skip=("lm_head",))
    for name, module in packed.named_modules():
        if isinstance(module, QuantLinear):
            model.get_submodule(name).weight.data = module.quant_tensor().dequantize().float()
    for name, parameter in packed.named_parameters():  # what stays dense, rounded as it is there
        model.get_parameter(name).data = parameter.data.float()
    return packed, model.requires_grad_(False)


def bound(model, logits, length=LENGTH):
    """sqrt(K) eps for each of the sums behind a logit, of K terms in another order; 4 for the tails."""
    config = model.config
    k = max(config.hidden_size, config.intermediate_size, length)
    depth = 10 * config.num_hidden_layers + 1
    return 4 * depth * math.sqrt(k) * torch.finfo(torch.float32).eps * float(logits.abs().max())
