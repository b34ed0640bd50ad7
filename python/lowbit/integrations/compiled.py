"""The decoder of csrc/decoder.h on the tensors of a LlamaForCausalLM."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from lowbit import _C
from lowbit.backends import cpu
from lowbit.layouts import N16
from lowbit.nn import PackedModule, QuantEmbedding, QuantLinear

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
            dtype=cpu.CODES[dtype],
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
    def serves(model: LlamaForCausalLM) -> bool:
        """Whether all linears of the layers are packed for the CPU without outliers, and all else has one dtype."""
        inner = model.model
        dtype = inner.norm.weight.dtype
        norms = (n for m in inner.layers for n in (m.input_layernorm, m.post_attention_layernorm))
        linears = (layer.get_submodule(name) for layer in inner.layers for name in _LINEARS)
        return (
            all(n.weight.dtype == dtype for n in norms)
            and all(isinstance(m, QuantLinear) and _reads(m) for m in linears)
            and _serves(inner.embed_tokens, QuantEmbedding, nn.Embedding, dtype)
            and _serves(model.lm_head, QuantLinear, nn.Linear, dtype)
        )

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
        self._decoder.run_ptr(ids.data_ptr(), len(ids), position)
        return self._logits

    def likeliest(self) -> int:
        """The token of the largest logit."""
        return self._decoder.likeliest()

    def _address(self, t: Tensor | None) -> int:
        if t is None:
            return 0
        t = t.detach().contiguous()
        self._kept.append(t)
        return t.data_ptr()

    def _linear(self, module: nn.Module) -> _C.DecoderLinear:
        bias = cast("Tensor | None", getattr(module, "bias", None))
        bias_dtype = 0 if bias is None else cpu.CODES[bias.dtype]
        if not isinstance(module, PackedModule):
            weight: Any = module.weight
            n, k = weight.shape
            return _C.dense_linear(n, k, self._address(weight), self._address(bias), bias_dtype)
        w = module.operands()
        made = cpu.weight(
            w.format,
            *w.shape,
            None if w.scales is None else w.scales.dtype,
            None if w.zeros is None else w.zeros.dtype,
        )
        tensors = (w.codes, w.scales, w.zeros, w.table, bias)
        return made.decoder_linear(*map(self._address, tensors), bias_dtype)


def _reads(module: PackedModule) -> bool:
    return module.layout == N16 and not module.format.outliers


def _serves(
    module: nn.Module, packed: type[PackedModule], dense: type[nn.Module], dtype: torch.dtype
) -> bool:
    if isinstance(module, packed):
        own = module.dtype if isinstance(module, QuantEmbedding) else dtype
        return _reads(module) and own == dtype
    weight = getattr(module, "weight", None)
    if type(module) is not dense or not isinstance(weight, Tensor):
        return False
    return weight.dtype == dtype and weight.device.type == "cpu"
