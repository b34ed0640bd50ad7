"""Which backend serves a device and a layout, and why a row of the kernel table was chosen.

A backend is a module with `linear`, `linear_epilogue`, `linear_added`, `linear_many`, `outlier_product`,
`int8_linear`, `binary_linear`, `dequantize` and `embedding`: glue, no maths, no checks. What depends on no layout
(`int8_quantize`, `binary_quantize`, `pack`, `unpack`) is in `cpu` and `reference` alone.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from lowbit import layouts
from lowbit.backends import available, cpu, cuda, reference, triton
from lowbit.formats import Format
from lowbit.layouts import CANONICAL, K16, M16, N16, Operands
from lowbit.weights.quantized import QuantTensor

_BACKENDS: dict[tuple[str, str], ModuleType] = {
    ("cpu", N16): cpu,
    ("cpu", CANONICAL): reference,
    ("cpu", K16): triton,  # under Triton's interpreter
    ("cuda", K16): triton,
    ("cuda", M16): cuda,
    ("cuda", CANONICAL): reference,
}
_DTYPE_NAMES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.uint8: "b1",
}
REFERENCE_ROW = reference.ROW


def find(device_type: str, layout: str) -> ModuleType:
    """The backend for a device type and a layout.

    Raises:
        ValueError: no backend reads this layout on this device.
    """
    try:
        return _BACKENDS[device_type, layout]
    except KeyError:
        layouts_here = [lay for dev, lay in _BACKENDS if dev == device_type]
        raise ValueError(
            f"layout must be one of {layouts_here} on device {device_type!r}, got {layout!r}"
        ) from None


find_cached = functools.cache(find)


@dataclass(frozen=True)
class Row:
    """One row of the kernel table as seen by one request: its cost in nanoseconds and the threads
    it would use, or the reason it does not run.
    """

    name: str
    cost: float | None
    threads: int | None
    reason: str | None


@dataclass(frozen=True)
class Explanation:
    """The row that runs a request and the fate of the others; `str()` is a table.

    `outliers` names what multiplies the outliers of the weight, if it has any.
    """

    request: str
    selected: str
    rows: tuple[Row, ...]
    outliers: str | None = None

    def __str__(self) -> str:
        lines = [f"{self.request}: {self.selected}"]
        if self.outliers is not None:
            lines.append(f"  outliers: {self.outliers}")
        width = max((len(row.name) for row in self.rows), default=0)
        for row in self.rows:
            verdict = ["runs"] if row.name == self.selected else []
            if row.reason is not None:
                verdict.append(row.reason)
            if row.cost is not None:
                threads = f"{row.threads} thread" + "s" * (row.threads != 1)
                verdict.append(f"estimated {row.cost / 1e3:.3g} us on {threads}")
            lines.append(f"  {row.name:<{width}}  {', '.join(verdict)}")
        return "\n".join(lines)


def explain(x: Tensor, weight: QuantTensor | Operands) -> Explanation:
    """Says which row of the kernel table `linear(x, weight)` runs, and why the others do not.

    Args:
        x: activations (..., K) in fp32, bf16 or fp16, or the bits (M, ceil(K / 8)) of `lowbit.binary.linear`; only
            shape, dtype and device are read.
        weight: (N, K).

    Raises:
        TypeError: x has another dtype.
        ValueError: the last dimension of x is not K.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a torch.Tensor, got {type(x).__name__}")
    if x.dtype not in _DTYPE_NAMES:
        raise TypeError(f"x must be float32, bfloat16, float16 or bits in uint8, got {x.dtype}")
    n, k = weight.shape
    width = -(-k // 8) if x.dtype == torch.uint8 else k
    if x.dim() == 0 or x.shape[-1] != width:
        raise ValueError(f"x must have shape (..., {width}), got {tuple(x.shape)}")
    layout = (
        weight.layout
        if isinstance(weight, Operands)
        else available.kernel_layout(x.device, weight.format)
    )
    m = x.numel() // width if width else 0
    return explain_request(weight.format, n, k, m, x.dtype, x.device.type, layout)


def explain_request(
    format: Format,
    n: int,
    k: int,
    m: int,
    dtype: torch.dtype,
    device_type: str = "cpu",
    layout: str = N16,
) -> Explanation:
    """`explain` without tensors: an (m, k) x of `dtype` against an (n, k) weight."""
    name = _DTYPE_NAMES[dtype]
    threads = cpu.usable_threads(torch.get_num_threads())
    request = (
        f"linear {name} {format.name} M={m} N={n} K={k} on {device_type}, at most {threads} threads"
    )
    backend = find(device_type, layout)
    sparse = None
    if format.outliers:
        how = backend.outliers_row()
        sparse = f"{format.num_outliers(k)} a row in {format.outlier_dtype}, {how}"
    if backend is reference:
        return Explanation(request, REFERENCE_ROW, (), sparse)
    if backend is triton or backend is cuda:
        row = REFERENCE_ROW
        if format.activation is None and dtype != torch.uint8:
            row = backend.describe(format, n, k, m, dtype, torch.device(device_type))
        return Explanation(request, row, (), sparse)
    specs = layouts.find(layout).specs(format, n, k)
    scales, zeros = (specs[t][1] if t in specs else None for t in ("scales", "zeros"))
    w = cpu.weight(format, n, k, scales, zeros)
    rows = tuple(Row(*row) for row in w.explain("linear", name, m, threads))
    return Explanation(request, w.select("linear", name, m, threads), rows, sparse)
