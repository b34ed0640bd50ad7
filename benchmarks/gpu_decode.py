"""One decoded token of a Llama-shaped model with random weights, the whole step in one CUDA graph; see gpu.py."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from gpu_timing import replay_microseconds
from torch import Tensor

import lowbit
from lowbit import layouts


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder."""

    name: str
    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    vocabulary: int

    @property
    def head(self) -> int:
        """Features of a head."""
        return self.hidden // self.heads

    @property
    def linears(self) -> tuple[tuple[int, int], ...]:
        """(N, K) of q/k/v in one, o, gate and up in one, down."""
        qkv = (self.heads + 2 * self.kv_heads) * self.head
        return (
            (qkv, self.hidden),
            (self.hidden, self.hidden),
            (2 * self.inner, self.hidden),
            (self.hidden, self.inner),
        )


SHAPES = (
    Shape("SmolLM2-135M", 30, 576, 1536, 9, 3, 49152),
    Shape("Llama-3-8B", 32, 4096, 14336, 32, 8, 128256),
)
CONTEXT = 512
Linear = Callable[[Tensor], Tensor]


def make_linears(
    n: int, k: int, format: str | None, layout: str | None, count: int
) -> list[Linear]:
    """Linears with memory of their own, dense bf16 without a format."""
    weight = torch.randn(n, k, device="cuda") * 0.02
    if format is None:
        return [functools.partial(F.linear, weight=weight.bfloat16()) for _ in range(count)]
    qt = lowbit.quantize(weight, format)
    first = layouts.to_kernel(qt, layout)
    copies = [first.map(Tensor.clone) for _ in range(count)]
    return [functools.partial(lowbit.linear, weight=w) for w in copies]


def milliseconds_per_token(shape: Shape, format: str | None, layout: str | None) -> float:
    """Median time of a step after CONTEXT tokens, batch 1; the weights of a layer are used once."""
    kinds = [make_linears(n, k, format, layout, shape.layers) for n, k in shape.linears]
    layers = list(zip(*kinds, strict=True))
    head = make_linears(shape.vocabulary, shape.hidden, format, layout, 1)[0]
    caches = torch.randn(
        shape.layers, 2, 1, shape.kv_heads, CONTEXT, shape.head, device="cuda", dtype=torch.bfloat16
    )
    x0 = torch.randn(1, shape.hidden, device="cuda", dtype=torch.bfloat16)
    norm = torch.ones(shape.hidden, device="cuda", dtype=torch.bfloat16)

    def step() -> Tensor:
        x = x0
        for i, (qkv, out, up, down) in enumerate(layers):
            h = qkv(F.rms_norm(x, (shape.hidden,), norm))
            q, k, v = h.view(1, -1, 1, shape.head).split(
                (shape.heads, shape.kv_heads, shape.kv_heads), 1
            )
            caches[i, 0, :, :, -1:], caches[i, 1, :, :, -1:] = k, v
            a = F.scaled_dot_product_attention(q, caches[i, 0], caches[i, 1], enable_gqa=True)
            x = x + out(a.view(1, -1))
            gate, upper = up(F.rms_norm(x, (shape.hidden,), norm)).chunk(2, -1)
            x = x + down(F.silu(gate) * upper)
        return head(F.rms_norm(x, (shape.hidden,), norm))

    step()
    return statistics.median(replay_microseconds(step)) / 1e3
