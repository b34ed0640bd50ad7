"""The backend of the "canonical" layout: plain torch, any device, no kernel of ours.

Each call decodes what it needs to fp32 and leaves the product to torch, so it is right everywhere
and slow: the first call on a device says so through the logger "lowbit".
"""

from __future__ import annotations

import functools
import logging

import torch
import torch.nn.functional as F
from torch import Tensor

from lowbit import packing, reference
from lowbit.backends import available
from lowbit.backends.base import Backend
from lowbit.forking import alone_after_fork
from lowbit.layouts import Operands, chosen_tables, group_terms
from lowbit.weights.sparse import SparseTerm

_logger = logging.getLogger("lowbit")
# Of a product, 128 MiB in fp32; larger weights are decoded in slices of rows.
_SLICE_WEIGHTS = 1 << 25


class PyTorchBackend(Backend):
    """Plain torch on canonical tensors."""

    name = "reference"

    @alone_after_fork
    def linear(
        self, x: Tensor, w: Operands, bias: Tensor | None, dtype: torch.dtype | None = None
    ) -> Tensor:
        """x W^T + bias with fp32 products and sums, rounded once."""
        _log_once(x.device.type)
        dtype = dtype or x.dtype
        if w.format.activation is not None:
            return self.activation_linear(x, w, bias).to(dtype)
        rows, bias = x.float(), None if bias is None else bias.float()
        step = max(1, _SLICE_WEIGHTS // w.k)
        if w.n <= step:
            return F.linear(rows, self.rows(None, w, torch.float32), bias).to(dtype)
        y = x.new_empty((x.shape[0], w.n), dtype=dtype)
        for begin in range(0, w.n, step):
            part = slice(begin, min(w.n, begin + step))
            index = torch.arange(part.start, part.stop, dtype=torch.int64, device=x.device)
            of_part = None if bias is None else bias[part]
            y[:, part] = F.linear(rows, self.rows(index, w, torch.float32), of_part)
        return y

    def rows(self, indices: Tensor | None, w: Operands, dtype: torch.dtype) -> Tensor:
        """Rows of the weight; only these are decoded."""
        codes, table, format = w.codes, w.table, w.format
        if indices is not None:
            _log_once(indices.device.type)
            if table is not None and format.table_scope in ("row", "group"):
                table = table[indices]
            codes = codes[indices]
        unpacked, chosen = packing.unpack_codes(codes, format, w.k), chosen_tables(w, indices)
        values = reference.code_values(unpacked, format, table, chosen)[:, : w.k]
        return reference.apply_scales(values, format, *group_terms(w, indices)).to(dtype)

    def conv(
        self,
        x: Tensor,
        x_scales: Tensor | None,
        w: Operands,
        bias: Tensor | None,
        g: reference.Geometry,
        activation: str | None,
    ) -> Tensor:
        """That of the decoded weight by torch, in fp32."""
        _log_once(x.device.type)
        if w.format.activation is not None:
            return super().conv(x, x_scales, w, bias, g, activation)
        return self._dense_conv(x, w, bias, g, activation)

    def conv_name(self, kernel: str, groups: int) -> str:
        """As `conv`."""
        return "the decoded weight by torch"

    def sparse_linear(self, x: Tensor, term: SparseTerm) -> Tensor:
        """x S^T in fp32."""
        _log_sparse_once(x.device.type)
        return super().sparse_linear(x, term)


PYTORCH = PyTorchBackend()


@functools.cache
def _log_sparse_once(device_type: str) -> None:
    _logger.info("plain torch multiplies the outliers of weights on %s", device_type)


@functools.cache
def _log_once(device_type: str) -> None:
    why = (
        "the weight is in canonical layout"
        if device_type == "cpu"
        else f"triton, which has the {device_type} kernels, is not installed"
        if device_type == "cuda" and not available.has_triton()
        else f"there is no {device_type} kernel for it"
    )
    _logger.warning("plain torch dequantizes the weight in every call on %s: %s", device_type, why)
