"""The backend of the "k16" layout: launches the Triton kernels of `lowbit.triton_kernels`. No maths and no checks.

Runs on CUDA tensors, and on CPU tensors under Triton's interpreter (TRITON_INTERPRET=1 before the first import).
Products with int8 activations and with signs have no kernel here: the plain backend computes them.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import math
from contextlib import AbstractContextManager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lowbit.backends import reference as plain
from lowbit.backends.packed import Derived
from lowbit.formats import Format
from lowbit.layouts import K16
from lowbit.strides import contiguous

_FP16_MAX = 65504
# Programs of the interpreter run one after another: as many as one multiprocessor would hold.
_INTERPRETED_SMS = 1


@functools.cache
def kernels() -> ModuleType:
    """The package of kernels, imported when it is first needed.

    Raises:
        ImportError: triton is not installed.
    """
    return importlib.import_module("lowbit.triton_kernels")


@functools.cache
def num_sms(device: torch.device) -> int:
    """Multiprocessors of a device."""
    if device.type != "cuda":
        return _INTERPRETED_SMS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def interpreted(device: torch.device) -> bool:
    """Whether Triton's interpreter runs the kernels. It cuts bf16 off, so it reads and stores fp32."""
    return device.type == "cpu"


def stored(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What kernels store where a result of `dtype` is wanted."""
    return torch.float32 if interpreted(device) else dtype


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on torch's current device."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def compute_dtype(x: torch.dtype, format: Format) -> torch.dtype:
    """What x and the table are multiplied in: the dtype of x, or fp32 where fp16 cannot hold the table."""
    values = () if format.codec == "affine" else format.values() or ()
    fits = all(abs(v) <= _FP16_MAX for v in values if math.isfinite(v))
    return x if x != torch.float16 or fits else torch.float32


def meaning(format: Format, scales: Tensor | None) -> dict[str, Any]:
    """What a format says to the kernels, as their constants."""
    c = kernels().codecs
    affine = format.codec == "affine"
    zeros = {None: c.ZERO_NONE, "int": c.ZERO_INT, "float": c.ZERO_FLOAT, "min": c.ZERO_MIN}
    scopes = {"tensor": c.TABLE_SHARED, "row": c.TABLE_ROW, "group": c.TABLE_GROUP}
    return {
        "BITS": format.bits,
        "CODEC": (c.AFFINE if affine else c.LUT).value,
        "OFFSET": 2 ** (format.bits - 1) if affine and format.zero is None else 0,
        "ZERO": zeros[format.zero].value,
        "SCOPE": scopes[format.table_scope].value,
        "HAS_SCALE": scales is not None,
    }


def _given(codes: Tensor, *others: Tensor | None) -> list[Tensor]:
    """Operands for a launch: one that the format lacks is never read, and some tensor stands for it."""
    return [contiguous(codes if t is None else t) for t in (codes, *others)]


def describe(format: Format, n: int, k: int, m: int, x: torch.dtype, device: torch.device) -> str:
    """The name of what `linear` runs for a format without int8 activations."""
    c = kernels().configs.choose(m, n, k, format.group or k, num_sms(device))
    return f"triton_linear_{c.block_m}x{c.block_n}x{16 * c.chunks}_split{c.splits}"


def linear(
    x: Tensor,  # (M, K)
    codes: Tensor,
    scales: Tensor | None,
    zeros: Tensor | None,
    table: Tensor | None,
    bias: Tensor | None,  # (N,)
    format: Format,
    n: int,
    k: int,
    dtype: torch.dtype | None = None,
    config: Any = None,
) -> Tensor:  # (M, N) in `dtype`, by default that of x
    """x W^T + bias with fp32 sums, rounded once; `config` overrides the tile."""
    m = x.shape[0]
    dtype = dtype or x.dtype
    if format.activation is not None:
        operands = (codes, scales, zeros, table)
        return _derived.activation_linear(x, *operands, bias, format, n, k).to(dtype)
    out = torch.empty((m, n), dtype=stored(dtype, x.device), device=x.device)
    if out.numel() == 0:
        return out.to(dtype)
    compute = compute_dtype(x.dtype, format)
    if interpreted(x.device):
        x = x.float()
    package = kernels()
    group, groups = format.group or k, format.num_groups(k)
    c = config or package.configs.choose(m, n, k, group, num_sms(x.device))
    parts = out
    if c.splits > 1:
        parts = torch.empty((c.splits, m, n), dtype=torch.float32, device=x.device)
    with on_device(x.device):
        package.linear.linear_kernel[(-(-n // c.block_n), -(-m // c.block_m), c.splits)](
            x,
            *_given(codes, scales, zeros, table, bias),
            parts,
            m,
            n,
            k,
            x.stride(0),
            x.stride(1),
            group,
            groups,
            c.chunks_per_split,
            **meaning(format, scales),
            HAS_BIAS=bias is not None,
            APART=c.apart,
            WHOLE=groups == 1 and format.zero != "min",
            COMPUTE=package.TYPES[compute],
            BLOCK_M=c.block_m,
            BLOCK_N=c.block_n,
            CHUNKS=c.chunks,
            SPLITS=c.splits,
            WIDENS=interpreted(x.device),
            num_warps=c.warps,
            num_stages=c.stages,
            enable_fp_fusion=False,  # scale * value + zero rounds twice, as reference.py does
        )
    if c.splits > 1:
        add_splits(parts, bias, out)
    return out.to(dtype)


def add_splits(parts: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """out (M, N) = the sum of parts (splits, M, N) in fp32, in order, + bias (N,)."""
    splits, m, n = parts.shape
    block = 256
    with on_device(parts.device):
        kernels().linear.add_splits_kernel[(-(-m * n // block),)](
            parts,
            parts if bias is None else contiguous(bias),
            out,
            m * n,
            n,
            SPLITS=splits,
            HAS_BIAS=bias is not None,
            BLOCK=block,
            enable_fp_fusion=False,
        )


def _rows(
    indices: Tensor | None,
    codes: Tensor,
    scales: Tensor | None,
    zeros: Tensor | None,
    table: Tensor | None,
    format: Format,
    n: int,
    k: int,
    dtype: torch.dtype,
) -> Tensor:
    m = n if indices is None else indices.numel()
    out = torch.empty((m, k), dtype=stored(dtype, codes.device), device=codes.device)
    if m == 0:
        return out.to(dtype)
    package = kernels()
    block, chunks = 32, package.configs.MOST_CHUNKS
    steps = -(-k // (package.configs.CHUNK * chunks))
    with on_device(codes.device):
        package.dequantize.dequantize_kernel[(-(-m // block), steps)](
            codes if indices is None else contiguous(indices),
            *_given(codes, scales, zeros, table),
            out,
            m,
            n,
            k,
            format.group or k,
            format.num_groups(k),
            **meaning(format, scales),
            GATHERS=indices is not None,
            BLOCK_M=block,
            CHUNKS=chunks,
            enable_fp_fusion=False,
        )
    return out.to(dtype)


_derived = Derived(K16, linear, _rows)
linear_epilogue = _derived.linear_epilogue
linear_added = _derived.linear_added
linear_many = _derived.linear_many
dequantize = _derived.dequantize
embedding = _derived.embedding
int8_linear = _derived.int8_linear
binary_linear = _derived.binary_linear
outlier_product = plain.outlier_product
outliers_row = plain.outliers_row
