"""FP8: E4M3 and E5M2 with scales for tensors, rows or blocks (OCP OFP8 1.0, OCP MX 1.0; COAT, arXiv 2410.19313)."""

from lowbit.fp8.explanation import explain
from lowbit.fp8.matmul import scaled_mm
from lowbit.fp8.quantization import absmax, cast, dequantize, quantize

__all__ = ["absmax", "cast", "dequantize", "explain", "quantize", "scaled_mm"]
