"""The backend of the "m16" layout: launches the CUDA kernels of `lowbit._cuda`. No maths and no checks.

bf16 and fp16 x multiply with the packed weight up to the M where a copy decoded to their dtype and torch's product are
faster; fp32 x, which has no tensor cores, always takes a decoded copy in fp32. Products with int8 activations and with
signs run in plain torch. Infinity in x gives NaN where zeros are floats: their sums are kept apart.
"""

from __future__ import annotations

import functools
import logging
from typing import TYPE_CHECKING, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from lowbit.backends import available
from lowbit.backends.base import Backend, compute_dtype, num_sms
from lowbit.formats import Format
from lowbit.layouts import LAYOUTS, M16, Operands, group_terms
from lowbit.layouts.m16 import TILE_K, TILE_N, num_words, unpack_fragments
from lowbit.strides import address, address_of_rows

if TYPE_CHECKING:
    from lowbit._cuda import Weight

# (family, x tiles of 8 rows in a block, parts of K, stages of a part, bytes of shared memory, stages in the ring,
# whether a warp of its own fills it)
Config: TypeAlias = tuple[str, int, int, int, int, int, bool]
_TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int8: "int8",
}
# Of a decoded weight at once, and its rows: a copy of 8192 x 8192 in fp32, or in slices that fill torch's tiles.
_DECODED_BYTES, _DECODED_ROWS = 1 << 28, 256
_logger = logging.getLogger("lowbit")


@functools.lru_cache(maxsize=4096)
def weight(
    format: Format, n: int, k: int, scales: torch.dtype | None, zeros: torch.dtype | None
) -> Weight:
    """What the extension knows of a weight besides its tensors."""
    from lowbit import _cuda

    return _cuda.Weight(
        n,
        k,
        format.group or max(1, k),
        format.bits,
        format.zero,
        None if scales is None else _TYPES[scales],
        None if zeros is None else _TYPES[zeros],
    )


def _given(w: Operands) -> Weight:
    """`weight` of operands."""
    scales, zeros = (None if t is None else t.dtype for t in (w.scales, w.zeros))
    return weight(w.format, w.n, w.k, scales, zeros)


def _machine(device: torch.device) -> tuple[int, int, int]:
    """The architecture of a GPU, that of the code which runs there, and its multiprocessors."""
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor, available.cuda_code(device), num_sms(device)


@functools.lru_cache(maxsize=4096)
def _choose(w: Weight, m: int, device: torch.device) -> Config:
    return w.choose(m, *_machine(device))


def candidates(w: Operands, m: int) -> list[Config]:
    """All the ways in which the kernels multiply m rows of x, for benchmarks."""
    return _given(w).candidates(m, *_machine(w.codes.device))


def multiplies(x: torch.dtype, format: Format) -> bool:
    """Whether tensor cores multiply x with the format's table."""
    return x != torch.float32 and compute_dtype(x, format) == x


def _decoded_to(x: torch.dtype, format: Format) -> torch.dtype:
    """What torch multiplies x and a decoded copy in."""
    return x if multiplies(x, format) else torch.float32


def _described(format: Format, n: int, k: int) -> Weight:
    """`weight` of operands as the format has them."""
    specs = LAYOUTS[M16].specs(format, n, k)
    scales, zeros = (specs[t][1] if t in specs else None for t in ("scales", "zeros"))
    return weight(format, n, k, scales, zeros)


