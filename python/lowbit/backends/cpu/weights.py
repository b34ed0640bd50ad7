"""The kernels of weights on the CPU: hands addresses of tensors to compiled code.

No maths and no checks: `ops/` has checked shapes and dtypes and laid the tensors out as `strides.py` says, which
refuses others. Output tensors are allocated here; the kernels write every element of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lowbit import _C
from lowbit.backends.cpu.requests import ACTIVATIONS, CODES, bound, of_bias, of_x
from lowbit.formats import Format
from lowbit.layouts import Operands
from lowbit.strides import address, address_of_rows, contiguous


def linear(
    x: Tensor,  # (M, K), unit stride along K
    w: Operands,
    bias: Tensor | None,  # (N,) contiguous
    dtype: torch.dtype | None = None,
    kernel: int = -1,
) -> Tensor:  # (M, N) in `dtype`, by default that of x
    """x W^T + bias: the activations as given, fp32 sums, rounded once.

    `kernel` is an index of `_C.kernels()` that must serve the request; -1 chooses by cost.
    """
    if dtype is not None and dtype != x.dtype:
        return _epilogue(x, w, bias, None, None, None, dtype)
    out = torch.empty((x.shape[0], w.n), dtype=x.dtype, device="cpu")
    bound(w).linear(
        **of_x(x), **of_bias(bias), out=address(out), threads=torch.get_num_threads(), kernel=kernel
    )
    return out


def linear_epilogue(
    x: Tensor,  # (M, K), unit stride along K
    w: Operands,
    bias: Tensor | None,  # (N,) contiguous
    gate: Tensor | None,  # (M, N), unit stride along N, dtype of x
    residual: Tensor | None,  # (M, N), unit stride along N, dtype of x
    added: Tensor | None,  # (M, N) fp32, unit stride along N; not with an activation or a gate
    activation: str | None,
) -> Tensor:  # (M, N), dtype of x
    """activation(x W^T + bias) + residual, or activation(gate) * (x W^T + bias) + residual, rounded once; x W^T + bias
    + added + residual in the one case.
    """
    if added is not None:
        residual = added if residual is None else added + residual
    return _epilogue(x, w, bias, gate, residual, activation, x.dtype)


def _epilogue(
    x: Tensor,
    w: Operands,
    bias: Tensor | None,
    gate: Tensor | None,
    residual: Tensor | None,  # dtype of the gate if there is one
    activation: str | None,
    dtype: torch.dtype,
) -> Tensor:
    out = torch.empty((x.shape[0], w.n), dtype=dtype, device="cpu")
    gate_address, gate_stride = address_of_rows(gate)
    residual_address, residual_stride = address_of_rows(residual)
    others = next((t.dtype for t in (gate, residual) if t is not None), x.dtype)
    bound(w).linear_epilogue(
        **of_x(x),
        **of_bias(bias),
        out=address(out),
        out_dtype=CODES[out.dtype],
        threads=torch.get_num_threads(),
        activation=ACTIVATIONS[activation],
        gate=gate_address,
        gate_stride=gate_stride,
        residual=residual_address,
        residual_stride=residual_stride,
        epilogue_dtype=CODES[others],
    )
    return out


def linear_many(
    x: Tensor,  # (M, K), unit stride along K
    weights: Sequence[Operands],
    biases: Sequence[Tensor | None],  # (N_i,) contiguous
) -> list[Tensor]:  # (M, N_i), dtype of x
    """x W_i^T + bias_i in one parallel region, x converted once; each is bit for bit that of `linear`."""
    outs, products = [], []
    for w, bias in zip(weights, biases, strict=True):
        out = torch.empty((x.shape[0], w.n), dtype=x.dtype, device="cpu")
        products.append(_C.Product(bound(w), **of_bias(bias), out=address(out)))
        outs.append(out)
    _C.linear_many(products, **of_x(x), threads=torch.get_num_threads())
    return outs


def bind_linear(
    x: Tensor,  # (M, K), unit stride along K
    w: Operands,
    bias: Tensor | None,  # (N,) contiguous
    out: Tensor,  # (M, N) contiguous, dtype of x
) -> Callable[[], None]:
    """`linear` into `out` with its arguments made now, the number of threads too: 0.3 us a call instead of 3."""
    launch = bound(w).bind_linear(
        **of_x(x), **of_bias(bias), out=address(out), threads=torch.get_num_threads()
    )

    # The default keeps the memory alive for as long as there is a call that may use it.
    def call(kept: object = (x, w, bias, out)) -> None:
        launch()

    return call


def dequantize(w: Operands, dtype: torch.dtype, kernel: int = -1) -> Tensor:  # (N, K)
    """The weight in fp32, rounded once to `dtype`."""
    out = torch.empty(w.shape, dtype=dtype, device="cpu")
    bound(w).dequantize(
        out=address(out), out_dtype=CODES[dtype], threads=torch.get_num_threads(), kernel=kernel
    )
    return out


def embedding(
    indices: Tensor,  # (M,) int64 contiguous, each in [0, N)
    w: Operands,
    dtype: torch.dtype,
) -> Tensor:  # (M, K)
    """Rows of the dequantized weight; only these rows are decoded."""
    out = torch.empty((indices.shape[0], w.k), dtype=dtype, device="cpu")
    bound(w).embedding(
        indices=address(indices),
        count=indices.shape[0],
        out=address(out),
        out_dtype=CODES[dtype],
        threads=torch.get_num_threads(),
    )
    return out


def pack(codes: Tensor, format: Format) -> Tensor:
    """Canonical packing: (N, K) uint8 to (N, row bytes) uint8."""
    plain = contiguous(codes).numpy()
    packed = _C.pack(plain, format.bits, format.base, torch.get_num_threads())
    return torch.from_numpy(packed)


def unpack(packed: Tensor, format: Format, k: int) -> Tensor:
    """Inverse of `pack`."""
    stream = contiguous(packed).numpy()
    codes = _C.unpack(stream, k, format.bits, format.base, torch.get_num_threads())
    return torch.from_numpy(codes)
