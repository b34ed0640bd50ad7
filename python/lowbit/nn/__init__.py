"""Modules with quantized weights, with outlier features apart, and with FP8 products and activations."""

from lowbit.nn.activations import set_activations
from lowbit.nn.base import PackedModule
from lowbit.nn.binary import BinaryLinear
from lowbit.nn.conv import (
    QuantConv,
    QuantConv1d,
    QuantConv2d,
    QuantConv3d,
    QuantConvTranspose1d,
    QuantConvTranspose2d,
    QuantConvTranspose3d,
)
from lowbit.nn.embedding import QuantEmbedding
from lowbit.nn.experts import QuantExperts
from lowbit.nn.fp8 import FP8Linear
from lowbit.nn.fp8_activations import (
    FP8LayerNorm,
    FP8RMSNorm,
    fp8_add,
    fp8_gelu,
    fp8_layer_norm,
    fp8_mul,
    fp8_rms_norm,
    fp8_silu,
)
from lowbit.nn.joined import JoinedLinear
from lowbit.nn.linear import QuantLinear
from lowbit.nn.llm_int8 import LLMInt8Linear
from lowbit.nn.pruned import PrunedLinear
from lowbit.nn.reordered import ReorderedLinear
from lowbit.nn.siblings import fuse, unfuse

__all__ = [
    "BinaryLinear", "FP8LayerNorm", "FP8Linear", "FP8RMSNorm", "JoinedLinear", "LLMInt8Linear", "PackedModule",
    "PrunedLinear", "QuantConv", "QuantConv1d", "QuantConv2d", "QuantConv3d", "QuantConvTranspose1d",
    "QuantConvTranspose2d", "QuantConvTranspose3d", "QuantEmbedding", "QuantExperts", "QuantLinear", "ReorderedLinear",
    "fp8_add", "fp8_gelu", "fp8_layer_norm", "fp8_mul", "fp8_rms_norm", "fp8_silu", "fuse", "set_activations",
    "unfuse",
]  # fmt: skip
