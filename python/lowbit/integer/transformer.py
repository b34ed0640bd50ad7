"""The nodes of transformers, as a tracer found them: products of activations, softmax, GELU, layer norms."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lowbit.integer.graph import Node


@dataclass(frozen=True, kw_only=True)
class MatMul(Node):
    """alpha * a b, a (..., M, K) and b (..., K, N), or (..., N, K) if it is transposed; `depth` is K."""

    alpha: float = 1.0
    transposed: bool = False
    depth: int

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """Without alpha, in integers too."""
        return a @ (b.transpose(-2, -1) if self.transposed else b)

    def compute(self, *inputs: Tensor) -> Tensor:
        """As torch.matmul."""
        return self.product(*inputs) * self.alpha


@dataclass(frozen=True, kw_only=True)
class Softmax(Node):
    """Over the last dimension."""

    def compute(self, *inputs: Tensor) -> Tensor:
        """As torch.softmax."""
        return torch.softmax(inputs[0], -1)


@dataclass(frozen=True, kw_only=True)
class Gelu(Node):
    """x Phi(x), or its form with tanh."""

    tanh: bool = False

    def compute(self, *inputs: Tensor) -> Tensor:
        """As torch.nn.functional.gelu."""
        return F.gelu(inputs[0], approximate="tanh" if self.tanh else "none")


@dataclass(frozen=True, kw_only=True)
class LayerNorm(Node):
    """Over the last dimension, with weight and bias (K,) float64."""

    weight: Tensor
    bias: Tensor
    eps: float

    def compute(self, *inputs: Tensor) -> Tensor:
        """As torch.nn.functional.layer_norm."""
        (x,) = inputs
        weight, bias = (p.to(x.dtype) for p in (self.weight, self.bias))
        return F.layer_norm(x, weight.shape, weight, bias, self.eps)


@dataclass(frozen=True, kw_only=True)
class Constant(Node):
    """A parameter that is an activation: value has the node's shape. It takes the network's input for its batch."""

    value: Tensor

    def compute(self, *inputs: Tensor) -> Tensor:
        """The value for each sample."""
        return self.value.expand(inputs[0].shape[0], *self.shape)


@dataclass(frozen=True, kw_only=True)
class Scale(Node):
    """x times a positive number: the same integers with another scale."""

    factor: float

    def compute(self, *inputs: Tensor) -> Tensor:
        """x * factor."""
        return inputs[0] * self.factor


@dataclass(frozen=True, kw_only=True)
class Requantize(Node):
    """The same numbers on a grid of their own, where products take fewer bits than others do."""

    def compute(self, *inputs: Tensor) -> Tensor:
        """x."""
        return inputs[0]


def attention_scale(head: int) -> float:
    """What scaled_dot_product_attention multiplies by where nothing is said."""
    return 1 / math.sqrt(head)
