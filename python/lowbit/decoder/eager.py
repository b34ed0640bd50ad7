"""A decoder made of torch calls. A token is decoded in buffers that never move, so that every linear
is a call whose arguments were made once.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedModel

from lowbit.decoder.bound import bind_linear
from lowbit.decoder.description import attached, other_rope
from lowbit.decoder.sampling import likeliest
from lowbit.nn import QuantLinear

Call = Callable[[], object]


@dataclass(frozen=True, slots=True)
class _Layer:
    """What decoding a token needs of a decoder layer; each call reads and writes fixed buffers."""

    input_norm: Tensor
    project_qkv: tuple[Call, ...]
    cache: Tensor  # (2, kv heads, length, head dim)
    keys: Tensor  # (1, kv heads, length, head dim), a view of the cache
    values: Tensor
    project_out: Call
    mlp_norm: Tensor
    gate: Call
    up: Call
    down: Call


class EagerDecoder:
    """Decodes a llama with its own modules: dense linears, and devices other than the CPU."""

    def __init__(self, model: LlamaForCausalLM, max_length: int) -> None:
        config = model.config
        self.model = model
        self.max_length = max_length
        self._eps = config.rms_norm_eps
        attention = model.model.layers[0].self_attn
        self._scaling, self._dim = attention.scaling, attention.head_dim
        self._heads = attention.q_proj.out_features // self._dim
        self._kv_heads = attention.k_proj.out_features // self._dim
        with torch.inference_mode():
            self._allocate()
            self._layers = [self._bind_layer(i) for i in range(config.num_hidden_layers)]
            self._head = _bind(model.lm_head, self._normed, self._logits)

    @staticmethod
    def serves(model: PreTrainedModel) -> bool:
        """Whether it can decode a model."""
        return (
            isinstance(model, LlamaForCausalLM)
            and model.config.hidden_act == "silu"
            and other_rope(model) is None
            and attached(model) is None
        )

    def forward(
        self,
        ids: Tensor,  # (T,) int64
        position: int,
    ) -> Tensor:  # (vocabulary,)
        """Appends tokens at a position; returns the logits after the last, in the same memory."""
        return self._decode(ids, position) if len(ids) == 1 else self._prefill(ids, position)

    @torch.inference_mode()
    def likeliest(self) -> int:
        """The token of the largest logit.

        Raises:
            ValueError: a logit is NaN.
        """
        # argmax over bf16 takes six times as long as converting first.
        return likeliest(self._scores.copy_(self._logits[0]))

    def _allocate(self) -> None:
        config, norm = self.model.config, self.model.model.norm.weight
        heads, kv_heads, dim = self._heads, self._kv_heads, self._dim

        def empty(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=norm.dtype, device=norm.device)

        self._cache = empty(config.num_hidden_layers, 2, kv_heads, self.max_length, dim)
        self._residual, self._residual_mid, self._normed = (
            empty(1, config.hidden_size) for _ in range(3)
        )
        self._qkv = empty(heads + 2 * kv_heads, dim)
        self._rotated = empty(heads + kv_heads, dim)
        self._attended = empty(heads, dim)
        self._mlp = empty(2, 1, config.intermediate_size)
        self._logits = empty(1, config.vocab_size)
        self._scores = self._logits[0].float()
        positions = torch.arange(self.max_length, dtype=torch.int64, device=norm.device)
        cos, sin = self.model.model.rotary_emb(self._residual, positions.unsqueeze(0))
        # rotate_half(x) * sin is (x with its halves swapped) * (sin with its first half negated).
        half = dim // 2
        self._cos, self._sin = cos[0], torch.cat((-sin[0, :, :half], sin[0, :, half:]), dim=1)
        self._swap = torch.arange(dim, dtype=torch.int64, device=norm.device).roll(half)

    def _bind_layer(self, index: int) -> _Layer:
        layer, cache = self.model.model.layers[index], self._cache[index]
        attention, mlp = layer.self_attn, layer.mlp
        heads, kv_heads = self._heads, self._kv_heads
        q, k, v = (part.view(1, -1) for part in self._qkv.split((heads, kv_heads, kv_heads), dim=0))
        gate, up = self._mlp.unbind(0)
        return _Layer(
            input_norm=layer.input_layernorm.weight,
            project_qkv=(
                _bind(attention.q_proj, self._normed, q),
                _bind(attention.k_proj, self._normed, k),
                _bind(attention.v_proj, self._normed, v),
            ),
            cache=cache,
            keys=cache[0].unsqueeze(0),
            values=cache[1].unsqueeze(0),
            project_out=_bind(
                attention.o_proj, self._attended.view(1, -1), self._residual_mid, self._residual
            ),
            mlp_norm=layer.post_attention_layernorm.weight,
            gate=_bind(mlp.gate_proj, self._normed, gate),
            up=_bind(mlp.up_proj, self._normed, up),
            down=_bind(mlp.down_proj, gate, self._residual, self._residual_mid),
        )

    def _norm(self, x: Tensor, weight: Tensor) -> None:
        """RMS norm of one row into the buffer; F.rms_norm on a row takes twice as long."""
        norm = torch.linalg.vector_norm(x, dtype=torch.float32).item()
        scale = 1.0 / math.sqrt(norm * norm / x.shape[1] + self._eps)
        torch.mul(x, scale, out=self._normed).mul_(weight)

    def _decode(self, ids: Tensor, position: int) -> Tensor:
        heads, kv_heads = self._heads, self._kv_heads
        qkv, gate, up = self._qkv, self._mlp[0], self._mlp[1]
        qk, kv = qkv[: heads + kv_heads], qkv[heads:].view(2, kv_heads, -1)
        # The query heads that share a key head stand where a sequence of queries would.
        q = qkv[:heads].view(1, kv_heads, heads // kv_heads, -1)
        attended = self._attended.view(q.shape)
        cos, sin = self._cos[position], self._sin[position]
        self._residual.copy_(self.model.model.embed_tokens(ids))
        for layer in self._layers:
            self._norm(self._residual, layer.input_norm)
            for project in layer.project_qkv:
                project()
            torch.index_select(qk, 1, self._swap, out=self._rotated)
            qk.mul_(cos).addcmul_(self._rotated, sin)
            layer.cache.select(2, position).copy_(kv)
            attended.copy_(
                F.scaled_dot_product_attention(
                    q,
                    layer.keys.narrow(2, 0, position + 1),
                    layer.values.narrow(2, 0, position + 1),
                    scale=self._scaling,
                )
            )
            layer.project_out()
            self._norm(self._residual_mid, layer.mlp_norm)
            layer.gate()
            layer.up()
            F.silu(gate, inplace=True).mul_(up)
            layer.down()
        self._norm(self._residual, self.model.model.norm.weight)
        self._head()
        return self._logits[0]

    def _prefill(self, ids: Tensor, start: int) -> Tensor:
        stop = start + len(ids)
        cos, sin = self._cos[start:stop], self._sin[start:stop]
        mask = None
        if start:
            mask = torch.ones(len(ids), stop, dtype=torch.bool, device=ids.device).tril(start)
        x = self.model.model.embed_tokens(ids)
        for layer, bound in zip(self.model.model.layers, self._layers, strict=True):
            h = self._norm_rows(x, bound.input_norm)
            attention = layer.self_attn
            q, k, v = (
                project(h).view(len(ids), -1, attention.head_dim).transpose(0, 1)
                for project in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            q, k = (t * cos + t.index_select(2, self._swap) * sin for t in (q, k))
            bound.cache[:, :, start:stop].copy_(torch.stack((k, v)))
            keys, values = (
                t[:, :stop].repeat_interleave(attention.num_key_value_groups, dim=0)
                for t in bound.cache
            )
            # With a leading batch of one: the fused kernel takes four dimensions only.
            attended = F.scaled_dot_product_attention(
                q[None], keys[None], values[None], mask, is_causal=mask is None, scale=self._scaling
            )
            x = x + attention.o_proj(attended[0].transpose(0, 1).reshape(len(ids), -1))
            h = self._norm_rows(x, bound.mlp_norm)
            x = x + layer.mlp.down_proj(F.silu(layer.mlp.gate_proj(h)).mul_(layer.mlp.up_proj(h)))
        self._norm(x[-1:], self.model.model.norm.weight)
        self._head()
        return self._logits[0]

    def _norm_rows(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, self._eps)


def _bind(module: nn.Module, x: Tensor, out: Tensor, addend: Tensor | None = None) -> Call:
    """The call that sets `out` (1, N) to module(x) + addend for a row `x` (1, K)."""
    packed = type(module) is QuantLinear and module.input_scale is None
    own = cast("Tensor | None", getattr(module, "bias", None))
    # A bias and an addend, or more than a product with a weight.
    if (own is not None and addend is not None) or not (packed or type(module) is nn.Linear):

        def call() -> None:
            y = module(x)
            out.copy_(y if addend is None else y + addend)

        return call
    added = own if addend is None else addend.view(-1)
    if isinstance(module, QuantLinear):
        return bind_linear(x, module.kernel_weight(), out, added)
    weight = cast("Tensor", module.weight)
    if added is None:
        return functools.partial(torch.mm, x, weight.t(), out=out)
    return functools.partial(torch.addmm, added, x, weight.t(), out=out)
