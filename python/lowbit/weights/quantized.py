"""QuantTensor: the tensors of one quantized weight matrix in canonical layout, and their Format."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from lowbit import late, packing
from lowbit.formats import DQ_BLOCK, INTEGER_SCALES, Format, as_format
from lowbit.text import html_table

SCALE_DTYPES = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "e8m0": torch.uint8,  # value 2^(byte - 127); torch has float8_e8m0fnu only from 2.7 on
    "e4m3": torch.float8_e4m3fn,
    "dq8": torch.uint8,  # index into `reference.dynamic_map()`
    **dict.fromkeys(INTEGER_SCALES, torch.int8),
}
_FLOAT8 = torch.float8_e4m3fn
# The factors of a low-rank term: dense tensors of these names, or those of a quantized matrix, with its name in front.
FACTORS = ("lowrank_l", "lowrank_r")
# The tensors that a factor may have, canonical ones and operands alike.
FACTOR_TENSORS = ("codes", "scales", "zeros", "table")
TENSOR_NAMES = (
    "codes", "scales", "scales2", "scales2_offset", "zeros", "zeros2", "table", "outlier_columns", "outlier_values",
    *FACTORS, *(f"{factor}_{name}" for factor in FACTORS for name in FACTOR_TENSORS),
)  # fmt: skip


def tensor_specs(format: Format, n: int, k: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of each canonical tensor of an (n, k) weight.

    codes (N, row bytes) uint8; scales (N, groups), integers as int8; scales2: the second level, (N, super-blocks) in
    its dtype for integers, fp32 (ceil(N*groups/256),) for "dq8" over the flattened scales and fp32 (1,) for "e4m3";
    scales2_offset () fp32 for "dq8"; zeros (N, groups), uint8 for integer zeros, else the scales' dtype; zeros2: as
    scales2, for zeros "min" with integers; table fp32 (E,), (N, E), (N, groups, E), (2, E) for a pair, or (E, dim) of
    vectors, only if it is fitted;
    outlier_columns (N, P) int32, ascending in each row, and outlier_values (N, P) fp16 or fp32, the rest of the
    weights there, only with outliers; lowrank_l (N, rank) and lowrank_r (rank, K), or the tensors of two quantized
    matrices of these shapes, lowrank_l_codes and so on, only with a rank.

    Raises:
        ValueError: the rank is not below n and k.
    """
    groups = format.num_groups(k)
    specs: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "codes": ((n, format.row_bytes(k)), torch.uint8)
    }
    if format.scale is not None:
        specs["scales"] = ((n, groups), SCALE_DTYPES[format.scale])
    if format.scale == "e4m3":
        specs["scales2"] = ((1,), torch.float32)
    if format.scale == "dq8":
        specs["scales2"] = ((-(-n * groups // DQ_BLOCK),), torch.float32)
        specs["scales2_offset"] = ((), torch.float32)
    if format.zero == "int":
        specs["zeros"] = ((n, groups), torch.uint8)
    elif format.zero is not None:
        specs["zeros"] = ((n, groups), SCALE_DTYPES[format.scale or "fp32"])
    if format.scale2 is not None:
        second = ((n, format.num_supers(k)), SCALE_DTYPES[format.scale2])
        specs["scales2"] = second
        if format.zero == "min":
            specs["zeros2"] = second
    if format.fitted:
        lead = {"tensor": (), "row": (n,), "group": (n, groups), "pair": (2,)}[format.table_scope]
        values = (format.dim,) if format.dim > 1 else ()
        specs["table"] = ((*lead, 2**format.bits, *values), torch.float32)
    if format.outliers:
        shape = (n, format.num_outliers(k))
        specs["outlier_columns"] = (shape, torch.int32)
        specs["outlier_values"] = (shape, SCALE_DTYPES[format.outlier_dtype])
    if format.rank:
        specs |= _factor_specs(format, n, k)
    return specs


def file_specs(format: Format, n: int, k: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of each tensor of an (n, k) weight in a file: those of `tensor_specs`, but integer scales of 4
    and 6 bits, and zeros that are such, are rows of `packing.pack_scales`, (N, ceil(groups / 4) * bits / 2) uint8.

    Raises:
        ValueError: as `tensor_specs`.
    """
    specs = tensor_specs(format, n, k)
    for name in _packed_in_files(format):
        fours = -(-format.num_groups(k) // 4)
        specs[name] = ((n, fours * packing.scale_bits(format) // 2), torch.uint8)
    return specs


def _packed_in_files(format: Format) -> tuple[str, ...]:
    if not packing.scale_bits(format):
        return ()
    return ("scales", "zeros") if format.zero == "min" else ("scales",)


def factor_shapes(format: Format, n: int, k: int) -> dict[str, tuple[int, int]]:
    """The shapes of L and R, by the names of `FACTORS`."""
    return dict(zip(FACTORS, ((n, format.rank), (format.rank, k)), strict=True))


def _factor_specs(format: Format, n: int, k: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    if format.rank >= min(n, k):
        raise ValueError(
            f"rank must be below {min(n, k)} for a weight of shape ({n}, {k}), got {format.rank} in format "
            f"{format.name!r}"
        )
    shapes, quantized = factor_shapes(format, n, k), format.factor_format
    if quantized is None:
        return {name: (shape, SCALE_DTYPES[format.factor]) for name, shape in shapes.items()}
    return {
        f"{name}_{key}": spec
        for name, shape in shapes.items()
        for key, spec in tensor_specs(quantized, *shape).items()
    }


def stored_bytes(format: Format, n: int, k: int) -> int:
    """Bytes of an (n, k) weight in a file: codes, scales, zeros, tables, outliers and factors."""
    specs = file_specs(format, n, k).values()
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in specs)


class QuantTensor:
    """A quantized (N, K) weight matrix: canonical tensors plus the Format that gives them meaning.

    The constructor checks names, shapes, dtypes and devices; `validate` also looks at the values, and every
    reader of files calls it.
    """

    __slots__ = ("_packed", "format", "shape", "tensors")

    def __init__(
        self, format: Format | str, shape: tuple[int, int], tensors: Mapping[str, Tensor]
    ) -> None:
        self.format = as_format(format)
        if len(shape) != 2 or any(int(s) < 0 for s in shape):
            raise ValueError(f"shape must be (out features, in features), got {tuple(shape)}")
        self.shape = (int(shape[0]), int(shape[1]))
        specs = tensor_specs(self.format, *self.shape)
        if set(tensors) != set(specs):
            raise ValueError(
                f"format {self.format.name!r} has the tensors {sorted(specs)}, got {sorted(tensors)}"
            )
        for name, (expected_shape, dtype) in specs.items():
            t = tensors[name]
            if not isinstance(t, Tensor):
                raise TypeError(f"{name} must be a torch.Tensor, got {type(t).__name__}")
            if tuple(t.shape) != expected_shape or t.dtype != dtype:
                raise ValueError(
                    f"{name} of a {self.shape} weight in format {self.format.name!r} must be {dtype} of shape "
                    f"{expected_shape}, got {t.dtype} of shape {tuple(t.shape)}"
                )
            if t.device != tensors["codes"].device:
                raise ValueError(f"{name} is on {t.device}, codes are on {tensors['codes'].device}")
        self.tensors = {name: tensors[name] for name in TENSOR_NAMES if name in specs}
        self._packed: object | None = None

    def __getattr__(self, name: str) -> Tensor | None:
        """The canonical tensor `name`, or None if the format has none."""
        if name in TENSOR_NAMES:
            return self.tensors.get(name)
        raise AttributeError(f"QuantTensor has no attribute {name!r}")

    @property
    def device(self) -> torch.device:
        """Where all tensors are."""
        return self.tensors["codes"].device

    @property
    def dtype(self) -> torch.dtype:
        """fp32: what `dequantize` computes in."""
        return torch.float32

    def numel(self) -> int:
        """How many weights it stands for: N K."""
        return self.shape[0] * self.shape[1]

    @classmethod
    def from_file(
        cls, format: Format | str, shape: tuple[int, int], tensors: Mapping[str, Tensor]
    ) -> QuantTensor:
        """Inverse of `to_file`; takes scales of a byte each too, which files of before held.

        Raises:
            TypeError, ValueError: as the constructor; a shape is that of neither `file_specs` nor `tensor_specs`.
        """
        f, (n, k) = as_format(format), shape
        whole = dict(tensors)
        for name in _packed_in_files(f):
            t, spec = whole.get(name), file_specs(f, n, k)[name]
            if isinstance(t, Tensor) and (tuple(t.shape), t.dtype) == spec:
                codes = packing.unpack_scales(t, packing.scale_bits(f), f.scale == "int6")
                whole[name] = codes[:, : f.num_groups(k)].contiguous()
        return cls(f, shape, whole)

    def to_file(self) -> dict[str, Tensor]:
        """What a file holds: the tensors of `file_specs`.

        Raises:
            ValueError: an integer scale, or a zero, is beyond the format's range.
        """
        self.check_integers()
        bits = packing.scale_bits(self.format)
        packed = {
            name: packing.pack_scales(self.tensors[name], bits)
            for name in _packed_in_files(self.format)
        }
        return {**self.tensors, **packed}

    @property
    def nbytes(self) -> int:
        """Bytes in a file: of all tensors, integer scales of 4 and 6 bits packed."""
        return stored_bytes(self.format, *self.shape)

    @property
    def bits_per_weight(self) -> float:
        """Average stored bits of a weight: codes, scales, zeros, tables, outliers and factors."""
        n, k = self.shape
        return 8 * self.nbytes / max(1, n * k)

    def _repr_html_(self) -> str:
        """In a notebook: what it is, and the bytes of each tensor."""
        head = f"{self.shape[0]} x {self.shape[1]} {self.format.name}, {self.bits_per_weight:.3f} bits/weight"
        rows = [
            (
                name,
                str(t.dtype).removeprefix("torch."),
                " x ".join(map(str, t.shape)),
                f"{t.nbytes:,}",
            )
            for name, t in self.tensors.items()
        ]
        return html_table(("tensor", "dtype", "shape", "bytes"), rows, f"{head}, {self.device}")

    def unpack(self) -> Tensor:
        """The codes, (N, K) uint8; of structured formats as `packing.unpack_codes` gives them."""
        return packing.unpack_codes(self.tensors["codes"], self.format, self.shape[1])

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight, (N, K): computed in fp32 and rounded once to `dtype`."""
        weight: Tensor = late.dequantize(self, dtype)
        return weight

    def map(self, fn: Callable[[Tensor], Tensor]) -> QuantTensor:
        """The same weight with `fn` applied to each tensor (a move, a clone); dtypes must stay."""
        return QuantTensor(self.format, self.shape, {k: fn(t) for k, t in self.tensors.items()})

    def to(self, device: torch.device | str) -> QuantTensor:
        """The same weight on another device."""
        return self.map(lambda t: t.to(device))

    def cpu(self) -> QuantTensor:
        """The same weight on the CPU."""
        return self.to("cpu")

    def cuda(self, device: int | str | torch.device = "cuda") -> QuantTensor:
        """The same weight on a GPU, by default the current one."""
        return self.to(torch.device("cuda", device) if isinstance(device, int) else device)

    def validate(self) -> QuantTensor:
        """Checks the values: codes within the table, finite scales, zeros, tables and outliers, outliers' columns
        within the row and ascending.

        Raises:
            ValueError: naming the tensor and what is wrong with it.
        """
        packing.check_padding_and_range(self.tensors["codes"], self.format, self.shape[1])
        for name, t in self.tensors.items():
            if t.is_floating_point() and not bool(torch.isfinite(t.float()).all()):
                raise ValueError(f"{name} of a {self.format.name!r} weight holds NaN or inf")
        if self.format.scale == "e8m0" and bool((self.tensors["scales"] == 255).any()):
            raise ValueError("scales hold the E8M0 NaN (byte 255)")
        if self.format.zero == "int" and bool(
            (self.tensors["zeros"].int() >= 2**self.format.bits).any()
        ):
            raise ValueError(f"zeros must be below {2**self.format.bits} in {self.format.name!r}")
        self.check_columns()
        self.check_integers()
        for factor in self.factors:
            if isinstance(factor, QuantTensor):
                factor.validate()
        return self

    def check_integers(self) -> None:
        """Raises ValueError unless integer scales and their zeros are in the range of the format."""
        low, high = INTEGER_SCALES.get(self.format.scale or "", (-128, 127))
        if high == 127 or self.format.scale == "int7" or self.device.type == "meta":
            return  # every byte is one
        for name in ("scales", "zeros"):
            t = self.tensors.get(name)
            if t is None or t.dtype != torch.int8 or t.numel() == 0:
                continue
            least, most = (int(bound) for bound in t.aminmax())
            if least < low or most > high:
                raise ValueError(
                    f"{name} must be in [{low}, {high}] in format {self.format.name!r}, "
                    f"got {least if least < low else most}"
                )

    def check_columns(self) -> None:
        """Raises ValueError unless the columns of outliers are ascending in each row and below K."""
        if not self.format.outliers or self.device.type == "meta":
            return
        columns, k = self.tensors["outlier_columns"], self.shape[1]
        bad = (columns < 0) | (columns >= k)
        bad[:, 1:] |= columns[:, 1:] <= columns[:, :-1]
        if bool(bad.any()):
            row, i = (int(v) for v in bad.nonzero()[0])
            raise ValueError(
                f"outlier_columns must be ascending in each row and in [0, {k}), "
                f"got {int(columns[row, i])} at [{row}, {i}]"
            )

    @property
    def matrix(self) -> QuantTensor:
        """The weight without its outliers or its low-rank term, on the same tensors; itself if it has none."""
        format = self.format.matrix
        if format is self.format:
            return self
        names = tensor_specs(format, *self.shape)
        return QuantTensor(format, self.shape, {name: self.tensors[name] for name in names})

    @property
    def factors(self) -> tuple[Tensor | QuantTensor, ...]:
        """L and R of the low-rank term, on the same tensors; () without one."""
        if not self.format.rank:
            return ()
        shapes, quantized = factor_shapes(self.format, *self.shape), self.format.factor_format
        if quantized is None:
            return tuple(self.tensors[name] for name in shapes)
        return tuple(
            QuantTensor(
                quantized,
                shape,
                {key: self.tensors[f"{name}_{key}"] for key in tensor_specs(quantized, *shape)},
            )
            for name, shape in shapes.items()
        )

    def __reduce__(self) -> tuple[object, ...]:
        # As bytes: torch can write float8 tensors with pickle but not read them.
        raw = {k: t.view(torch.uint8) if t.dtype == _FLOAT8 else t for k, t in self.tensors.items()}
        # Nothing but what torch.load reads with weights_only=True, and `_rebuild`.
        return (_rebuild, (self.format.spec, self.shape, raw))

    def __repr__(self) -> str:
        n, k = self.shape
        return (
            f"QuantTensor({self.format.name}, {n}x{k}, {self.nbytes} bytes, "
            f"{self.bits_per_weight:.3f} bits/weight, {self.device})"
        )


def _rebuild(format: Format | str, shape: tuple[int, int], raw: dict[str, Tensor]) -> QuantTensor:
    """What `QuantTensor.__reduce__` names; `lowbit/__init__.py` makes it known to torch.load."""
    format = as_format(format)
    specs = tensor_specs(format, *shape)
    return QuantTensor(format, shape, {name: t.view(specs[name][1]) for name, t in raw.items()})