class CudaBackend(Backend):
    """The CUDA kernels."""

    name = "cuda"

    def describe(
        self, format: Format, n: int, k: int, m: int, x: torch.dtype, device: torch.device
    ) -> str:
        """The family of the kernel, its rows of x and its splits."""
        family, tiles, splits, *_ = _choose(_described(format, n, k), max(1, m), device)
        if not multiplies(x, format):
            return f"cuda_dequantize, torch in {_TYPES[_decoded_to(x, format)]}"
        return {
            "mma": f"cuda_mma_{8 * tiles}_split{splits}",
            "wgmma": f"cuda_wgmma_{8 * tiles}_split{splits}",
            "decode": f"cuda_dequantize, torch in {_TYPES[x]}",
        }[family]

    def temporary(
        self, format: Format, n: int, k: int, m: int, x: torch.dtype, device: torch.device
    ) -> int:
        """The decoded copy and x in its dtype, or the parts of K, sums of x for float zeros and x padded."""
        known = _described(format, n, k)
        family, _, splits, *_ = _choose(known, max(1, m), device)
        if family == "decode" or not multiplies(x, format):
            compute = _decoded_to(x, format)
            rows = max((part.stop - part.start for part in slices(n, k, compute)), default=0)
            return (rows * k + (m * k if compute != x else 0)) * compute.itemsize
        padded = m * (k + -k % TILE_K) * x.itemsize if k % TILE_K else 0
        sums = known.num_groups * m * 4 if known.float_zero else 0
        return padded + sums + (splits * m * n * 4 if splits > 1 else 0)

    def linear(
        self,
        x: Tensor,
        w: Operands,
        bias: Tensor | None,
        dtype: torch.dtype | None = None,
        config: Config | None = None,
    ) -> Tensor:
        """x W^T + bias with fp32 sums, rounded once; `config`, one of `candidates`, overrides the choice."""
        m, n, k, format, dtype = x.shape[0], w.n, w.k, w.format, dtype or x.dtype
        if format.activation is not None:
            return self.activation_linear(x, w, bias).to(dtype)
        known = _given(w)
        if m == 0 or n == 0 or k == 0:
            zeros_out = x.new_zeros((m, n), dtype=dtype)
            return zeros_out if bias is None else zeros_out + bias.to(dtype)
        config = config or _choose(known, m, x.device)
        if config[0] == "decode" or not multiplies(x.dtype, format):
            _log_decode(x.dtype, config[0] == "decode")
            return self._decoded_linear(x.to(_decoded_to(x.dtype, format)), w, bias, dtype)
        if k % TILE_K:
            x = F.pad(x, (0, -k % TILE_K))
        elif not _readable(x):
            x = x.clone(memory_format=torch.contiguous_format)
        out = torch.empty((m, n), dtype=dtype, device=x.device)
        splits = config[2]
        parts = x.new_empty((splits, m, n), dtype=torch.float32) if splits > 1 else None
        sums = x.new_empty((known.num_groups, m), dtype=torch.float32) if known.float_zero else None
        device = x.device.index or 0
        with torch.cuda.device(x.device):
            known.linear(
                device,
                torch.cuda.current_stream(x.device).cuda_stream,
                config,
                _TYPES[x.dtype],
                m,
                *address_of_rows(x),
                address(w.codes),
                address(w.scales),
                address(w.zeros),
                address(w.table),
                address(sums),
                address(bias),
                "fp32" if bias is None else _TYPES[bias.dtype],
                address(out),
                _TYPES[dtype],
                address(parts),
            )
        return out

    def _decoded_linear(
        self, x: Tensor, w: Operands, bias: Tensor | None, dtype: torch.dtype
    ) -> Tensor:  # (M, N) in `dtype`
        """The product with the weight decoded to the dtype of x, some of its rows at a time."""
        bias = None if bias is None else bias.to(x.dtype)
        parts = slices(w.n, w.k, x.dtype)
        if len(parts) == 1:
            return F.linear(x, self.rows(None, w, x.dtype), bias).to(dtype)
        y = torch.empty((x.shape[0], w.n), dtype=dtype, device=x.device)
        for part in parts:
            decoded, of_part = self.rows(None, part_of(w, part), x.dtype), y[:, part]
            if dtype != x.dtype:
                of_part.copy_(F.linear(x, decoded, None if bias is None else bias[part]))
            elif bias is None:
                torch.mm(x, decoded.t(), out=of_part)
            else:
                torch.addmm(bias[part], x, decoded.t(), out=of_part)
            del decoded  # before the next
        return y

    def _canonical(self, w: Operands) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """As in the base, but codes are unpacked once."""
        codes = unpack_fragments(w.codes, w.format.bits, w.n, w.k)
        table = w.table if w.format.fitted else None
        fitted = None if table is None else LAYOUTS[M16].unpack_table(table, w.format, w.n)
        return codes, *group_terms(w), fitted

    def rows(self, indices: Tensor | None, w: Operands, dtype: torch.dtype) -> Tensor:
        """Rows of the weight; only these are decoded."""
        rows, device = w.n if indices is None else indices.numel(), w.codes.device
        out = torch.empty((rows, w.k), dtype=dtype, device=device)
        with torch.cuda.device(device):
            _given(w).dequantize(
                device.index or 0,
                torch.cuda.current_stream(device).cuda_stream,
                rows,
                address(indices),
                address(w.codes),
                address(w.scales),
                address(w.zeros),
                address(w.table),
                address(out),
                _TYPES[dtype],
            )
        return out


CUDA = CudaBackend()


def slices(n: int, k: int, dtype: torch.dtype) -> list[slice]:
    """Rows of an (n, k) weight that are decoded at once, a multiple of what torch's product has in a tile."""
    count = max(1, -(-n * k * dtype.itemsize // _DECODED_BYTES))
    step = -(-n // count // _DECODED_ROWS) * _DECODED_ROWS
    return [slice(i, min(n, i + step)) for i in range(0, n, step)]


def part_of(w: Operands, rows: slice) -> Operands:
    """Rows of a weight as one of its own, without a copy; the first is a multiple of 16."""
    tiles = slice(rows.start // TILE_N, -(-rows.stop // TILE_N))
    row_words = num_words(w.format.bits, TILE_N, w.k)
    return w._replace(
        codes=w.codes[tiles.start * row_words : tiles.stop * row_words],
        scales=None if w.scales is None else w.scales[tiles],
        zeros=None if w.zeros is None else w.zeros[tiles],
        n=rows.stop - rows.start,
    )


def _readable(x: Tensor) -> bool:
    """Whether the kernels read x (M, K) as it lies: rows apart, as descriptions of tensors have them, and aligned."""
    apart = x.shape[0] == 1 or (x.stride(0) >= x.shape[1] and x.stride(0) % 8 == 0)
    return apart and x.stride(1) == 1 and x.data_ptr() % 16 == 0


@functools.cache
def _log_decode(dtype: torch.dtype, large: bool) -> None:
    why = "M is large" if large else f"tensor cores do not multiply {dtype} with this table"
    _logger.info("the weight is decoded and torch multiplies: %s", why)
