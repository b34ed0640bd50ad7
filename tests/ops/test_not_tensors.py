"""Lists, floats and numpy arrays in place of tensors: a TypeError that names the argument."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import lowbit
from lowbit import binary, fp8, int8, qat
from lowbit import nn as lnn
from lowbit.methods import quantize
from lowbit.ops.weights import embedding
from lowbit.ptq import OBSERVERS, InputStatistics
from lowbit.weights.quantized import QuantTensor

K, N = 64, 32
X, W = torch.randn(3, K), torch.randn(N, K)
NF4, INT8, BINARY = (quantize(W, f) for f in ("nf4", "int8_row", "binary_row"))
SIGNS, SIGN_SCALES = binary.quantize(X)
Q, Q_SCALES = int8.quantize(X)
A, A_SCALE = fp8.quantize(X)
B, B_SCALE = fp8.quantize(W)
DENSE = nn.Linear(K, N)
STATIC = lnn.QuantLinear.from_linear(DENSE, "int8_row_a8")
STATIC.set_input_scale(0.1)
INT32 = torch.ones(2, dtype=torch.int32)

# The argument that is no tensor, by function and name.
CALLS: dict[str, Callable[[Any], object]] = {
    "linear x": lambda b: lowbit.linear(b, NF4),
    "linear bias": lambda b: lowbit.linear(X, NF4, b),
    "linear weight": lambda b: lowbit.linear(X, b),
    "linear gate": lambda b: lowbit.linear(X, NF4, activation="silu", gate=b),
    "linear residual": lambda b: lowbit.linear(X, NF4, residual=b),
    "linear_many x": lambda b: lowbit.linear_many(b, [NF4]),
    "linear_many weight": lambda b: lowbit.linear_many(X, [b]),
    "linear_many biases": lambda b: lowbit.linear_many(X, [NF4], [b]),
    "dequantize weight": lowbit.dequantize,
    "embedding indices": lambda b: embedding(b, NF4),
    "explain x": lambda b: lowbit.explain(b, NF4),
    "quantize weight": lambda b: quantize(b, "nf4"),
    "quantize weights": lambda b: quantize(W, "kmeans3", "kmeans", weights=b),
    "quantize table": lambda b: quantize(W, "kmeans3", table=b),
    "quantize hessian": lambda b: quantize(W, "nf4", "gptq", hessian=b),
    "QuantTensor codes": lambda b: QuantTensor("nf4", (N, K), {**NF4.tensors, "codes": b}),
    "fp8.quantize x": fp8.quantize,
    "fp8.quantize maxima": lambda b: fp8.quantize(X, maxima=b),
    "fp8.dequantize q": lambda b: fp8.dequantize(b, A_SCALE),
    "fp8.dequantize scale": lambda b: fp8.dequantize(A, b),
    "fp8.absmax x": fp8.absmax,
    "fp8.cast x": fp8.cast,
    "fp8.scaled_mm a": lambda b: fp8.scaled_mm(b, B, A_SCALE, B_SCALE),
    "fp8.scaled_mm b": lambda b: fp8.scaled_mm(A, b, A_SCALE, B_SCALE),
    "fp8.scaled_mm scale_a": lambda b: fp8.scaled_mm(A, B, b, B_SCALE),
    "fp8.scaled_mm scale_b": lambda b: fp8.scaled_mm(A, B, A_SCALE, b),
    "fp8.scaled_mm bias": lambda b: fp8.scaled_mm(A, B, A_SCALE, B_SCALE, b),
    "int8.quantize x": int8.quantize,
    "int8.linear q": lambda b: int8.linear(b, Q_SCALES, INT8),
    "int8.linear x_scales": lambda b: int8.linear(Q, b, INT8),
    "int8.linear weight": lambda b: int8.linear(Q, Q_SCALES, b),
    "int8.linear bias": lambda b: int8.linear(Q, Q_SCALES, INT8, b),
    "int8.static_linear x": lambda b: int8.static_linear(b, torch.tensor(0.1), INT8),
    "int8.static_linear x_scale": lambda b: int8.static_linear(X, b, INT8),
    "int8.requantize acc": lambda b: int8.requantize(b, INT32, INT32),
    "int8.requantize shift": lambda b: int8.requantize(INT32, INT32, b),
    "binary.quantize x": binary.quantize,
    "binary.linear bits": lambda b: binary.linear(b, SIGN_SCALES, BINARY),
    "binary.linear x_scales": lambda b: binary.linear(SIGNS, b, BINARY),
    "binary.linear weight": lambda b: binary.linear(SIGNS, SIGN_SCALES, b),
    "QuantLinear x": lnn.QuantLinear.from_linear(DENSE, "nf4"),
    "QuantLinear with outliers x": lnn.QuantLinear.from_linear(DENSE, "int3_g64_o4"),
    "QuantLinear static x": STATIC,
    "QuantLinear.from_quant_tensor weight": lnn.QuantLinear.from_quant_tensor,
    "QuantLinear.from_quant_tensor bias": lambda b: lnn.QuantLinear.from_quant_tensor(NF4, b),
    "QuantEmbedding indices": lnn.QuantEmbedding.from_quant_tensor(NF4),
    "QuantConv2d x": lnn.QuantConv2d.from_conv(nn.Conv2d(4, 5, 3), "nf4_row"),
    "LLMInt8Linear x": lnn.LLMInt8Linear.from_linear(DENSE),
    "BinaryLinear x": lnn.BinaryLinear.from_linear(DENSE, "binary_row"),
    "FP8Linear x": lnn.FP8Linear(K, N),
    "FP8RMSNorm x": lnn.FP8RMSNorm(K),
    "FP8LayerNorm x": lnn.FP8LayerNorm(K),
    "fp8_silu x": lnn.fp8_silu,
    "fp8_gelu x": lnn.fp8_gelu,
    "fp8_mul x": lambda b: lnn.fp8_mul(b, X),
    "fp8_mul y": lambda b: lnn.fp8_mul(X, b),
    "fp8_add x": lambda b: lnn.fp8_add(b, X),
    "fp8_add y": lambda b: lnn.fp8_add(X, b),
    "FakeQuantLinear x": qat.FakeQuantLinear.from_linear(DENSE, qat.Spec("nf4")),
    "InputStatistics x": lambda b: InputStatistics(K).update(b),
    "Observer x": lambda b: OBSERVERS["minmax"]().update(b),
}


@pytest.mark.parametrize(
    "value", ([[1.0] * K], 1.0, np.ones((3, K), np.float32)), ids=("list", "float", "array")
)
@pytest.mark.parametrize("call", CALLS)
def test_the_argument_is_named(call: str, value: object) -> None:
    kind = type(value).__name__
    with pytest.raises(TypeError, match=rf"{call.split()[-1]} must be a .*, got {kind}$"):
        CALLS[call](value)


def test_steps_of_activations_that_saw_only_zeros() -> None:
    quantizer = qat.LSQActivation(4)
    with pytest.raises(ValueError, match="no batch was seen in training mode; run one"):
        quantizer.eval()(torch.ones(2, 3))
    quantizer.train()
    for _ in range(3):
        assert torch.equal(quantizer(torch.zeros(2, 3)), torch.zeros(2, 3))
    with pytest.raises(ValueError, match="the 3 batches seen in training mode held only zeros"):
        quantizer.eval()(torch.ones(2, 3))
    quantizer.train()(torch.ones(2, 3))
    assert bool(quantizer.started)
    quantizer.eval()(torch.ones(2, 3))
