"""The decoder of csrc/decoder.h on the tensors of a LlamaForCausalLM."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from lowbit import _C
from lowbit.backends.cpu import requests
from lowbit.nn import PackedModule, QuantEmbedding, QuantLinear
from lowbit.strides import address

_LINEARS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)


class CompiledDecoder:
    """Decodes a model whose layers are packed on the CPU; its embedding and head may be dense."""

    def __init__(self, model: LlamaForCausalLM, max_length: int) -> None:
        config, dtype = model.config, model.model.norm.weight.dtype
        attention = model.model.layers[0].self_attn
        dim = attention.head_dim
        self._logits = torch.empty(config.vocab_size, dtype=dtype, device="cpu")
        # The compiled decoder holds addresses; these tensors must live as long as it does.
        self._kept: list[object] = [self._logits]
        positions = torch.arange(max_length, dtype=torch.int64, device="cpu").unsqueeze(0)
        cos, sin = (t[0].float() for t in model.model.rotary_emb(self._logits, positions))
        # rotate_half(x) * sin is (x with its halves swapped) * (sin with its first half negated).
        sin[:, : dim // 2].neg_()
        layers = [
            (
                self._address(layer.input_layernorm.weight),
                self._address(layer.post_attention_layernorm.weight),
                [self._linear(layer.get_submodule(name)) for name in _LINEARS],
            )
            for layer in model.model.layers
        ]
        self._decoder = _C.Decoder(
            dtype=requests.CODES[dtype],
            hidden=config.hidden_size,
            heads=attention.q_proj.out_features // dim,
            kv_heads=attention.k_proj.out_features // dim,
            head_dim=dim,
            intermediate=config.intermediate_size,
            vocab=config.vocab_size,
            max_length=max_length,
            eps=config.rms_norm_eps,
            scale=attention.scaling,
            threads=torch.get_num_threads(),
            embedding=self._linear(model.model.embed_tokens),
            layers=layers,
            norm=self._address(model.model.norm.weight),
            head=self._linear(model.lm_head),
            cos=self._address(cos),
            sin=self._address(sin),
            logits=self._address(self._logits),
        )

    @staticmethod
    def obstacle(model: LlamaForCausalLM) -> str | None:
        """Why it cannot decode a model: a linear of a layer that is not plainly packed for the CPU, or mixed dtypes."""
        inner = model.model
        dtype = inner.norm.weight.dtype
        for i, layer in enumerate(inner.layers):
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                if norm.weight.dtype != dtype:
                    return f"a norm of layer {i} is {norm.weight.dtype}, the last one {dtype}"
            for name in _LINEARS:
                if why := _packed_obstacle(layer.get_submodule(name), QuantLinear):
                    return f"{name} of layer {i} {why}"
        for name, packed, dense in (
            ("model.embed_tokens", QuantEmbedding, nn.Embedding),
            ("lm_head", QuantLinear, nn.Linear),
        ):
            module = model.get_submodule(name)
            if type(module) is dense:
                weight = cast("Tensor", module.weight)
                why = None if weight.device.type == "cpu" else f"is on {weight.device}"
                own = weight.dtype
            else:
                why = _packed_obstacle(module, packed)
                own = module.dtype if isinstance(module, QuantEmbedding) else dtype
            if why is None and own != dtype:
                why = f"is {own}, the last norm {dtype}"
            if why:
                return f"{name} {why}"
        return None

    def forward(
        self,
        ids: Tensor,  # (T,) int64
        position: int,
    ) -> Tensor:  # (vocabulary,)
        """Appends tokens at a position; returns the logits after the last, in the same memory.

        Raises:
            TypeError, IndexError: the ids are not int64 on the CPU, or beyond the vocabulary.
        """
        if ids.dtype != torch.int64 or ids.device.type != "cpu":
            raise TypeError(f"ids must be int64 on the CPU, got {ids.dtype} on {ids.device}")
        low, high = (int(bound) for bound in ids.aminmax())
        if low < 0 or high >= len(self._logits):
            raise IndexError(
                f"ids must be in [0, {len(self._logits)}), got {low if low < 0 else high}"
            )
        ids = ids.contiguous()
        self._decoder.run_ptr(address(ids), len(ids), position)
        return self._logits

    def likeliest(self) -> int:
        """The token of the largest logit.

        Raises:
            ValueError: a logit is NaN.
        """
        return self._decoder.likeliest()

    def _address(self, t: Tensor | None) -> int:
        if t is None:
            return 0
        t = t.detach().contiguous()
        self._kept.append(t)
        return address(t)

    def _linear(self, module: nn.Module) -> _C.DecoderLinear:
        bias = cast("Tensor | None", getattr(module, "bias", None))
        bias_dtype = 0 if bias is None else requests.CODES[bias.dtype]
        if not isinstance(module, PackedModule):
            weight: Any = module.weight
            n, k = weight.shape
            return _C.dense_linear(n, k, self._address(weight), self._address(bias), bias_dtype)
        w = module.kernel_weight().operands
        made, _ = requests.request(w)
        scale = getattr(module, "input_scale", None)
        x_scale = 0.0 if scale is None else float(scale)
        return made.decoder_linear(*map(self._address, (*w.tensors, bias)), bias_dtype, x_scale)


def _packed_obstacle(module: nn.Module, kind: type[PackedModule]) -> str | None:
    if type(module) is not kind:
        return f"is a {type(module).__name__}, not a {kind.__name__}"
    if not requests.reads(module.layout):
        return f"is in layout {module.layout!r}, which the CPU's kernels do not read"
    return "has outliers" if module.format.outliers else None
