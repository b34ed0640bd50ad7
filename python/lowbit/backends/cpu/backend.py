"""The backend of the "n16" layout, from the kernels of this folder."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lowbit.backends.base import Backend
from lowbit.backends.cpu import activations, conv, requests, sparse, weights
from lowbit.formats import Format
from lowbit.layouts import Operands, PrunedOperands
from lowbit.reference import Geometry
from lowbit.weights.sparse import SparseTerm


class CpuBackend(Backend):
    """The compiled kernels; what they take of strides is said at each of them."""

    name = "cpu"

    def linear(
        self, x: Tensor, w: Operands, bias: Tensor | None, dtype: torch.dtype | None = None
    ) -> Tensor:
        """`weights.linear`."""
        return weights.linear(x, w, bias, dtype)

    def linear_epilogue(
        self,
        x: Tensor,
        w: Operands,
        bias: Tensor | None,
        gate: Tensor | None,
        residual: Tensor | None,
        added: Tensor | None,
        activation: str | None,
    ) -> Tensor:
        """In the kernel, but for an activation or a gate after something is added."""
        if added is not None and (activation is not None or gate is not None):
            return super().linear_epilogue(x, w, bias, gate, residual, added, activation)
        return weights.linear_epilogue(x, w, bias, gate, residual, added, activation)

    def linear_many(
        self, x: Tensor, weights_given: Sequence[Operands], biases: Sequence[Tensor | None]
    ) -> list[Tensor]:
        """`weights.linear_many`."""
        return weights.linear_many(x, weights_given, biases)

    def conv(
        self,
        x: Tensor,
        x_scales: Tensor | None,
        w: Operands,
        bias: Tensor | None,
        g: Geometry,
        activation: str | None,
    ) -> Tensor:
        """`conv.conv`, and with groups `conv.grouped_conv`."""
        if g.groups == 1:
            return conv.conv(x, x_scales, w, bias, g, activation)
        return conv.grouped_conv(x, w, bias, g, activation)

    def conv_name(self, kernel: str, groups: int) -> str:
        """As `conv`."""
        return f"grouped_conv_f32_{conv.isa}" if groups > 1 else f"{kernel} of tiles of patches"

    def rows(self, indices: Tensor | None, w: Operands, dtype: torch.dtype) -> Tensor:
        """`weights.dequantize` and `weights.embedding`."""
        if indices is None:
            return weights.dequantize(w, dtype)
        return weights.embedding(indices, w, dtype)

    def sparse_linear(self, x: Tensor, term: SparseTerm) -> Tensor:
        """`sparse.sparse_linear`."""
        return sparse.sparse_linear(x, term)

    def sparse_name(self) -> str:
        """What `explain` calls `sparse_linear`."""
        return sparse.sparse_name()

    def pruned_linear(self, x: Tensor, w: PrunedOperands) -> Tensor:
        """`sparse.pruned_linear`."""
        return sparse.pruned_linear(x, w)

    def pruned_name(self) -> str:
        """What `explain` calls `pruned_linear`."""
        return sparse.pruned_name()

    def int8_quantize(
        self, x: Tensor, group: int | None, scale: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """`activations.int8_quantize`."""
        return activations.int8_quantize(x, group, scale)

    def int8_linear(
        self,
        q: Tensor,
        x_scales: Tensor,
        w: Operands,
        bias: Tensor | None,
        dtype: torch.dtype,
        out_scale: float | None,
    ) -> Tensor:
        """`activations.int8_linear`."""
        return activations.int8_linear(q, x_scales, w, bias, dtype, out_scale)

    def binary_quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`activations.binary_quantize`."""
        return activations.binary_quantize(x)

    def binary_linear(
        self,
        bits: Tensor,
        x_scales: Tensor,
        w: Operands,
        bias: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor:
        """`activations.binary_linear`."""
        return activations.binary_linear(bits, x_scales, w, bias, dtype)

    def pack(self, codes: Tensor, format: Format) -> Tensor:
        """`weights.pack`."""
        return weights.pack(codes, format)

    def unpack(self, packed: Tensor, format: Format, k: int) -> Tensor:
        """`weights.unpack`."""
        return weights.unpack(packed, format, k)

    def explain(
        self, w_format: Format, n: int, k: int, m: int, dtype: str, threads: int
    ) -> tuple[str, list[tuple[str, float | None, int | None, str | None]]]:
        """The kernel that runs a linear, and what is known of all of them."""
        known = requests.expected(w_format, n, k)
        return known.select("linear", dtype, m, threads), known.explain("linear", dtype, m, threads)


CPU = CpuBackend()
