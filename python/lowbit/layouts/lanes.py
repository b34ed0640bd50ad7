"""What "n16" and "m16" share: rows in the lanes. Scales and zeros are (ceil(N / lanes), groups, lanes), missing rows 0;
a second level (ceil(N / lanes), super-blocks, lanes), one number for the weight, or what "canonical" has for "dq8".

Integer tables are centred by 2^(bits-1), and integer zeros are int8 holding zero - 2^(bits-1). The table is fp32:
(2^bits,), padded with zeros, (2, 2^bits) for a pair, or (ceil(N / lanes), 1 or groups, 2^bits, lanes) for a table per
row or group.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lowbit.formats import Format
from lowbit.layouts.base import Layout, Specs


class LanesLayout(Layout):
    """A layout whose scales, zeros and tables have `lanes` rows side by side."""

    lanes: int

    def specs(self, format: Format, n: int, k: int) -> Specs:
        """All but the codes, which are left canonical."""
        specs = super().specs(format, n, k)
        groups, blocks, entries = format.num_groups(k), -(-n // self.lanes), 2**format.bits
        for name in {"scales", "zeros", "scales2", "zeros2"} & specs.keys():
            shape, dtype = specs[name]
            if len(shape) == 2:
                specs[name] = ((blocks, shape[1], self.lanes), dtype)
        if format.zero == "int":
            specs["zeros"] = (specs["zeros"][0], torch.int8)
        shapes = {
            "tensor": (entries,),
            "pair": (2, entries),
            "row": (blocks, 1, entries, self.lanes),
            "group": (blocks, groups, entries, self.lanes),
        }
        specs["table"] = (shapes[format.table_scope], torch.float32)
        return specs

    def from_rows(self, values: Tensor) -> Tensor:
        """Brings rows into the last dimension. Differentiable."""
        n, groups = values.shape
        padded = F.pad(values, (0, 0, 0, -n % self.lanes))
        return padded.view(-1, self.lanes, groups).transpose(1, 2).contiguous()

    def to_rows(self, values: Tensor, n: int) -> Tensor:
        """Inverse of `from_rows`. Differentiable."""
        blocks, groups, lanes = values.shape
        return values.transpose(1, 2).reshape(blocks * lanes, groups)[:n].contiguous()

    def pack_zeros(self, zeros: Tensor, format: Format) -> Tensor:
        """Integer zeros are centred."""
        if format.zero == "int":
            zeros = (zeros.to(torch.int16) - 2 ** (format.bits - 1)).to(torch.int8)
        return super().pack_zeros(zeros, format)

    def unpack_zeros(self, zeros: Tensor, format: Format, n: int) -> Tensor:
        """Inverse of `pack_zeros`."""
        zeros = super().unpack_zeros(zeros, format, n)
        if format.zero != "int":
            return zeros
        return (zeros.to(torch.int16) + 2 ** (format.bits - 1)).to(torch.uint8)

    def fixed_table(self, format: Format) -> Tensor:
        """That of integers too: kernels know no other values."""
        values = torch.tensor(format.values(), dtype=torch.float32, device="cpu")
        if format.zero == "int":
            values = values - 2 ** (format.bits - 1)
        return F.pad(values, (0, 2**format.bits - values.numel()))

    def pack_table(self, table: Tensor, format: Format) -> Tensor:
        """Brings the rows of a table per row or group into the last dimension. Differentiable."""
        if format.table_scope in ("tensor", "pair"):
            return table
        table = table.unsqueeze(1) if table.dim() == 2 else table  # (N, 1 or groups, E)
        n, groups, entries = table.shape
        padded = F.pad(table, (0, 0, 0, 0, 0, -n % self.lanes))
        return padded.view(-1, self.lanes, groups, entries).permute(0, 2, 3, 1).contiguous()

    def unpack_table(self, table: Tensor, format: Format, n: int) -> Tensor:
        """Inverse of `pack_table`. Differentiable."""
        if format.table_scope in ("tensor", "pair"):
            return table
        blocks, groups, entries, lanes = table.shape
        rows = table.permute(0, 3, 1, 2).reshape(blocks * lanes, groups, entries)[:n]
        return rows.squeeze(1) if format.table_scope == "row" else rows
