"""`explain` and `fp8.explain`: which kernel runs a linear or an FP8 product, and why it was chosen."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit import backends
from lowbit.backends import available
from lowbit.backends import fp8 as fp8_backends
from lowbit.backends.cpu import CPU, requests
from lowbit.backends.pytorch import PYTORCH
from lowbit.formats import Format
from lowbit.ops import fp8_matmul
from lowbit.ops.terms import Weight
from lowbit.weights.composite import CompositeWeight, describe
from lowbit.weights.lowrank import LowRank
from lowbit.weights.pruned import PrunedTensor
from lowbit.weights.sparse import SparseTerm

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

    `outliers` names what multiplies the outliers of the weight, if it has any, and `lowrank` the low-rank terms.
    `memory`: bytes that the product takes on a GPU beside y and gives back, where that is known.
    """

    request: str
    selected: str
    kernels: tuple[Kernel, ...]
    outliers: str | None = None
    lowrank: str | None = None
    memory: int | None = None

    def __str__(self) -> str:
        lines = [f"{self.request}: {self.selected}"]
        if self.outliers is not None:
            lines.append(f"  outliers: {self.outliers}")
        if self.lowrank is not None:
            lines.append(f"  low rank: {self.lowrank}")
        if self.memory is not None:
            lines.append(f"  temporary memory: {self.memory:,} bytes")
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


def explain(x: Tensor, weight: Weight | PrunedTensor) -> Explanation:
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
    if isinstance(weight, PrunedTensor):
        request = (
            f"linear {_DTYPE_NAMES[x.dtype]} {weight} M={x.numel() // width} on {x.device.type}"
        )
        return Explanation(request, backends.of_device(x.device.type).pruned_name(), ())
    matrix = weight.matrix if isinstance(weight, CompositeWeight) else weight
    layout = getattr(matrix, "layout", None) or available.kernel_layout(x.device, matrix.format)
    m = x.numel() // width if width else 0
    found = explain_request(matrix.format, n, k, m, x.dtype, str(x.device), layout)
    if not isinstance(weight, CompositeWeight):
        return found
    sparse = [describe(term) for term in weight.added if isinstance(term, SparseTerm)]
    lowrank = [term for term in weight.added if isinstance(term, LowRank)]
    if sparse:
        how = backends.of_device(x.device.type).sparse_name()
        found = dataclasses.replace(found, outliers=f"{' + '.join(sparse)}, {how}")
    if lowrank:
        said = [
            _low_rank(
                describe(t), t.rank, getattr(t.left, "format", None), n, k, m, x.device.type, layout
            )
            for t in lowrank
        ]
        found = dataclasses.replace(found, lowrank=" + ".join(said))
    return found


def _low_rank(
    what: str,
    rank: int,
    factor: Format | None,
    n: int,
    k: int,
    m: int,
    device_type: str,
    layout: str,
) -> str:
    """A low-rank term, and the kernels that multiply x by R and the result by L."""
    if factor is None:
        return f"{what}, torch"
    kernels = [
        explain_request(factor, *shape, m, torch.float32, device_type, layout).selected
        for shape in ((rank, k), (n, rank))
    ]
    return f"{what}, {kernels[0]} and {kernels[1]}"


def explain_request(
    format: Format,
    n: int,
    k: int,
    m: int,
    dtype: torch.dtype,
    on: str = "cpu",
    layout: str | None = None,
) -> Explanation:
    """`explain` without tensors: an (m, k) x of `dtype` against an (n, k) weight on a device, by default as kernels
    read it.
    """
    device = torch.device(on)
    device_type = device.type
    layout = layout or available.kernel_layout(device, format)
    name = _DTYPE_NAMES[dtype]
    threads = requests.usable_threads(torch.get_num_threads())
    request = (
        f"linear {name} {format.name} M={m} N={n} K={k} on {device_type}, at most {threads} threads"
    )
    backend = backends.find(device_type, layout)
    sparse = lowrank = None
    if format.rank:
        what = f"rank {format.rank} in {format.factor}"
        lowrank = _low_rank(what, format.rank, format.factor_format, n, k, m, device_type, layout)
    if format.outliers:
        how = backends.of_device(device_type).sparse_name()
        sparse = f"{format.num_outliers(k)} a row in {format.outlier_dtype}, {how}"
    if backend is CPU:
        selected, known = CPU.explain(format.matrix, n, k, m, name, threads)
        kernels = tuple(Kernel(*each) for each in known)
        return Explanation(request, selected, kernels, sparse, lowrank)
    memory = None
    if format.activation is None and dtype != torch.uint8:
        selected = backend.describe(format, n, k, m, dtype, device)
        memory = backend.temporary(format, n, k, m, dtype, device)
    else:
        selected = backend.describe_integers(device)
    passed_over = available.passed_over(device, format, layout)
    kernels = tuple(Kernel(kernel, None, None, why) for kernel, why in passed_over)
    return Explanation(request, selected, kernels, sparse, lowrank, memory)


def explain_fp8(
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    *,
    requantize: str | None = None,
) -> Explanation:
    """Says which kernel `scaled_mm(a, b, scale_a, scale_b, requantize=requantize)` runs, and why the others do not.

    Args:
        a: (M, K); `scaled_mm` says what these may be. Values are not read.
        b: (N, K).
        scale_a, scale_b: their scales.
        requantize: None, "row" or "1x16".

    Returns:
        The kernel, newest instruction sets and fastest loads first; `str()` is a table. `lowbit.kernels()` has those
        of the CPU, of op "fp8_scaled_mm".

    Raises:
        TypeError, ValueError: as `scaled_mm`.
    """
    if a.device.type not in ("cpu", "cuda"):
        raise ValueError(f"a must be on a CPU or a CUDA device, got {a.device}")
    left, right = fp8_matmul.check(a, b, scale_a, scale_b, None, torch.float32)
    if requantize is not None:
        fp8_matmul.check_requantize(requantize)
    (m, k), n = a.shape, b.shape[0]
    request = (
        f"fp8_scaled_mm {left.granularity.name} {right.granularity.name} M={m} N={n} K={k} on {a.device.type}"
        + f", y quantized by {requantize}" * (requantize is not None)
    )
    backend, others = fp8_backends.product(left, right)
    quantized = fp8_backends.quantizing_product(left, right, requantize) is not None
    ready = fp8_matmul.ready(left), fp8_matmul.ready(right)
    kernels = (*others, *backend.explain(*ready, quantized))
    selected = next((name for name, why in kernels if why is None), REFERENCE)
    return Explanation(
        request, selected, tuple(Kernel(name, None, None, why) for name, why in kernels)
    )
