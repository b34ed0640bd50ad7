"""Launches the CUDA kernel of FP8 products (sm_90a). No maths and no checks."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from lowbit.backends import available
from lowbit.float8 import Granularity, Scaled
from lowbit.strides import address, address_of_rows

_GRANULARITIES = ("tensor", "row", "1x128", "128x128")
_TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_MOST_ROWS = 16  # on an H100; results/gpu.json
_ALIGNMENT = 16  # bytes: rows of a and b, which are as many elements
NAME = "cuda_fp8_mm_wgmma"  # what `explain` calls the kernel


def obstacle(device: torch.device, a: Granularity, b: Granularity, m: int) -> str | None:
    """Why the kernel does not run for m rows of a on a GPU: it is not built or not wanted, the GPU lacks its
    instructions, it does not know these scales, or Triton's is faster. None if it runs.
    """
    why = _obstacle(device, a, b)
    if why is None and m > _MOST_ROWS and available.has_triton():
        why = f"Triton's is faster for more than {_MOST_ROWS} rows of a"
    return why


@functools.cache
def _obstacle(device: torch.device, a: Granularity, b: Granularity) -> str | None:
    if (why := available.cuda_obstacle(device)) is not None:
        return why
    capability = torch.cuda.get_device_capability(device)
    if capability != (9, 0):
        return f"its instructions are those of sm_90a, this is sm_{capability[0]}{capability[1]}"
    if a.name not in _GRANULARITIES or b.name not in _GRANULARITIES:
        return f"it does not know the scales {a.name} of a and {b.name} of b"
    return None


def explain(*_request: object) -> tuple[tuple[str, str | None], ...]:
    """The kernel, which runs."""
    return ((NAME, None),)


def scaled_mm(
    a: Scaled,  # (M, K), unit stride along K
    b: Scaled,  # (N, K), unit stride along K
    bias: Tensor | None,  # (N,)
    dtype: torch.dtype,
) -> Tensor:  # (M, N) in `dtype`
    """(a * scale_a) (b * scale_b)^T + bias: sums leave the tensor cores after every 128 of K."""
    from lowbit import _cuda

    (m, k), n, device = a.q.shape, len(b.q), a.q.device
    out = torch.empty((m, n), dtype=dtype, device=device)
    if out.numel() == 0:
        return out
    a, b = (Scaled(_aligned(s.q), s.scale.float(), s.granularity) for s in (a, b))
    with torch.cuda.device(device):
        _cuda.fp8_scaled_mm(
            device.index or 0,
            torch.cuda.current_stream(device).cuda_stream,
            _operand(a),
            _operand(b),
            m,
            n,
            k,
            address(bias),
            "fp32" if bias is None else _TYPES[bias.dtype],
            address(out),
            _TYPES[dtype],
        )
    return out


def _operand(s: Scaled) -> tuple[int, int, bool, int, str]:
    e5m2 = s.q.dtype == torch.float8_e5m2
    return *address_of_rows(s.q), e5m2, address(s.scale), s.granularity.name


def _aligned(t: Tensor) -> Tensor:
    """t, or a copy of it, with rows at multiples of 16 bytes, none of them within another."""
    apart = t.stride(0) >= t.shape[1] and t.stride(0) % _ALIGNMENT == 0
    if apart and t.data_ptr() % _ALIGNMENT == 0:
        return t
    padded = F.pad(t.view(torch.uint8), (0, -t.shape[1] % _ALIGNMENT))
    copied = padded
    if padded.data_ptr() == t.data_ptr() or padded.stride(0) < padded.shape[1]:
        copied = padded.clone(memory_format=torch.contiguous_format)
    return copied.view(t.dtype)[:, : t.shape[1]]
