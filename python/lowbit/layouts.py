"""Operands: the tensors that an op takes, in a named layout, made from a QuantTensor and turned back into one.

"canonical": codes as in `packing.py`; scales (N, groups) with the second level applied; zeros (N, groups);
    table: the fitted table, or None if the format carries it. Outliers lie so in every layout, (N, P).
"n16": the CPU kernels' layout, N in the lanes, padded to whole blocks of 64 columns and 32 weights along K.
    codes: flat uint8, described in csrc/layout.h; scales (N/64, groups, 64) fp32, fp16 or bf16; zeros
    (N/64, groups, 64): int8 holding zero - 2^(bits-1), or a float dtype; table: fp32 (2^bits,), padded with zeros,
    or (N/64, 1 or groups, 2^bits, 64) for a table per row or group. Integer tables are centred by 2^(bits-1).
"m16": the CUDA kernels' layout. codes: flat int32, described in fragments.py; scales and zeros as in "n16", in blocks
    of 16; table as in "n16". No tables per row or group, and groups that fit tiles of 64 weights: see `fits_m16`.
"k16": the Triton kernels' layout. codes: flat int32, described in planes.py; scales and zeros (groups, N), dtypes as
    in "canonical"; table: fp32 (2^bits,), padded with zeros, or (N, 2^bits), or (N, groups, 2^bits); none for integers.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from lowbit import _C, fragments, modes, packing, planes, reference, strides
from lowbit.forking import alone_after_fork
from lowbit.formats import Format
from lowbit.weights.quantized import SCALE_DTYPES, QuantTensor, tensor_specs

CANONICAL = "canonical"
N16 = "n16"
K16 = "k16"
M16 = "m16"
LAYOUTS = (CANONICAL, N16, K16, M16)
BLOCK_N = 64  # csrc/layout.h kBlockN
# Rows whose scales lie side by side.
_BLOCKS = {N16: BLOCK_N, M16: fragments.TILE_N}
CHUNK_K = 32  # csrc/layout.h kChunkK

_logger = logging.getLogger("lowbit")

# Canonical tensors that a two-level scale needs besides its fp32 product; `Operands.second` keeps them.
_SECOND_LEVEL = ("scales", "scales2", "scales2_offset")
# The scales that an op reads: a second level is multiplied out, a power of two is a bf16 value.
_PRODUCT_DTYPES = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "e8m0": torch.bfloat16,
    "e4m3": torch.float32,
    "dq8": torch.float32,
}


@dataclass(frozen=True)
class Operands:
    """What an op reads. `second` holds canonical scales that cannot be recovered from the products."""

    format: Format
    shape: tuple[int, int]
    layout: str
    codes: Tensor
    scales: Tensor | None
    zeros: Tensor | None
    table: Tensor | None
    second: dict[str, Tensor]
    outlier_columns: Tensor | None = None
    outlier_values: Tensor | None = None
    # Of the format, with and without outliers, kept: making one takes longer than a small product.
    spec: str = field(init=False, repr=False)
    spec_without_outliers: str = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "spec", self.format.spec)
        object.__setattr__(self, "spec_without_outliers", self.format.without_outliers.spec)


def kernel_layout(device: torch.device, format: Format) -> str:
    """The layout that the kernels of a device read for a format."""
    if device.type == "cpu":
        return N16
    if device.type != "cuda":
        return CANONICAL
    if cuda_obstacle() is None and fits_m16(format):
        return M16
    return K16 if has_triton() else CANONICAL


def _find_cuda_obstacle() -> str | None:
    if importlib.util.find_spec("lowbit._cuda") is None:
        return "the package was built without nvcc"
    return "LOWBIT_CUDA=0 is set" if os.environ.get("LOWBIT_CUDA") == "0" else None


# Found once: torch.compile cannot look for modules.
_CUDA_OBSTACLE = _find_cuda_obstacle()
_HAS_TRITON = importlib.util.find_spec("triton") is not None


def cuda_obstacle() -> str | None:
    """Why the CUDA kernels do not run; None if they are built and LOWBIT_CUDA=0 was not set at import."""
    return _CUDA_OBSTACLE


@functools.cache
def _log_layout(layout: str) -> None:
    why = (
        "" if layout == M16 else f": {cuda_obstacle() or 'the CUDA kernels do not know the format'}"
    )
    _logger.info("weights on the GPU take the layout %s%s", layout, why)


def fits_m16(format: Format) -> bool:
    """Whether the CUDA kernels run a format: one table, and groups of 16, 32, multiples of 64 or whole rows."""
    whole_tiles = format.group is None or format.group in (16, 32) or format.group % 64 == 0
    return format.table_scope == "tensor" and whole_tiles


def has_triton() -> bool:
    """Whether the Triton kernels can run."""
    return _HAS_TRITON


@modes.outside()
@alone_after_fork
def to_operands(qt: QuantTensor, layout: str | None = None) -> Operands:
    """Converts to `layout`, by default that of the kernels of the weight's device; the tensors may have any strides.

    Raises:
        ValueError: the columns of outliers are not ascending or not in the row.
    """
    qt = qt.map(lambda t: strides.contiguous(modes.normal(t)))
    qt.check_columns()
    if layout is None:
        layout = kernel_layout(qt.device, qt.format)
        if qt.device.type == "cuda":
            _log_layout(layout)
    outliers = (qt.outlier_columns, qt.outlier_values)
    scales = qt.scales
    second: dict[str, Tensor] = {}
    if qt.format.scale in ("dq8", "e4m3"):
        second = {k: t for k, t in qt.tensors.items() if k in _SECOND_LEVEL}
        scales = reference.effective_scales(qt)
    elif qt.format.scale == "e8m0":
        # A power of two: exact in bf16.
        scales = reference.e8m0_values(qt.tensors["scales"]).to(torch.bfloat16)
    if layout == CANONICAL:
        return Operands(
            qt.format,
            qt.shape,
            layout,
            qt.tensors["codes"],
            scales,
            qt.zeros,
            qt.table,
            second,
            *outliers,
        )
    if layout == K16:
        return Operands(
            qt.format,
            qt.shape,
            layout,
            planes.pack_planes(qt.unpack(), qt.format.bits),
            None if scales is None else from_rows(scales, layout),
            None if qt.zeros is None else from_rows(qt.zeros, layout),
            _plain_table(qt.format, qt.table, qt.device),
            second,
            *outliers,
        )
    _check_layout(layout)
    n, k = qt.shape
    if layout == M16:
        if not fits_m16(qt.format):
            raise ValueError(f"format {qt.format.name!r} does not fit the layout {M16!r}")
        codes = fragments.pack_fragments(qt.unpack(), qt.format.bits)
    else:
        packed = qt.tensors["codes"].contiguous().numpy()
        threads = torch.get_num_threads()
        codes = torch.from_numpy(_C.prepack(packed, n, k, qt.format.bits, qt.format.base, threads))
    return Operands(
        qt.format,
        qt.shape,
        layout,
        codes,
        None if scales is None else from_rows(scales, layout),
        None if qt.zeros is None else from_rows(_centre_zeros(qt.zeros, qt.format), layout),
        kernel_table(qt.format, qt.table).to(qt.device),
        second,
        *outliers,
    )


@modes.outside()
@alone_after_fork
def from_operands(op: Operands) -> QuantTensor:
    """Inverse of `to_operands`, bit for bit."""
    n, k = op.shape
    f = op.format
    codes, scales, zeros, table = canonical_tensors(op)
    tensors = {**op.second, "codes": codes}
    if scales is not None and not op.second:
        if f.scale == "e8m0":
            # The exponent field of a bf16 power of two is the E8M0 code; 2^-127 is subnormal and gives 0.
            scales = (scales.contiguous().view(torch.int16) >> 7).to(SCALE_DTYPES["e8m0"])
        tensors["scales"] = scales
    if zeros is not None:
        tensors["zeros"] = zeros
    if table is not None:
        tensors["table"] = table
    if op.outlier_columns is not None and op.outlier_values is not None:
        tensors |= {"outlier_columns": op.outlier_columns, "outlier_values": op.outlier_values}
    specs = tensor_specs(f, n, k)
    return QuantTensor(f, op.shape, {name: _compact(tensors[name]) for name in specs})


def _compact(t: Tensor) -> Tensor:
    """A tensor that fills its memory: files get all of that, and safetensors refuses a part of it."""
    whole = t.untyped_storage().nbytes() == t.numel() * t.element_size()
    return t if whole and t.is_contiguous() else t.clone(memory_format=torch.contiguous_format)


def canonical_tensors(op: Operands) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Codes, scales, zeros and table in canonical layout."""
    n, f = op.shape[0], op.format
    scales, zeros = (
        None if t is None else by_row(t, layout=op.layout, n=n) for t in (op.scales, op.zeros)
    )
    if zeros is not None and op.layout in _BLOCKS and f.zero == "int":
        zeros = (zeros.to(torch.int16) + 2 ** (f.bits - 1)).to(torch.uint8)
    return packed_codes(op), scales, zeros, table_of(op) if f.fitted else None


