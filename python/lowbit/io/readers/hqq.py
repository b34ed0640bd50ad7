"""HQQ with groups along rows (axis 1); those along columns (axis 0) are in no format.

With axis 0 rows n, n + N / G, n + 2 N / G ... share a scale and a zero in every column, so that a scale would be of one
weight of a row. Formats have scales of runs of a row alone.

The weight is cut into groups as (groups, G), or for axis 0 as (G, groups), and its codes are packed in slices of that
matrix's rows: W = (code - zero) * scale, computed here in fp32. The library rounds code - zero to the dtype of `zero`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from lowbit.files import shown
from lowbit.io.readers.codes import FLOATS, NEAREST, Spec, affine, check, need, pack
from lowbit.io.readers.folder import FolderReader, Plan
from lowbit.weights.quantized import QuantTensor

# Bits of the slices of a byte or word, by what the layer says of its packing.
_PACKINGS = {"8bit_u8": 8, "4bit_u8": 4, "3bit_32": 3, "2bit_u8": 2, "1bit_u8": 1}
_SLICES = {8: 1, 4: 2, 3: 10, 2: 4, 1: 8}
_MIN_GROUP = 16  # as for bitsandbytes
_AXIS = "its groups lie along columns, axis 0"


class HQQReader(FolderReader):
    """An open HQQ folder."""

    name = "hqq"
    methods = frozenset({"hqq"})
    parts = (
        "W_q", "scale", "zero", "nbits", "group_size", "shape", "axis", "packing", "unpack_view_dtype", "view_as_float",
        "quant_scale", "quant_zero", "compute_dtype", "offload_meta", "encoded_state_dict", "stores_quant_config",
        "channel_wise", "optimize", "round_zero",
    )  # fmt: skip
    markers = ("W_q",)

    def _plan(self, layer: str, specs: Mapping[str, Spec]) -> Plan:
        for part in ("scale", "zero", "shape", "axis", "packing"):
            need(specs, part)
        check("shape", specs["shape"], (2,), (torch.int64, torch.int32))
        n, k = (int(v) for v in self._small(layer, "shape"))
        axis, packing = int(self._small(layer, "axis")), self._packing(layer)
        if n < 1 or k < 1 or n * k >= 2**62 or axis not in (0, 1):
            raise ValueError(
                f"shape must be positive and axis 0 or 1, got shape {(n, k)} and axis {axis}"
            )
        for part in ("quant_scale", "quant_zero"):
            if part in specs and bool(self._small(layer, part).any()):
                raise ValueError(
                    f"{part} must be 0: scales and zeros that are quantized themselves"
                )
        shape, dtype = specs["scale"]
        groups = math.prod(shape)
        if dtype not in FLOATS or specs["zero"] != (shape, dtype) or groups < 1 or n * k % groups:
            raise ValueError(
                f"scale and zero must be floats of one shape that divides {n * k} weights, got {specs['scale']} "
                f"and {specs['zero']}"
            )
        group, bits = n * k // groups, _PACKINGS[packing]
        rows, columns = (groups, group) if axis else (group, groups)
        stored = math.prod(specs["W_q"][0]) * specs["W_q"][1].itemsize
        wanted = -(-rows // _SLICES[bits]) * columns * (4 if bits == 3 else 1)
        if stored != wanted:
            raise ValueError(
                f"W_q must take {wanted} bytes for {n * k} weights in groups of {group}, axis {axis}, packed as "
                f"{packing}, got {specs['W_q']}"
            )
        piece = math.gcd(k, group)
        if axis == 0 or piece < min(group, k, _MIN_GROUP):
            loss = _AXIS if axis == 0 else f"groups of {group} weights cross rows of {k}"
            nearest = NEAREST if axis == 0 else ""
            return Plan((n, k), None, loss, bits=bits, rows=rows, nearest=nearest)
        return Plan((n, k), affine(bits, piece, k, dtype, "float"), bits=bits, rows=rows)

    def _small(self, layer: str, part: str) -> Tensor:
        value = self._part(layer, part)
        assert value is not None
        if value.numel() > 64:
            raise ValueError(f"{part} must be a number or a name, got shape {tuple(value.shape)}")
        return value

    def _packing(self, layer: str) -> str:
        name = "".join(map(chr, self._small(layer, "packing").flatten().to(torch.uint8).tolist()))
        if name not in _PACKINGS:
            raise ValueError(f"packing must be one of {tuple(_PACKINGS)}, got {shown(name)}")
        return name

    def _decode(self, plan: Plan, tensors: Mapping[str, Tensor]) -> QuantTensor | Tensor:
        n, k = plan.shape
        codes = _unpack(tensors["W_q"], plan.bits, plan.rows, n * k // plan.rows)
        scale, zero = tensors["scale"], tensors["zero"]
        if plan.format is None:
            shape = (1, -1) if plan.loss == _AXIS else (-1, 1)
            values = (codes.float() - zero.float().view(shape)) * scale.float().view(shape)
            return values.view(n, k)
        groups = plan.format.num_groups(k)
        first = torch.arange(n * groups, dtype=torch.int64, device=scale.device)
        index = first * (plan.format.group or k) // (n * k // scale.numel())
        named = {
            part: t.flatten()[index].view(n, groups)
            for part, t in (("scales", scale), ("zeros", zero))
        }
        return pack(codes.view(n, k), plan.format, **named)


def _unpack(words: Tensor, bits: int, rows: int, columns: int) -> Tensor:
    """Codes (rows, columns): each slice of rows has its bits, the first one the highest."""
    dtype = torch.int32 if bits == 3 else torch.uint8
    words = words.contiguous().view(-1).view(dtype).view(-1, columns)
    slices = _SLICES[bits]
    codes = torch.empty(slices, *words.shape, dtype=torch.uint8, device=words.device)
    for i in range(slices):
        codes[i] = (words >> bits * (slices - 1 - i)) & ((1 << bits) - 1)
    return codes.view(-1, columns)[:rows].contiguous()
