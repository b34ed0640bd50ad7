"""Backend: what a device does with weights. Whatever follows from a product and from rows of the weight is composed
here; a device overrides what it does better.

No checks: `ops/` has checked shapes and dtypes and laid the tensors out as `strides.py` says.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lowbit import packing, reference
from lowbit.backends import int8_mm
from lowbit.forking import alone_after_fork
from lowbit.formats import FORMATS, Format
from lowbit.layouts import Operands, PrunedOperands, canonical_tensors, group_terms
from lowbit.strides import rows_of
from lowbit.weights.sparse import SparseTerm

_FP16_MAX = 65504
# Programs of Triton's interpreter run one after another: as many as one multiprocessor would hold.
_INTERPRETED_SMS = 1


@functools.cache
def num_sms(device: torch.device) -> int:
    """Multiprocessors of a device."""
    if device.type != "cuda":
        return _INTERPRETED_SMS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def compute_dtype(x: torch.dtype, format: Format) -> torch.dtype:
    """What x and the table are multiplied in: the dtype of x, or fp32 where fp16 cannot hold the table."""
    values = () if format.codec == "affine" else format.values() or ()
    fits = all(abs(v) <= _FP16_MAX for v in values if math.isfinite(v))
    return x if x != torch.float16 or fits else torch.float32


def _integers(x: Tensor) -> reference.Product:
    """What multiplies integers on the device of x: fp64 is slow on most GPUs."""
    return int8_mm.product if x.device.type == "cuda" else reference.exact_product


class Backend:
    """The kernels of one device and layout. x is (M, K), weights are (N, K), bias is (N,) or None."""

    name: str

    def linear(
        self, x: Tensor, w: Operands, bias: Tensor | None, dtype: torch.dtype | None = None
    ) -> Tensor:  # (M, N) in `dtype`, by default that of x
        """x W^T + bias with fp32 sums, rounded once."""
        raise NotImplementedError

    def rows(self, indices: Tensor | None, w: Operands, dtype: torch.dtype) -> Tensor:  # (R, K)
        """Rows of the weight, or all of them, in fp32 and rounded once to `dtype`; `indices` (R,) int64 in [0, N)."""
        raise NotImplementedError

    def describe(
        self, format: Format, n: int, k: int, m: int, x: torch.dtype, device: torch.device
    ) -> str:
        """What `explain` calls the kernel that `linear` runs for M rows of dtype `x`."""
        return self.name

    def describe_integers(self, device: torch.device) -> str:
        """What `explain` calls `int8_linear` and `binary_linear`."""
        return "torch._int_mm" if device.type == "cuda" else "reference"

    def temporary(
        self, format: Format, n: int, k: int, m: int, x: torch.dtype, device: torch.device
    ) -> int | None:
        """Bytes that `linear` of M contiguous rows of dtype `x` takes beside y; None where that is not known."""
        return None

    def sparse_name(self) -> str:
        """What `explain` calls `sparse_linear`."""
        return "torch"

    def linear_epilogue(
        self,
        x: Tensor,
        w: Operands,
        bias: Tensor | None,
        gate: Tensor | None,  # (M, N)
        residual: Tensor | None,  # (M, N)
        added: Tensor | None,  # (M, N) fp32
        activation: str | None,
    ) -> Tensor:  # (M, N), dtype of x
        """`reference.apply_epilogue` of x W^T + bias + added in fp32, rounded once."""
        y = self.linear(x, w, bias, torch.float32)
        y = y if added is None else y + added
        return reference.apply_epilogue(y, activation, gate, residual).to(x.dtype)

    def linear_many(
        self, x: Tensor, weights: Sequence[Operands], biases: Sequence[Tensor | None]
    ) -> list[Tensor]:  # (M, N_i), dtype of x
        """x W_i^T + bias_i."""
        return [self.linear(x, w, bias) for w, bias in zip(weights, biases, strict=True)]

    def conv(
        self,
        x: Tensor,  # (B, C, *size)
        x_scales: Tensor | None,  # (B * pixels,) fp32 of int8 x
        w: Operands,
        bias: Tensor | None,
        g: reference.Geometry,
        activation: str | None,
    ) -> Tensor:  # (B, N, *out) in the dtype of x, of int8 fp32; no view
        """activation(conv(x, W) + bias), rounded once: patches in memory by `linear`, and with groups of channels the
        decoded weight by torch.
        """
        if g.groups > 1:
            return self._dense_conv(x, w, bias, g, activation)
        patches = reference.patches(x, g)
        shape = (*patches.shape[:-2], w.n)
        rows = rows_of(patches, w.k)
        if x_scales is None:
            y = self.linear_epilogue(rows, w, bias, None, None, None, activation)
        else:
            # One number, but NaN for a patch with a pixel that has NaN.
            scales = reference.patches(x_scales.view(x.shape[0], 1, *x.shape[2:]), g).amax(-1)
            y = self.int8_linear(rows, scales.flatten(), w, bias, torch.float32, None)
            y = reference.apply_epilogue(y, activation, None, None)
        return y.view(shape).movedim(-1, 1).clone()

    def conv_name(self, kernel: str, groups: int) -> str:
        """What `explain` calls `conv` where `linear` would run this kernel."""
        return "the decoded weight by torch" if groups > 1 else f"{kernel} of patches in memory"

    @alone_after_fork
    def _dense_conv(
        self,
        x: Tensor,
        w: Operands,
        bias: Tensor | None,
        g: reference.Geometry,
        activation: str | None,
    ) -> Tensor:
        y = reference.convolution(x, self.dequantize(w, torch.float32), bias, g)
        y = reference.apply_epilogue(y, activation, None, None)
        return y.to(x.dtype)

    def dequantize(self, w: Operands, dtype: torch.dtype) -> Tensor:  # (N, K)
        """The weight in fp32, rounded once to `dtype`."""
        return self.rows(None, w, dtype)

    def embedding(self, indices: Tensor, w: Operands, dtype: torch.dtype) -> Tensor:  # (R, K)
        """Rows of the dequantized weight; only these rows are decoded."""
        return self.rows(indices, w, dtype)

    def sparse_linear(self, x: Tensor, term: SparseTerm) -> Tensor:  # (M, N) fp32
        """x S^T in fp32. ValueError for a column that x lacks; on a GPU, where looking at them would wait for it,
        torch's own assertion stops the device.
        """
        columns = term.columns
        wrong = columns[(columns < 0) | (columns >= x.shape[1])] if x.is_cpu else columns[:0]
        if wrong.numel():
            raise ValueError(f"outlier_columns must be in [0, {x.shape[1]}), got {int(wrong[0])}")
        return reference.outlier_product(x.float(), *term)

    @alone_after_fork
    def pruned_linear(self, x: Tensor, w: PrunedOperands) -> Tensor:  # (M, N) fp32
        """x W^T in fp32 by `reference.pruned_product`: the weight is made dense."""
        return reference.pruned_product(x.float(), *w)

    def pruned_name(self) -> str:
        """What `explain` calls `pruned_linear`."""
        return "pruned_dense"

    @alone_after_fork
    def hadamard(self, x: Tensor, signs: Tensor | None, transposed: bool) -> Tensor:  # (M, K)
        """`reference.hadamard_transform`, rounded once to the dtype of x."""
        return reference.hadamard_transform(x, signs, transposed).to(x.dtype)

    @alone_after_fork
    def low_rank_linear(self, x: Tensor, left: Tensor, right: Tensor) -> Tensor:  # (M, N) fp32
        """`reference.low_rank_product` in fp32."""
        return reference.low_rank_product(x.float(), left, right)

    def int8_quantize(
        self, x: Tensor, group: int | None, scale: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """`reference.quantize_int8`."""
        return reference.quantize_int8(x, group, scale)

    @alone_after_fork
    def int8_linear(
        self,
        q: Tensor,  # (M, K) int8
        x_scales: Tensor,  # (M,), (M, groups) or (M, blocks) fp32, as `reference.int8_linear`
        w: Operands,
        bias: Tensor | None,
        dtype: torch.dtype,
        out_scale: float | None,
    ) -> Tensor:  # (M, N) in `dtype`
        """`reference.int8_linear`, rounded once to `dtype`, or divided by out_scale for int8."""
        codes, scales, zeros, table = self._canonical(w)
        y = reference.int8_linear(
            q, x_scales, codes, w.format, scales, zeros, table, bias, _integers(q)
        )
        return reference.requantize(y, out_scale) if out_scale is not None else y.to(dtype)

    def binary_quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`reference.quantize_binary`, the codes in canonical packing."""
        codes, scales = reference.quantize_binary(x)
        return packing.pack_codes(codes, FORMATS["binary"]), scales

    @alone_after_fork
    def binary_linear(
        self,
        bits: Tensor,  # (M, ceil(K / 8)) uint8
        x_scales: Tensor,  # (M,) fp32
        w: Operands,
        bias: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor:  # (M, N) in `dtype`
        """`reference.binary_linear`, rounded once to `dtype`."""
        codes, scales, _, _ = self._canonical(w)
        signs = packing.unpack_codes(bits, w.format, w.k)
        y = reference.binary_linear(signs, x_scales, codes, w.format, scales, bias, _integers(bits))
        return y.to(dtype)

    def pack(self, codes: Tensor, format: Format) -> Tensor:
        """Canonical packing: (N, K) uint8 to (N, row bytes) uint8."""
        return packing.pack_codes(codes, format)

    def unpack(self, packed: Tensor, format: Format, k: int) -> Tensor:
        """Inverse of `pack`."""
        return packing.unpack_codes(packed, format, k)

    def activation_linear(
        self, x: Tensor, w: Operands, bias: Tensor | None
    ) -> Tensor:  # (M, N) fp32
        """`linear` of a format with int8 activations, from their product."""
        q, x_scales = self.int8_quantize(x, w.format.activation_group, None)
        return self.int8_linear(q, x_scales, w, bias, torch.float32, None)

    def _canonical(self, w: Operands) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """Codes one a byte, scales and zeros in fp32, and the fitted table."""
        codes, _, _, table = canonical_tensors(w)
        return packing.unpack_codes(codes, w.format, w.k), *group_terms(w), table
