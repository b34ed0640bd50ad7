"""The backend of the "k16" layout: launches the Triton kernels of `lowbit.triton_kernels`. No maths and no checks.

Products with int8 activations and with signs have no kernel here: the base composes them.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from lowbit.backends.base import Backend, compute_dtype, num_sms
from lowbit.backends.triton.launch import (
    add_splits,
    empty,
    interpreted,
    kernels,
    on_device,
    readable,
)
from lowbit.formats import INTEGER_SCALES, Format
from lowbit.layouts import Operands
from lowbit.reference import dynamic_map
from lowbit.strides import contiguous


def meaning(format: Format) -> dict[str, Any]:
    """What a format says to the kernels, as their constants."""
    c = kernels().codecs
    affine = format.codec == "affine"
    zeros = {None: c.ZERO_NONE, "int": c.ZERO_INT, "float": c.ZERO_FLOAT, "min": c.ZERO_MIN}
    scopes = {
        "tensor": c.TABLE_SHARED,
        "row": c.TABLE_ROW,
        "group": c.TABLE_GROUP,
        "pair": c.TABLE_PAIR,
    }
    kinds: dict[str | None, Any] = {
        None: c.SCALE_NONE,
        "e4m3": c.SCALE_E4M3,
        "e8m0": c.SCALE_E8M0,
        "dq8": c.SCALE_DQ8,
        "int7": c.SCALE_INT7,
        "uint4": c.SCALE_UINT4,
        "int6": c.SCALE_INT6,
    }
    seconds: dict[str | None, Any] = {
        "e4m3": c.SECOND_ONE,
        **dict.fromkeys(INTEGER_SCALES, c.SECOND_ROW),
    }
    return {
        "BITS": format.bits,
        "CODEC": (c.AFFINE if affine else c.LUT).value,
        "OFFSET": 2 ** (format.bits - 1) if affine and format.zero is None else 0,
        "ZERO": zeros[format.zero].value,
        "SCOPE": scopes[format.table_scope].value,
        "SCALE": kinds.get(format.scale, c.SCALE_NUMBER).value,
        "SECOND": seconds.get(format.scale, c.SECOND_NONE).value,
    }


def _super_groups(format: Format, k: int) -> int:
    """Groups that share a second level."""
    if format.scale2_group is None or format.group is None:
        return format.num_groups(k)
    return format.scale2_group // format.group


def _given(w: Operands, *others: Tensor | None) -> list[Tensor]:
    """Operands for a launch: one that the format lacks is never read, and the codes stand for it."""
    scale_map = _dynamic_map(w.codes.device) if w.format.scale == "dq8" else None
    return [contiguous(w.codes if t is None else t) for t in (*w.tensors, scale_map, *others)]


@functools.cache
def _dynamic_map(device: torch.device) -> Tensor:
    return dynamic_map(device)


class TritonBackend(Backend):
    """The Triton kernels."""

    name = "triton"

    def describe(
        self, format: Format, n: int, k: int, m: int, x: torch.dtype, device: torch.device
    ) -> str:
        """The tile and the number of splits."""
        c = kernels().configs.choose(m, n, k, format.group or k, num_sms(device))
        return f"triton_linear_{c.block_m}x{c.block_n}x{16 * c.chunks}_split{c.splits}"

    def linear(
        self,
        x: Tensor,
        w: Operands,
        bias: Tensor | None,
        dtype: torch.dtype | None = None,
        config: Any = None,
    ) -> Tensor:
        """x W^T + bias with fp32 sums, rounded once; `config` overrides the tile."""
        m, n, k, format, dtype = x.shape[0], w.n, w.k, w.format, dtype or x.dtype
        if format.activation is not None:
            return self.activation_linear(x, w, bias).to(dtype)
        out = empty((m, n), dtype, x.device)
        if out.numel() == 0:
            return out.to(dtype)
        compute = compute_dtype(x.dtype, format)
        x = readable(x)
        package = kernels()
        group, groups = format.group or k, format.num_groups(k)
        c = config or package.configs.choose(m, n, k, group, num_sms(x.device))
        parts = out
        if c.splits > 1:
            parts = torch.empty((c.splits, m, n), dtype=torch.float32, device=x.device)
        with on_device(x.device):
            package.linear.linear_kernel[(-(-n // c.block_n), -(-m // c.block_m), c.splits)](
                x,
                *_given(w, bias),
                parts,
                m,
                n,
                k,
                x.stride(0),
                x.stride(1),
                group,
                groups,
                _super_groups(format, k),
                c.chunks_per_split,
                **meaning(format),
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
                enable_fp_fusion=False,  # scale * value + zero rounds twice, as the reference does
            )
        if c.splits > 1:
            add_splits(parts, bias, out)
        return out.to(dtype)

    def rows(self, indices: Tensor | None, w: Operands, dtype: torch.dtype) -> Tensor:
        """Rows of the weight; only these are decoded."""
        m, device = w.n if indices is None else indices.numel(), w.codes.device
        out = empty((m, w.k), dtype, device)
        if m == 0:
            return out.to(dtype)
        package = kernels()
        block, chunks = 32, package.configs.MOST_CHUNKS
        steps = -(-w.k // (package.configs.CHUNK * chunks))
        with on_device(device):
            package.dequantize.dequantize_kernel[(-(-m // block), steps)](
                w.codes if indices is None else contiguous(indices),
                *_given(w),
                out,
                m,
                w.n,
                w.k,
                w.format.group or w.k,
                w.format.num_groups(w.k),
                _super_groups(w.format, w.k),
                **meaning(w.format),
                GATHERS=indices is not None,
                BLOCK_M=block,
                CHUNKS=chunks,
                enable_fp_fusion=False,
            )
        return out.to(dtype)


TRITON = TritonBackend()
