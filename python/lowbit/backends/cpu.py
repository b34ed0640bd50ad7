"""The backend of the "n16" layout: hands the addresses of CPU tensors to the compiled kernels.

No maths and no checks: `ops.py` has checked shapes and dtypes and laid the tensors out as `strides.py` says, which
refuses others. Output tensors are allocated here; the kernels write every element of them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from lowbit import _C
from lowbit.formats import Format, parse
from lowbit.layouts import LAYOUTS, N16
from lowbit.strides import address, address_of_rows, contiguous

# csrc/kernel.h Dtype; uint8 holds eight signs.
CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3, torch.uint8: 4}
_NAMES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int8: "int8",
    None: None,
}
# csrc/kernel.h Activation
ACTIVATIONS = {None: 0, "relu": 1, "silu": 2, "gelu": 3, "gelu_tanh": 4}
_ZERO_MODES = {None: "none", "int": "subtract", "float": "subtract", "min": "add"}

# Keyed by the identity of the format: its hash visits every field, which takes longer than a small call.
_weights: dict[tuple[object, ...], tuple[Format, _C.Weight]] = {}
_MAX_WEIGHTS = 4096


def weight(
    format: Format, n: int, k: int, scales: torch.dtype | None, zeros: torch.dtype | None
) -> _C.Weight:
    """What the kernels know of a weight apart from its bytes; one object per distinct request."""
    key = (id(format), n, k, scales, zeros)
    entry = _weights.get(key)
    if entry is not None and entry[0] is format:
        return entry[1]
    group = format.group or k
    made = _C.Weight(
        n=n,
        k=k,
        bits=format.bits,
        group=group,
        codec="int" if format.codec == "affine" else format.codec,
        column_table=format.table_scope != "tensor",
        table_groups=format.num_groups(k) if format.table_scope == "group" else 1,
        zero=_ZERO_MODES[format.zero],
        scale_dtype=_NAMES[scales],
        zero_dtype=_NAMES[zeros],
        int8_x=format.activation is not None,
        table_step=_table_step(format),
        bf16_table=format.exact_in_bf16,
    )
    if len(_weights) >= _MAX_WEIGHTS:
        _weights.clear()
    _weights[key] = (format, made)
    return made


def _table_step(format: Format) -> float:
    """What a table is divided by to be int8; 0 says the largest entry / 127."""
    return 0.0 if format.activation == "int8_table" else format.int8_step or 0.0


# Whether the compiled calls read tensors by themselves: from torch 2.10 on.
_C.use_tensor_class(torch.Tensor, torch.nn.Parameter)
linear_tensors, linear_many_tensors = _C.linear_tensors, _C.linear_many_tensors
kernels = _C.kernels
# The names of the kernels that ran since it was last called, and the threads that a call gets.
take_kernels_run, usable_threads = _C.take_kernels_run, _C.usable_threads


def reads(layout: str) -> bool:
    """Whether the kernels read a layout."""
    return layout == N16


@functools.lru_cache(_MAX_WEIGHTS)
def plan(spec: str, layout: str, n: int, k: int) -> object | None:
    """The first argument of `linear_tensors`, for operands whose dtypes are those of the format; None, which makes it
    return None, for a layout or a shape that no kernel takes.
    """
    if not reads(layout):
        return None
    format = parse(spec)
    if format.outliers or not (0 < n < 2**31 and 0 < k < 2**31):
        return None
    specs = LAYOUTS[N16].specs(format, n, k)
    scales, zeros = (specs[t][1] if t in specs else None for t in ("scales", "zeros"))
    return _C.plan(weight(format, n, k, scales, zeros))


def _operands(
    codes: Tensor,
    scales: Tensor | None,
    zeros: Tensor | None,
    table: Tensor,
    format: Format,
    n: int,
    k: int,
) -> tuple[_C.Weight, tuple[int, int, int, int]]:
    scale_dtype = None if scales is None else scales.dtype
    zero_dtype = None if zeros is None else zeros.dtype
    addresses = (address(codes), address(scales), address(zeros), address(table))
    return weight(format, n, k, scale_dtype, zero_dtype), addresses


def linear(
    x: Tensor,  # (M, K), unit stride along K
    codes: Tensor,
    scales: Tensor | None,
    zeros: Tensor | None,
    table: Tensor,
    bias: Tensor | None,  # (N,) contiguous
    format: Format,
    n: int,
    k: int,
    kernel: int = -1,
) -> Tensor:  # (M, N), dtype of x
    """x W^T + bias: the activations as given, fp32 sums, rounded once.

    `kernel` is an index of `_C.kernels()` that must serve the request; -1 chooses by cost.
    """
    m = x.shape[0]
    out = torch.empty((m, n), dtype=x.dtype, device="cpu")
    x_address, x_stride = address_of_rows(x)
    w, addresses = _operands(codes, scales, zeros, table, format, n, k)
    w.linear_ptr(
        x_address,
        CODES[x.dtype],
        m,
        x_stride,
        *addresses,
        address(bias),
        0 if bias is None else CODES[bias.dtype],
        address(out),
        torch.get_num_threads(),
        kernel,
    )
    return out


def linear_epilogue(
    x: Tensor,  # (M, K), unit stride along K
    codes: Tensor,
    scales: Tensor | None,
    zeros: Tensor | None,
    table: Tensor,
    bias: Tensor | None,  # (N,) contiguous
    format: Format,
    n: int,
    k: int,
    activation: str | None,
    gate: Tensor | None,  # (M, N), unit stride along N
    residual: Tensor | None,  # (M, N), unit stride along N, dtype of the gate if there is one
    dtype: torch.dtype | None = None,
) -> Tensor:  # (M, N) in `dtype`, by default that of x
    """activation(x W^T + bias) + residual, or activation(gate) * (x W^T + bias) + residual, rounded once."""
    m = x.shape[0]
    out = torch.empty((m, n), dtype=dtype or x.dtype, device="cpu")
    gate_address, gate_stride = address_of_rows(gate)
    residual_address, residual_stride = address_of_rows(residual)
    others = next((t.dtype for t in (gate, residual) if t is not None), x.dtype)
    x_address, x_stride = address_of_rows(x)
    w, addresses = _operands(codes, scales, zeros, table, format, n, k)
    w.linear_epilogue_ptr(
        x_address,
        CODES[x.dtype],
        m,
        x_stride,
        *addresses,
        address(bias),
        0 if bias is None else CODES[bias.dtype],
        address(out),
        CODES[out.dtype],
        torch.get_num_threads(),
        -1,
        ACTIVATIONS[activation],
        gate_address,
        gate_stride,
        residual_address,
        residual_stride,
        CODES[others],
    )
    return out


def linear_added(
    x: Tensor,  # (M, K), unit stride along K
    codes: Tensor,
    scales: Tensor | None,
    zeros: Tensor | None,
    table: Tensor,
    bias: Tensor | None,  # (N,) contiguous
    format: Format,
    n: int,
    k: int,
    added: Tensor,  # (M, N) fp32, unit stride along N
    dtype: torch.dtype,
) -> Tensor:  # (M, N) in `dtype`
    """x W^T + bias + added, rounded once."""
    operands = (codes, scales, zeros, table)
    return linear_epilogue(x, *operands, bias, format, n, k, None, None, added, dtype)


def outlier_product(
    x: Tensor,  # (M, K), unit stride along K
    columns: Tensor,  # (N, P) int32 contiguous
    values: Tensor,  # (N, P) fp16 or fp32 contiguous
    isa: str = "",
) -> Tensor:  # (M, N) fp32
    """`reference.outlier_product` of x in fp32; `isa` caps the instruction set as LOWBIT_ISA does."""
    (m, k), (n, count) = x.shape, columns.shape
    out = torch.empty((m, n), dtype=torch.float32, device="cpu")
    x_address, x_stride = address_of_rows(x)
    _C.multiply_outliers_ptr(
        x_address,
        CODES[x.dtype],
        m,
        k,
        x_stride,
        address(columns),
        address(values),
        CODES[values.dtype],
        n,
        count,
        address(out),
        torch.get_num_threads(),
        isa,
    )
    return out


def linear_many(
    x: Tensor,  # (M, K), unit stride along K
    weights: list[tuple[Tensor, Tensor | None, Tensor | None, Tensor]],
    biases: list[Tensor | None],  # (N_i,) contiguous
    formats: list[Format],
    ns: list[int],
    k: int,
) -> list[Tensor]:  # (M, N_i), dtype of x
    """x W_i^T + bias_i in one parallel region, x converted once; each is bit for bit that of `linear`."""
    m = x.shape[0]
    outs, entries = [], []
    for operands, bias, format, n in zip(weights, biases, formats, ns, strict=True):
        out = torch.empty((m, n), dtype=x.dtype, device="cpu")
        w, addresses = _operands(*operands, format, n, k)
        bias_dtype = 0 if bias is None else CODES[bias.dtype]
        entries.append((w, *addresses, address(bias), bias_dtype, address(out)))
        outs.append(out)
    x_address, x_stride = address_of_rows(x)
    threads = torch.get_num_threads()
    _C.linear_many_ptr(x_address, CODES[x.dtype], m, x_stride, entries, threads)
    return outs


def _linear_quantized(
    x: Tensor,  # (M, K) int8 or (M, ceil(K / 8)) uint8, unit stride along K
    x_scales: Tensor,
    operands: tuple[Tensor, Tensor | None, Tensor | None, Tensor],
    bias: Tensor | None,
    format: Format,
    n: int,
    k: int,
    dtype: torch.dtype,
    out_scale: float | None,
    kernel: int,
) -> Tensor:
    m = x.shape[0]
    out = torch.empty((m, n), dtype=dtype, device="cpu")
    x_address, x_stride = address_of_rows(x)
    w, addresses = _operands(*operands, format, n, k)
    w.linear_quantized_ptr(
        x_address,
        CODES[x.dtype],
        address(x_scales),
        x_scales.dim() == 2,
        m,
        x_stride,
        *addresses,
        address(bias),
        0 if bias is None else CODES[bias.dtype],
        address(out),
        CODES[dtype],
        1.0 if out_scale is None else out_scale,
        torch.get_num_threads(),
        kernel,
    )
    return out


def int8_linear(
    q: Tensor,  # (M, K) int8, unit stride along K
    x_scales: Tensor,  # (M,) or (M, groups) fp32 contiguous
    codes: Tensor,
    scales: Tensor | None,
    zeros: Tensor | None,
    table: Tensor,
    bias: Tensor | None,  # (N,) contiguous
    format: Format,
    n: int,
    k: int,
    dtype: torch.dtype,
    out_scale: float | None = None,
    kernel: int = -1,
) -> Tensor:  # (M, N) in `dtype`
    """`reference.int8_linear`, rounded once to `dtype`, or divided by out_scale for int8."""
    operands = (codes, scales, zeros, table)
    return _linear_quantized(q, x_scales, operands, bias, format, n, k, dtype, out_scale, kernel)


def binary_linear(
    bits: Tensor,  # (M, ceil(K / 8)) uint8, unit stride along K
    x_scales: Tensor,  # (M,) fp32 contiguous
    codes: Tensor,
    scales: Tensor | None,
    zeros: Tensor | None,
    table: Tensor,
    bias: Tensor | None,  # (N,) contiguous
    format: Format,
    n: int,
    k: int,
    dtype: torch.dtype,
    kernel: int = -1,
) -> Tensor:  # (M, N) in `dtype`
    """`reference.binary_linear`, rounded once to `dtype`."""
    operands = (codes, scales, zeros, table)
    return _linear_quantized(bits, x_scales, operands, bias, format, n, k, dtype, None, kernel)


def outliers_row() -> str:
    """What `explain` calls `outlier_product`."""
    active = _C.isa_active()
    return f"outliers_{next(isa for isa in ('avx512', 'avx2', 'scalar') if isa in active)}"


def int8_quantize(
    x: Tensor,  # (M, K), unit stride along K
    group: int | None,
    scale: Tensor | None,  # (M,) fp32 contiguous
) -> tuple[Tensor, Tensor]:
    """`reference.quantize_int8`."""
    m, k = x.shape
    shape = (m,) if group is None else (m, -(-k // group))
    scales = (
        torch.empty(shape, dtype=torch.float32, device="cpu") if scale is None else scale.clone()
    )
    q = torch.empty((m, k), dtype=torch.int8, device="cpu")
    x_address, x_stride = address_of_rows(x)
    _C.quantize_int8_ptr(
        x_address,
        CODES[x.dtype],
        m,
        k,
        x_stride,
        group or k,
        address(scales),
        scale is not None,
        address(q),
        torch.get_num_threads(),
    )
    return q, scales


def binary_quantize(
    x: Tensor,  # (M, K), unit stride along K
) -> tuple[Tensor, Tensor]:
    """`reference.quantize_binary`, the codes in canonical packing."""
    m, k = x.shape
    bits = torch.empty((m, -(-k // 8)), dtype=torch.uint8, device="cpu")
    scales = torch.empty(m, dtype=torch.float32, device="cpu")
    x_address, x_stride = address_of_rows(x)
    _C.quantize_binary_ptr(
        x_address,
        CODES[x.dtype],
        m,
        k,
        x_stride,
        address(scales),
        address(bits),
        torch.get_num_threads(),
    )
    return bits, scales


def bind_linear(
    x: Tensor,  # (M, K), unit stride along K
    codes: Tensor,
    scales: Tensor | None,
    zeros: Tensor | None,
    table: Tensor,
    bias: Tensor | None,  # (N,) contiguous
    out: Tensor,  # (M, N) contiguous, dtype of x
    format: Format,
    n: int,
    k: int,
) -> Callable[[], None]:
    """`linear` into `out` with its arguments made now, the number of threads too: 0.3 us a call instead of 3."""
    x_address, x_stride = address_of_rows(x)
    w, addresses = _operands(codes, scales, zeros, table, format, n, k)
    launch = w.linear_ptr
    arguments = (
        x_address,
        CODES[x.dtype],
        x.shape[0],
        x_stride,
        *addresses,
        address(bias),
        0 if bias is None else CODES[bias.dtype],
        address(out),
        torch.get_num_threads(),
        -1,
    )

    # The default keeps the memory alive for as long as there is a call that may use it.
    def call(kept: object = (x, codes, scales, zeros, table, bias, out)) -> None:
        launch(*arguments)

    return call


def dequantize(
    codes: Tensor,
    scales: Tensor | None,
    zeros: Tensor | None,
    table: Tensor,
    format: Format,
    n: int,
    k: int,
    dtype: torch.dtype,
    kernel: int = -1,
) -> Tensor:  # (N, K)
    """The weight in fp32, rounded once to `dtype`."""
    out = torch.empty((n, k), dtype=dtype, device="cpu")
    w, addresses = _operands(codes, scales, zeros, table, format, n, k)
    w.dequantize_ptr(*addresses, address(out), CODES[dtype], torch.get_num_threads(), kernel)
    return out


def embedding(
    indices: Tensor,  # (M,) int64 contiguous, each in [0, N)
    codes: Tensor,
    scales: Tensor | None,
    zeros: Tensor | None,
    table: Tensor,
    format: Format,
    n: int,
    k: int,
    dtype: torch.dtype,
) -> Tensor:  # (M, K)
    """Rows of the dequantized weight; only these rows are decoded."""
    m = indices.shape[0]
    out = torch.empty((m, k), dtype=dtype, device="cpu")
    w, addresses = _operands(codes, scales, zeros, table, format, n, k)
    w.embedding_ptr(
        address(indices), m, *addresses, address(out), CODES[dtype], torch.get_num_threads()
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
