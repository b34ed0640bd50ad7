"""FP8: E4M3 and E5M2 with scales for tensors, rows or blocks (OCP OFP8 1.0, OCP MX 1.0; COAT, arXiv 2410.19313)."""

from lowbit.explanation import explain_fp8 as explain
from lowbit.ops.fp8 import absmax, cast, dequantize, quantize
from lowbit.ops.fp8_matmul import scaled_mm

__all__ = ["absmax", "cast", "dequantize", "explain", "quantize", "scaled_mm"]
