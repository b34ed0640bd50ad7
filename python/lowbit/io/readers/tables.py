"""Weights with a table of values for every row: SqueezeLLM, with its sparse part, and AnyPrecision.

SqueezeLLM: W[n, k] = lookup_table[n, code[k, n]] + S[n, k], S in rows of CSR (`rows`, `cols`, `vals`). AnyPrecision:
planes of bits, the highest first; the first b of them are codes of lut{b}, of which the largest is read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from lowbit.formats import BITS, FORMATS, Format
from lowbit.io.readers.codes import FLOATS, INTEGERS, Spec, check, need, pack, stream_codes
from lowbit.io.readers.folder import FolderReader, Plan
from lowbit.weights.quantized import QuantTensor

_CSR = ("rows", "cols", "vals")
# Rows may have this share of their weights in the sparse part, all as many as the fullest.
_MAX_SPARSE = 16


class SqueezeLLMReader(FolderReader):
    """An open SqueezeLLM folder."""

    name = "squeezellm"
    methods = frozenset({"squeezellm"})
    parts = ("qweight", "lookup_table", *_CSR, "full_rows", "full_row_indices")
    markers = ("qweight", "lookup_table")

    def _plan(self, layer: str, specs: Mapping[str, Spec]) -> Plan:
        check("qweight", need(specs, "qweight"), (None, None), (torch.int32,))
        words, n = specs["qweight"][0]
        check("lookup_table", need(specs, "lookup_table"), (n, None), FLOATS)
        bits = specs["lookup_table"][0][1].bit_length() - 1
        if bits not in (2, 3, 4, 8) or specs["lookup_table"][0][1] != 1 << bits or words % bits:
            raise ValueError(
                f"lookup_table must have 4, 8, 16 or 256 values a row and qweight whole blocks of as many bits, got "
                f"{specs['lookup_table']} and {specs['qweight']}"
            )
        k = words // bits * 32
        format = FORMATS[f"kmeans{bits}_pr"]
        if "full_rows" in specs and 0 not in specs["full_rows"][0]:
            raise ValueError(f"full_rows must be empty, got shape {specs['full_rows'][0]}")
        most = self._most(layer, specs, n, k)
        if most > max(1, k // _MAX_SPARSE):
            return Plan((n, k), None, f"a row has {most} of {k} weights in its sparse part")
        if most:
            format = _sparse(format, most, "fp16" if specs["vals"][1] == torch.float16 else "fp32")
        return Plan((n, k), format, bits=bits, rows=most)

    def _most(self, layer: str, specs: Mapping[str, Spec], n: int, k: int) -> int:
        """The weights of the fullest row of the sparse part, which is checked."""
        if not any(part in specs for part in _CSR):
            return 0
        check("rows", need(specs, "rows"), (n + 1,), INTEGERS)
        check("vals", need(specs, "vals"), (None,), FLOATS)
        check("cols", need(specs, "cols"), specs["vals"][0], INTEGERS)
        ends = self._part(layer, "rows")
        assert ends is not None
        counts = ends.diff()
        if int(ends[0]) != 0 or int(ends[-1]) != specs["vals"][0][0] or int(counts.min()) < 0:
            raise ValueError(f"rows must ascend from 0 to {specs['vals'][0][0]}, got {ends}")
        return int(counts.max())

    def _decode(self, plan: Plan, tensors: Mapping[str, Tensor]) -> QuantTensor | Tensor:
        n, k = plan.shape
        table = tensors["lookup_table"].float()
        bits = table.shape[1].bit_length() - 1
        codes = stream_codes(tensors["qweight"].t(), bits, k)
        if "vals" not in tensors or not tensors["vals"].numel():
            assert plan.format is not None
            return pack(codes, plan.format, table=table)
        rows = torch.arange(n, dtype=torch.int64, device=table.device)
        rows, columns = (
            rows.repeat_interleave(tensors["rows"].diff().long()),
            tensors["cols"].long(),
        )
        if bool(((columns < 0) | (columns >= k)).any()):
            raise ValueError(f"cols must be in [0, {k}), got {columns.min()} to {columns.max()}")
        sparse = torch.zeros(n, k, dtype=torch.float32, device=table.device)
        sparse.index_put_((rows, columns), tensors["vals"].float(), accumulate=True)
        if plan.format is None:
            return table.gather(1, codes.long()) + sparse
        # As many in every row: zeros fill up.
        taken = torch.zeros(n, k, dtype=torch.float32, device=table.device)
        taken[rows, columns] = 1
        places = taken.topk(plan.format.outliers, 1).indices.sort(1).values
        values = sparse.gather(1, places)
        dtype = torch.float16 if plan.format.outlier_dtype == "fp16" else torch.float32
        named = {"outlier_columns": places.int(), "outlier_values": values.to(dtype)}
        return pack(codes, plan.format, table=table, **named)


class AnyPrecisionReader(FolderReader):
    """An open AnyPrecision folder, in its highest precision."""

    name = "anyprecision"
    methods = frozenset({"anyprec"})
    parts = ("qweight", *(f"lut{bits}" for bits in range(2, 9)))
    markers = ("qweight", "lut8", "lut4", "lut3")

    def _plan(self, layer: str, specs: Mapping[str, Spec]) -> Plan:
        check("qweight", need(specs, "qweight"), (None, None, None), (torch.int32,))
        planes, n, words = specs["qweight"][0]
        luts = [int(re.sub(r"\D", "", part)) for part in specs if part.startswith("lut")]
        if not luts or max(luts) > planes:
            raise ValueError(f"lut must be there for at most {planes} planes of bits, got {luts}")
        bits = max(luts)
        check(f"lut{bits}", specs[f"lut{bits}"], (n, 1 << bits), FLOATS)
        width = next(b for b in BITS if b >= bits)
        return Plan((n, 32 * words), FORMATS[f"kmeans{width}_pr"], bits=bits)

    def _decode(self, plan: Plan, tensors: Mapping[str, Tensor]) -> QuantTensor | Tensor:
        assert plan.format is not None
        n, k = plan.shape
        word, shift = _places(k)
        codes = torch.zeros(n, k, dtype=torch.uint8, device="cpu")
        for plane in tensors["qweight"][: plan.bits]:
            codes = codes << 1 | ((plane[:, word] >> shift) & 1).to(torch.uint8)
        table = tensors[f"lut{plan.bits}"].float()
        table = torch.nn.functional.pad(table, (0, 2**plan.format.bits - table.shape[1]))
        return pack(codes, plan.format, table=table)


def _places(k: int) -> tuple[Tensor, Tensor]:
    """The word of a plane and the place in it of every column: bytes of 1024 columns lie word by word."""
    column = torch.arange(k, dtype=torch.int64, device="cpu")
    block, inside = column // 1024, column % 1024
    words = torch.where(block == k // 1024, k % 1024 // 32, 32)
    byte = inside // 8
    return 32 * block + byte % words, 31 - 8 * (byte // words) - inside % 8


def _sparse(format: Format, outliers: int, dtype: str) -> Format:
    return Format(
        name=f"{format.name}_o{outliers}{'fp32' if dtype == 'fp32' else ''}",
        codec="lut",
        bits=format.bits,
        group=None,
        scale=None,
        table_scope="row",
        outliers=outliers,
        outlier_dtype=dtype,
    )
