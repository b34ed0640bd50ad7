"""What the backends of the GPU layouts share: every op that follows from a product and from decoding rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lowbit import reference
from lowbit.backends import reference as plain
from lowbit.formats import Format
from lowbit.layouts import Operands, canonical_tensors

Weight = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]
"""Codes, scales, zeros and table."""


class Derived:
    """The ops of a backend, in the order of arguments of `backends.reference`.

    Args:
        layout: of the operands.
        linear: (x, codes, scales, zeros, table, bias, format, n, k, dtype) to x W^T + bias in `dtype`.
        rows: (indices or None, codes, scales, zeros, table, format, n, k, dtype) to those rows of W, or all.
    """

    def __init__(
        self, layout: str, linear: Callable[..., Tensor], rows: Callable[..., Tensor]
    ) -> None:
        self._layout, self._linear, self._rows = layout, linear, rows

    def linear_epilogue(self, x: Tensor, *args: Any) -> Tensor:
        """`linear` and what follows it in fp32, rounded once to the dtype of x."""
        *product, activation, gate, residual = args
        y = self._linear(x, *product, torch.float32)
        return reference.apply_epilogue(y, activation, gate, residual).to(x.dtype)

    def linear_added(self, x: Tensor, *args: Any) -> Tensor:
        """`backends.reference.linear_added`."""
        *product, added, dtype = args
        return (self._linear(x, *product, torch.float32) + added).to(dtype)

    def linear_many(
        self,
        x: Tensor,  # (M, K)
        weights: list[Weight],
        biases: list[Tensor | None],  # (N_i,)
        formats: list[Format],
        ns: list[int],
        k: int,
    ) -> list[Tensor]:  # (M, N_i), dtype of x
        """x W_i^T + bias_i, one after another."""
        each = zip(weights, biases, formats, ns, strict=True)
        return [self._linear(x, *w, bias, format, n, k, x.dtype) for w, bias, format, n in each]

    def dequantize(self, *args: Any) -> Tensor:
        """The weight in fp32, rounded once to the dtype that is asked for."""
        return self._rows(None, *args)

    def embedding(self, indices: Tensor, *args: Any) -> Tensor:
        """Rows of the dequantized weight; only these rows are decoded."""
        return self._rows(indices, *args)

    def activation_linear(self, x: Tensor, *args: Any) -> Tensor:
        """`linear` in fp32 of a format with int8 activations, which has no kernel."""
        return self._plain(plain.linear, x.float(), *args)

    def int8_linear(self, q: Tensor, x_scales: Tensor, *args: Any) -> Tensor:
        """`backends.reference.int8_linear`."""
        return self._plain(plain.int8_linear, q, x_scales, *args)

    def binary_linear(self, bits: Tensor, x_scales: Tensor, *args: Any) -> Tensor:
        """`backends.reference.binary_linear`."""
        return self._plain(plain.binary_linear, bits, x_scales, *args)

    def _plain(self, call: Callable[..., Tensor], *args: Any) -> Tensor:
        """A call of the plain backend with the operands in canonical layout; they stand before bias and format."""
        at = next(i for i, a in enumerate(args) if isinstance(a, Format))
        codes, scales, zeros, table, bias, format, n, k = args[at - 5 : at + 3]
        weight = Operands(format, (n, k), self._layout, codes, scales, zeros, table, {})
        return call(*args[: at - 5], *canonical_tensors(weight), bias, *args[at:])
