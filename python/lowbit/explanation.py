"""`explain`: which kernel runs a linear, and why it was chosen."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit import backends
from lowbit.backends import available
from lowbit.backends.cpu import CPU, requests
from lowbit.backends.pytorch import PYTORCH
from lowbit.formats import Format
from lowbit.layouts import N16
from lowbit.ops.terms import Weight

_DTYPE_NAMES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.uint8: "b1",
}
REFERENCE = PYTORCH.name


@dataclass(frozen=True)
class Kernel:
    """One kernel as seen by one request: its cost in nanoseconds and the threads it would use, or the reason why it
    does not run.
    """

    name: str
    cost: float | None
    threads: int | None
    reason: str | None


@dataclass(frozen=True)
class Explanation:
    """The kernel that runs a request and the fate of the others; `str()` is a table.

    `outliers` names what multiplies the outliers of the weight, if it has any.
    """

    request: str
    selected: str
    kernels: tuple[Kernel, ...]
    outliers: str | None = None

    def __str__(self) -> str:
        lines = [f"{self.request}: {self.selected}"]
        if self.outliers is not None:
            lines.append(f"  outliers: {self.outliers}")
        width = max((len(kernel.name) for kernel in self.kernels), default=0)
        for kernel in self.kernels:
            verdict = ["runs"] if kernel.name == self.selected else []
            if kernel.reason is not None:
                verdict.append(kernel.reason)
            if kernel.cost is not None:
                threads = f"{kernel.threads} thread" + "s" * (kernel.threads != 1)
                verdict.append(f"estimated {kernel.cost / 1e3:.3g} us on {threads}")
            lines.append(f"  {kernel.name:<{width}}  {', '.join(verdict)}")
        return "\n".join(lines)


def explain(x: Tensor, weight: Weight) -> Explanation:
    """Says which kernel `linear(x, weight)` runs, and why the others do not.

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
    layout = getattr(weight, "layout", None) or available.kernel_layout(x.device, weight.format)
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
    threads = requests.usable_threads(torch.get_num_threads())
    request = (
        f"linear {name} {format.name} M={m} N={n} K={k} on {device_type}, at most {threads} threads"
    )
    backend = backends.find(device_type, layout)
    sparse = None
    if format.outliers:
        how = backends.of_device(device_type).sparse_name()
        sparse = f"{format.num_outliers(k)} a row in {format.outlier_dtype}, {how}"
    if backend is CPU:
        selected, known = CPU.explain(format, n, k, m, name, threads)
        return Explanation(request, selected, tuple(Kernel(*each) for each in known), sparse)
    selected = REFERENCE
    if format.activation is None and dtype != torch.uint8:
        selected = backend.describe(format, n, k, m, dtype, torch.device(device_type))
    return Explanation(request, selected, (), sparse)
