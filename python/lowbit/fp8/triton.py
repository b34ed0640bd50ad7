"""Launches the Triton kernels of FP8, on CUDA tensors or under Triton's interpreter. No maths and no checks."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lowbit.backends.triton.launch import interpreted, kernels, on_device, stored
from lowbit.fp8.dtypes import E8M0, FLOAT8
from lowbit.fp8.granularity import Granularity
from lowbit.strides import contiguous

_LONGEST_ROW = 4096  # a tile holds whole rows up to here, which are then read once
_TILE_ELEMENTS = 4096
_SIDE = 64  # of a tile that is written transposed as well


class _Tile(NamedTuple):
    """Rows and columns of a block and of a program's tile, which holds whole blocks."""

    block_rows: int
    block_k: int
    rows: int
    k: int

    @property
    def constants(self) -> dict[str, int]:
        return {
            "BLOCK_ROWS": self.block_rows,
            "BLOCK_K": self.block_k,
            "TILE_ROWS": self.rows,
            "TILE_K": self.k,
        }

    @property
    def warps(self) -> int:
        return 8 if self.rows * self.k > _TILE_ELEMENTS else 4

    def grid(self, rows: int, k: int) -> tuple[int, int]:
        return -(-rows // self.rows), -(-k // self.k)


def _power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def _tile(granularity: Granularity, k: int, transposed: bool) -> _Tile:
    if granularity.rows == 128:
        return _Tile(128, 128, 128, 128)
    block_k = granularity.columns
    if block_k is None:
        row = _power_of_two(k)
        if granularity.rows == 1 and row <= _LONGEST_ROW:
            return _Tile(1, row, max(1, _TILE_ELEMENTS // row), row)
        width = min(row, _SIDE if transposed else 1024)
        return _Tile(1, width, _TILE_ELEMENTS // width, width)
    width = max(block_k, _SIDE if transposed else min(256, _power_of_two(k)))
    return _Tile(1, block_k, _TILE_ELEMENTS // width, width)


def _readable(x: Tensor) -> Tensor:
    return x.float() if interpreted(x.device) else x


def _scale_bytes(scale: Tensor) -> tuple[int, Tensor]:
    """The number by which the kernels know the dtype of the scales, and the scales as they write them."""
    k = kernels().fp8_quantize
    if scale.dtype == E8M0:
        return k.SCALE_E8M0.value, scale.view(torch.uint8)
    if scale.dtype == torch.bfloat16:
        return k.SCALE_BF16.value, scale.view(torch.int16)
    return k.SCALE_F32.value, scale


def _type(dtype: torch.dtype) -> dict[str, int]:
    return {"MANTISSA": FLOAT8[dtype].mantissa, "BIAS": FLOAT8[dtype].bias}


def absmax(x: Tensor, granularity: Granularity) -> Tensor:  # (R, K) float to fp32 of scale_shape
    """`reference.absmax` of at least one element."""
    rows, k = x.shape
    tile = _tile(granularity, k, False)
    columns = -(-k // tile.block_k)
    x = _readable(x)
    out = torch.empty((-(-rows // tile.block_rows), columns), dtype=torch.float32, device=x.device)
    with on_device(x.device):
        kernels().fp8_quantize.maxima_kernel[tile.grid(rows, k)](
            x,
            out.view(torch.int32),
            rows,
            k,
            x.stride(0),
            x.stride(1),
            columns,
            **tile.constants,
            num_warps=tile.warps,
        )
    if granularity.rows is None:
        return out.amax()
    return out.amax(1, keepdim=True) if granularity.columns is None else out


def quantize(
    x: Tensor,  # (R, K) float
    dtype: torch.dtype,
    granularity: Granularity,
    scale_dtype: torch.dtype,
    transposed: bool = False,
    seed: int | None = None,
    maxima: Tensor | None = None,  # fp32 of scale_shape, contiguous
) -> tuple[Tensor, Tensor, Tensor | None]:  # (R, K), scales, (K, R) if transposed
    """`reference.quantize` of at least one element."""
    rows, k = x.shape
    tile = _tile(granularity, k, transposed)
    one_column = granularity.columns is None
    whole = granularity.rows is not None and not (one_column and tile.k < k)
    if maxima is None and not whole:
        maxima = absmax(x, granularity)
    q = torch.empty((rows, k), dtype=dtype, device=x.device)
    q_t = torch.empty((k, rows), dtype=dtype, device=x.device) if transposed else None
    shape = granularity.scale_shape(rows, k)
    scale = torch.empty(shape, dtype=scale_dtype, device=x.device)
    name, stored_scale = _scale_bytes(scale)
    x, f = _readable(x), FLOAT8[dtype]
    with on_device(x.device):
        kernels().fp8_quantize.quantize_kernel[tile.grid(rows, k)](
            x,
            x if maxima is None else contiguous(maxima).view(torch.int32),
            stored_scale,
            q.view(torch.uint8),
            (q if q_t is None else q_t).view(torch.uint8),
            rows,
            k,
            x.stride(0),
            x.stride(1),
            shape[1] if shape else 0,
            _signed(seed or 0),
            _signed((seed or 0) >> 32),
            **_type(dtype),
            MAX=f.max,
            EMAX=f.emax,
            TOP=f.max_code,
            SCALE=name,
            ONE_COLUMN=one_column,
            HAS_MAXIMA=maxima is not None,
            STOCHASTIC=seed is not None,
            TRANSPOSED=transposed,
            **tile.constants,
            num_warps=tile.warps,
            enable_fp_fusion=False,
        )
    return q, scale, q_t


def _signed(word: int) -> int:
    """The low 32 bits as an int32."""
    return (word + (1 << 31) & 0xFFFFFFFF) - (1 << 31)


def dequantize(
    q: Tensor,  # (R, K) contiguous
    scale: Tensor,  # contiguous
    granularity: Granularity,
    dtype: torch.dtype,
) -> Tensor:  # (R, K) in `dtype`
    """`reference.dequantize` of at least one element."""
    rows, k = q.shape
    shape = granularity.scale_shape(rows, k)
    out = torch.empty((rows, k), dtype=stored(dtype, q.device), device=q.device)
    name = _scale_bytes(scale)[0]
    values = scale.view(torch.uint8) if scale.dtype == E8M0 else _readable(scale)
    tile = _Tile(1, 1, 16, 256)
    with on_device(q.device):
        kernels().fp8_quantize.dequantize_kernel[tile.grid(rows, k)](
            contiguous(q).view(torch.uint8),
            contiguous(values),
            out,
            rows,
            k,
            *granularity.block(rows, k),
            shape[1] if shape else 0,
            **_type(q.dtype),
            MAX_CODE=FLOAT8[q.dtype].max_code,
            SCALE=name,
            TILE_ROWS=tile.rows,
            TILE_K=tile.k,
            enable_fp_fusion=False,
        )
    return out.to(dtype)


def cast(x: Tensor, dtype: torch.dtype, saturate: bool) -> Tensor:  # contiguous float
    """`reference.cast` of at least one element."""
    q = torch.empty(x.shape, dtype=dtype, device=x.device)
    f, block = FLOAT8[dtype], 4096
    with on_device(x.device):
        kernels().fp8_quantize.cast_kernel[(-(-x.numel() // block),)](
            contiguous(_readable(x)),
            q.view(torch.uint8),
            x.numel(),
            **_type(dtype),
            TOP=f.max_code if saturate else f.overflow_code,
            BLOCK=block,
        )
    return q