def packed_codes(op: Operands) -> Tensor:  # (N, row bytes) uint8
    """The codes in canonical packing."""
    if op.layout == CANONICAL:
        return op.codes
    n, k = op.shape
    f = op.format
    if op.layout == K16:
        return packing.pack_codes(planes.unpack_planes(op.codes, f.bits, n, k), f)
    if op.layout == M16:
        return packing.pack_codes(fragments.unpack_fragments(op.codes, f.bits, n, k), f)
    codes = _C.unprepack(op.codes.numpy(), n, k, f.bits, f.base, torch.get_num_threads())
    return torch.from_numpy(codes)


def table_of(op: Operands) -> Tensor | None:
    """The table as `reference.code_values` takes it: (E,), (N, E) or (N, groups, E) by scope."""
    if op.table is None or op.layout != N16 or op.format.table_scope == "tensor":
        return op.table
    blocks, groups, entries, lanes = op.table.shape
    table = op.table.permute(0, 3, 1, 2).reshape(blocks * lanes, groups, entries)[: op.shape[0]]
    return table.squeeze(1) if op.format.table_scope == "row" else table


def operand_specs(
    format: Format, layout: str, n: int, k: int
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of each operand of an (n, k) weight; an operand that is absent has no entry."""
    groups = format.num_groups(k)
    specs = {
        name: spec
        for name, spec in tensor_specs(format, n, k).items()
        if name not in ("scales2", "scales2_offset")
    }
    if format.scale is not None:
        specs["scales"] = ((n, groups), _PRODUCT_DTYPES[format.scale])
    if layout == CANONICAL:
        return specs
    _check_layout(layout)
    if layout == K16:
        specs["codes"] = ((planes.num_words(format.bits, n, k),), torch.int32)
        for name in {"scales", "zeros"} & specs.keys():
            specs[name] = ((groups, n), specs[name][1])
        if format.codec != "affine" and "table" not in specs:
            specs["table"] = ((2**format.bits,), torch.float32)
        return specs
    lanes, entries = _BLOCKS[layout], 2**format.bits
    blocks = -(-n // lanes)
    unit_bytes = 64 * format.bits  # csrc/layout.h: 16 columns x 32 weights
    specs["codes"] = ((blocks * (BLOCK_N // 16) * -(-k // CHUNK_K) * unit_bytes,), torch.uint8)
    if layout == M16:
        specs["codes"] = ((fragments.num_words(format.bits, n, k),), torch.int32)
    for name in {"scales", "zeros"} & specs.keys():
        specs[name] = ((blocks, groups, lanes), specs[name][1])
    if format.zero == "int":
        specs["zeros"] = (specs["zeros"][0], torch.int8)
    table_groups = {"tensor": 0, "row": 1, "group": groups}[format.table_scope]
    table_shape = (blocks, table_groups, entries, BLOCK_N) if table_groups else (entries,)
    specs["table"] = (table_shape, torch.float32)
    return specs


def _check_layout(layout: str) -> None:
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {LAYOUTS}, got {layout!r}")


def by_row(values: Tensor, *, layout: str, n: int) -> Tensor:  # (n, groups)
    """Scales or zeros of a layout as rows. Differentiable."""
    if layout in _BLOCKS:
        return from_lanes(values, n)
    return values.t() if layout == K16 else values


def from_rows(values: Tensor, layout: str) -> Tensor:
    """Scales or float zeros (N, groups) as a layout has them. Differentiable."""
    if layout in _BLOCKS:
        return to_lanes(values, _BLOCKS[layout])
    return values.t().contiguous() if layout == K16 else values


def to_lanes(
    values: Tensor, lanes: int
) -> Tensor:  # (N, groups) -> (ceil(N / lanes), groups, lanes)
    """Brings rows into the last dimension; missing rows are zero. Differentiable."""
    n, groups = values.shape
    padded = F.pad(values, (0, 0, 0, -n % lanes))
    return padded.view(-1, lanes, groups).transpose(1, 2).contiguous()


def from_lanes(values: Tensor, n: int) -> Tensor:  # (ceil(n / lanes), groups, lanes) -> (n, groups)
    """Inverse of `to_lanes`."""
    blocks, groups, lanes = values.shape
    return values.transpose(1, 2).reshape(blocks * lanes, groups)[:n].contiguous()


def kernel_table(format: Format, table: Tensor | None) -> Tensor:
    """The "n16" and "m16" table of a format: see the top of this file. Differentiable in a fitted table."""
    if table is None:
        values = torch.tensor(format.values(), dtype=torch.float32, device="cpu")
        if format.zero == "int":
            values = values - 2 ** (format.bits - 1)
        return F.pad(values, (0, 2**format.bits - values.numel()))
    if format.table_scope == "tensor":
        return table
    table = table.unsqueeze(1) if table.dim() == 2 else table  # (N, 1 or groups, E)
    n, groups, entries = table.shape
    padded = F.pad(table, (0, 0, 0, 0, 0, -n % BLOCK_N))
    return padded.view(-1, BLOCK_N, groups, entries).permute(0, 2, 3, 1).contiguous()


def _plain_table(format: Format, table: Tensor | None, device: torch.device) -> Tensor | None:
    """The "k16" table of a format."""
    if table is not None or format.codec == "affine":
        return table
    values = torch.tensor(format.values(), dtype=torch.float32, device=device)
    return F.pad(values, (0, 2**format.bits - values.numel()))


def _centre_zeros(zeros: Tensor, format: Format) -> Tensor:
    if format.zero != "int":
        return zeros
    return (zeros.to(torch.int16) - 2 ** (format.bits - 1)).to(torch.int8)
