"""Hands FP8 matrices on the CPU to the compiled product. No maths and no checks; `isa` caps the instruction set."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit import _C
from lowbit.backends.cpu.fp8 import SCALE_TYPES, TYPES
from lowbit.backends.cpu.requests import CODES, of_bias
from lowbit.float8 import Scaled
from lowbit.strides import address, address_of_rows


def scaled_mm(
    a: Scaled,  # (M, K), unit stride along K; scales contiguous
    b: Scaled,  # (N, K), likewise
    bias: Tensor | None,  # (N,) contiguous
    dtype: torch.dtype,
    isa: str = "",
) -> Tensor:  # (M, N) in `dtype`
    """`reference.scaled_mm` in fp32, rounded once to `dtype`."""
    (m, k), n = a.q.shape, len(b.q)
    out = torch.empty((m, n), dtype=dtype, device="cpu")
    _C.fp8_matmul_ptr(
        m=m,
        n=n,
        k=k,
        a=_operand(a),
        b=_operand(b),
        **of_bias(bias),
        out=address(out),
        out_dtype=CODES[dtype],
        threads=torch.get_num_threads(),
        isa=isa,
    )
    return out


def explain(*_request: object) -> tuple[tuple[str, str | None], ...]:
    """The kernels, the newest instruction set first, and why they do not run; None for the one that does, whatever the
    product.
    """
    chosen, active = _C.fp8_matmul_name(), _C.isa_active()
    rows = [row for row in _C.kernels() if row["op"] == "fp8_scaled_mm"]
    why = {
        row["name"]: f"this CPU has no {row['isa']}"
        if not row["available"]
        else "a newer one runs"
        if row["isa"] in active
        else "LOWBIT_ISA excludes it"
        for row in rows
    }
    return tuple((name, None if name == chosen else reason) for name, reason in why.items())


def _operand(s: Scaled) -> _C.Fp8Operand:
    """Blocks of scales are powers of two, and shifts find them."""
    rows, columns = s.granularity.rows, s.granularity.columns
    codes, stride = address_of_rows(s.q)
    return _C.Fp8Operand(
        codes=codes,
        stride=stride,
        type=TYPES[s.q.dtype],
        scales=address(s.scale),
        scale_type=SCALE_TYPES[s.scale.dtype],
        row_shift=(rows or 1).bit_length() - 1,
        k_shift=-1 if columns is None else columns.bit_length() - 1,
        scale_stride=0 if rows is None else s.scale.shape[1],
    )
