"""Modules with quantized weights."""

from lowbit.nn.embedding import QuantEmbedding
from lowbit.nn.fused import fuse, unfuse
from lowbit.nn.linear import QuantLinear
from lowbit.nn.packed import PackedModule

__all__ = ["PackedModule", "QuantEmbedding", "QuantLinear", "fuse", "unfuse"]
