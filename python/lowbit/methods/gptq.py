"""GPTQ (Frantar et al., arXiv 2210.17323) for any format: codes that minimise the error of outputs.

Columns are rounded one after the other, and what a column loses is made up for by those that
follow, as the Hessian H of the inputs says. With H = R R^T and U = R^-1, both upper triangular, the
loss tr((W - W^) H (W - W^)^T) is the sum of ((w_j - q_j) / U_jj)^2 over columns j as they are
rounded, w_j being the updated weight (QuIP, arXiv 2307.13304, calls the same method LDLQ).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lowbit import ops, reference  # noqa: F401  (ops registers torch.ops.lowbit)
from lowbit.formats import INTEGER_SCALES, Format, as_format
from lowbit.methods import grid, kmeans, nearest, search
from lowbit.methods.errors import errors
from lowbit.weights.quantized import QuantTensor

# Rows that are swept together hold about this many weights in fp64: 128 MiB.
_SLICE_WEIGHTS = 1 << 24
# Scales whose second level other groups share: they cannot follow the updates of a group.
_SHARED_SCALES = ("e4m3", "dq8", *INTEGER_SCALES)
# What damping "auto" chooses from.
DAMPINGS = (0.01, 0.05, 0.1, 0.3)


@torch.no_grad()
def quantize(
    weight: Tensor,
    format: Format | str,
    *,
    hessian: Tensor,
    damping: float | Literal["auto"] = 0.01,
    act_order: bool = False,
    block: int = 128,
    table: Tensor | None = None,
    held_out: Tensor | None = None,
) -> QuantTensor:
    """Rounds `weight` so that ||(W - W^) X^T|| is small, by the second moment of the inputs X.

    As in the paper: `damping` times the mean of H's diagonal is added to the diagonal; columns are
    updated in blocks, which changes no result but for rounding; the scales and zeros of a group are
    those that round to nearest would choose for the group's updated weights; with `act_order` (of
    the authors' code) columns go by falling H_jj and all scales are fixed before the first one. Our
    reading: scales with a second level ("e4m3", "dq8") are fixed first always. The tables of a
    fitted format are fixed first, too, by k-means where a weight counts 1 / U_jj^2; only tables per
    group are fitted to the updated weights (fixed tables with nearly an entry for each of their
    weights fit only the weights before the updates, and can be worse). A column without inputs
    (H_jj = 0) is rounded to nearest. The factorisation and the updates are in fp64, codes are
    chosen in fp32. Needs about 32 K^2 bytes.

    Args:
        weight: (N, K) in fp32, bf16, fp16 or fp64, finite, not empty.
        format: any Format or its name.
        hessian: (K, K) floating, X^T X / samples up to a factor: symmetric, positive
            semi-definite, on the device of `weight`.
        damping: at least 0; 0 needs a Hessian of full rank. "auto": of `DAMPINGS` the one whose
            weight, made by the moment of the other inputs, has the least error of outputs on the
            inputs held out, the smallest of equal ones; the result is then made by all inputs.
        act_order: whether columns with larger inputs go first.
        block: columns whose updates of all later columns are done in one product.
        table: values of a fitted format, as in `rtn.quantize`, instead of fitting them.
        held_out: the part of `hessian`, which is a sum, that comes of inputs held out, (K, K); for
            damping "auto", which needs it.

    Raises:
        TypeError, ValueError: as `rtn.quantize`; `hessian` or `held_out` is not as said above, is zero, or is
            singular with this damping; `damping` or `block` is out of range.
    """
    format = as_format(format)
    grid.check_weight(weight, format)
    check_hessian(hessian, weight)
    if isinstance(damping, str):
        how = {"act_order": act_order, "block": block, "table": table}
        damping = _chosen_damping(weight, format, hessian, damping, held_out, how)
    elif held_out is not None:
        raise ValueError(f"held_out is for damping 'auto', got damping {damping}")
    if not 0 <= damping < float("inf"):
        raise ValueError(f"damping must be finite and at least 0, got {damping}")
    if block < 1:
        raise ValueError(f"block must be at least 1, got {block}")
    follows = format.group is not None and format.scale not in _SHARED_SCALES and not act_order
    sweep = _Sweep.of(hessian, damping, act_order, follows, block)
    fits = format.fitted and table is None and not (follows and format.table_scope == "group")
    if fits:
        importance = sweep.importance().expand(weight.shape)
        start = search if search.by_default(format) else kmeans
        qt = start.quantize(weight, format, weights=importance)
    else:
        qt = grid.start(weight, format)
    if table is not None:
        grid.set_table(qt, table)
    n, k = weight.shape
    step = max(1, _SLICE_WEIGHTS // k)
    for begin in range(0, n, step):
        rows = slice(begin, min(n, begin + step))
        codes = sweep.codes(qt, rows, weight[rows], refit=format.fitted and table is None)
        qt.tensors["codes"][rows] = torch.ops.lowbit.pack(codes, format.spec)
    return qt


def _chosen_damping(
    weight: Tensor,
    format: Format,
    hessian: Tensor,
    damping: str,
    held_out: Tensor | None,
    how: dict[str, Any],
) -> float:
    if damping != "auto":
        raise ValueError(f"damping must be a number or 'auto', got {damping!r}")
    if held_out is None:
        raise ValueError(
            "damping 'auto' needs held_out, the second moment of inputs held out: use quantize_model"
        )
    check_hessian(held_out, weight, "held_out")
    h = held_out.double()
    rest = hessian.double() - h
    check_hessian(rest, weight, "hessian without held_out")
    losses = []
    for value in DAMPINGS:
        made = quantize(weight, format, hessian=rest, damping=value, **how)
        losses.append(sum(float(((e @ h) * e).sum()) for _, e in errors(weight, made)))
    return DAMPINGS[losses.index(min(losses))]


def check_hessian(hessian: Tensor, weight: Tensor, name: str = "hessian") -> None:
    """Raises TypeError or ValueError unless this is a second moment of the inputs of `weight`."""
    if not isinstance(hessian, Tensor) or hessian.dtype not in grid.WEIGHT_DTYPES:
        got = hessian.dtype if isinstance(hessian, Tensor) else type(hessian).__name__
        raise TypeError(f"{name} must be a floating tensor, got {got}")
    k = weight.shape[1]
    if tuple(hessian.shape) != (k, k) or hessian.device != weight.device:
        raise ValueError(
            f"{name} of a weight of shape {tuple(weight.shape)} on {weight.device} must be "
            f"({k}, {k}) there, got {tuple(hessian.shape)} on {hessian.device}"
        )
    if not bool(torch.isfinite(hessian).all()):
        raise ValueError(f"{name} must be finite, it holds NaN or inf")
    diagonal = hessian.diagonal()
    if bool((diagonal < 0).any()):
        j = int(diagonal.argmin())
        raise ValueError(
            f"{name} must be positive semi-definite, got {name}[{j}, {j}] = {float(diagonal[j])}"
        )
    top = float(diagonal.max())
    if top == 0:
        raise ValueError(f"{name} is zero on its diagonal: it is that of no input at all")
    # Sums in fp32 or less, in different orders on the two sides.
    skew = float((hessian - hessian.T).abs().max())
    if skew > 1e-2 * top:
        raise ValueError(f"{name} must be symmetric, |H - H^T| reaches {skew:g}")


def inverse_factor(hessian: Tensor, damping: float) -> Tensor:  # (K, K) fp64, upper triangular
    """U with (H + damping * mean(diag H) * I)^-1 = U^T U.

    It is R^-1 for the H = R R^T of a Cholesky factorisation that starts at the last column, so H is
    never inverted.

    Raises:
        ValueError: the damped Hessian is not positive definite in fp64.
    """
    h = hessian.double()
    h = (h + h.T) / 2
    h.diagonal().add_(damping * float(h.diagonal().mean()))
    lower, info = torch.linalg.cholesky_ex(h.flip(0, 1))
    if int(info) != 0 or not bool(torch.isfinite(lower).all()):
        raise ValueError(
            f"hessian is singular or not positive definite with damping {damping:g}: use a larger "
            "damping or more calibration data"
        )
    upper = lower.flip(0, 1)
    return torch.linalg.solve_triangular(
        upper, torch.eye(len(h), dtype=h.dtype, device=h.device), upper=True
    )


class _Grid:
    """The values that the weights of one group may take, row by row."""

    def __init__(
        self,
        format: Format,
        scale: Tensor | None,  # (R, 1) fp32
        zero: Tensor | None,  # (R, 1) fp32
        table: Tensor,  # (E,) or (R, E) fp32
    ) -> None:
        self.format, self.scale, self.table = format, scale, table
        self.zero = zero
        self.nearest = nearest.Nearest(table) if format.codec == "lut" else table

    def round(self, w: Tensor) -> tuple[Tensor, Tensor]:  # (R, 1) fp32 -> uint8 and fp32, (R,)
        """The nearest codes and what they stand for, scaled."""
        low = self.zero if self.format.zero == "min" else None
        ratio = grid.scaled(w, self.format, self.scale, low)
        codes = grid.find_codes(ratio, self.format, self.zero, self.nearest)
        index = codes.long()
        values = self.table[index] if self.table.dim() == 1 else self.table.gather(1, index)
        values = reference.apply_scales(values, self.format, self.scale, self.zero)
        return codes[:, 0], values[:, 0]


class _Grids:
    """The grids of a slice of rows, one per group: fixed, or fitted when a group's turn comes."""

    def __init__(self, qt: QuantTensor, rows: slice, sweep: _Sweep, refit: bool) -> None:
        self.qt, self.rows, self.sweep, self.refit = qt, rows, sweep, refit
        scales = reference.effective_scales(qt)
        self.scales = None if scales is None else scales[rows]
        self.zeros = reference.effective_zeros(qt, rows)
        self.grids: dict[int, _Grid] = {}
        fitted = qt.format.fitted
        self.fixed = None if fitted else grid.fixed_table(qt.format, qt.device)

    def __getitem__(self, group: int) -> _Grid:
        if group not in self.grids:
            scale = None if self.scales is None else self.scales[:, group, None]
            zero = None if self.zeros is None else self.zeros[:, group, None]
            self.grids[group] = _Grid(self.qt.format, scale, zero, self._table(group))
        return self.grids[group]

    def _table(self, group: int) -> Tensor:
        if self.fixed is not None:
            return self.fixed
        table, scope = self.qt.tensors["table"], self.qt.format.table_scope
        if scope == "tensor":
            return table
        if scope == "pair":
            chosen = reference.chosen_tables(self.qt.tensors["scales"][self.rows], self.qt.format)
            assert chosen is not None
            return table[chosen[:, group]]
        return table[self.rows] if scope == "row" else table[self.rows][:, group]

    def fit(self, group: int, columns: slice, w: Tensor) -> None:  # w (R, group) fp64
        """Fits scales, zeros and a group's own tables to its updated weights, and stores them."""
        qt, format, single = self.qt, self.qt.format, w.to(torch.float32)
        try:
            if self.refit and format.table_scope == "group":
                importance = self.sweep.importance()[columns].expand(w.shape)
                part = kmeans.quantize(single, format, weights=importance)
            else:
                part = grid.start(single, format)
        except ValueError as e:
            raise ValueError(f"columns {columns.start} to {columns.stop} as updated: {e}") from None
        names = {"scales", "zeros"} & set(qt.tensors)
        if self.refit and format.table_scope == "group":
            names.add("table")
        for name in names:
            qt.tensors[name][self.rows, group] = part.tensors[name][:, 0]
        effective = reference.effective_scales(part)
        if self.scales is not None and effective is not None:
            self.scales[:, group] = effective[:, 0]
        zeros = reference.effective_zeros(part)
        if self.zeros is not None and zeros is not None:
            self.zeros[:, group] = zeros[:, 0]
        # No earlier group is rounded again.
        self.grids.clear()


@dataclass(frozen=True)
class _Sweep:
    """One way through the columns.

    Attributes:
        factor: U for columns in the order of the sweep, (K, K) fp64.
        order: the columns.
        follows: whether the scales of a group are fitted to its updated weights; needs the order
            0, 1, 2, ...
    """

    factor: Tensor
    order: list[int]
    follows: bool
    block: int

    @classmethod
    def of(
        cls, hessian: Tensor, damping: float, act_order: bool, follows: bool, block: int
    ) -> _Sweep:
        order = torch.arange(len(hessian), dtype=torch.int64, device=hessian.device)
        if act_order:
            order = hessian.diagonal().argsort(descending=True, stable=True)
            hessian = hessian[order][:, order]
        return cls(inverse_factor(hessian, damping), order.tolist(), follows, block)

    def importance(self) -> Tensor:  # (K,) fp64, by column of the weight
        """What the squared error of each column counts, 1 / U_jj^2; the largest is 1."""
        square = self.factor.diagonal().square()
        by_column = torch.empty_like(square)
        by_column[self.order] = square.min() / square
        return by_column

    def blocks(self, format: Format) -> list[list[slice]]:
        """Blocks of columns; each is a list of segments, before which its scales are fitted.

        A group whose scales follow the updates starts a segment, and does not cross into a block
        that it does not start, unless it is longer: all its columns are up to date then.
        """
        k, size = len(self.order), self.block
        if not self.follows or format.group is None:
            return [[slice(a, min(k, a + size))] for a in range(0, k, size)]
        group = format.group
        blocks = []
        if group < size:
            per_block = size // group * group
            for a in range(0, k, per_block):
                end = min(k, a + per_block)
                blocks.append([slice(s, min(end, s + group)) for s in range(a, end, group)])
            return blocks
        for a in range(0, k, group):
            end = min(k, a + group)
            blocks += [[slice(s, min(end, s + size))] for s in range(a, end, size)]
        return blocks

    def codes(self, qt: QuantTensor, rows: slice, weight: Tensor, refit: bool) -> Tensor:
        """Codes (R, K) of a slice of rows; with `follows` fills its scales, zeros and tables."""
        format = qt.format
        k = len(self.order)
        group = format.group or k
        grids = _Grids(qt, rows, self, refit)
        # Columns are contiguous: (K, R).
        work = weight.double().T[self.order].contiguous()
        codes = torch.empty(work.shape, dtype=torch.uint8, device=work.device)
        for segments in self.blocks(format):
            begin, end = segments[0].start, segments[-1].stop
            lost = torch.empty_like(work[begin:end])
            for segment in segments:
                before = slice(begin, segment.start)
                done = lost[: segment.start - begin]
                work[segment] -= self.factor[before, segment].T @ done
                if self.follows and segment.start % group == 0:
                    columns = slice(segment.start, min(k, segment.start + group))
                    grids.fit(segment.start // group, columns, work[columns].T)
                for j in range(segment.start, segment.stop):
                    within = lost[segment.start - begin : j - begin]
                    w = work[j] - self.factor[segment.start : j, j] @ within
                    column = self.order[j]
                    single = w.to(torch.float32).unsqueeze(1)
                    codes[column], q = grids[column // group].round(single)
                    lost[j - begin] = (w - q) / self.factor[j, j]
            work[end:] -= self.factor[begin:end, end:].T @ lost
            if not bool(torch.isfinite(work[end:]).all() & torch.isfinite(lost).all()):
                raise ValueError("hessian is too close to singular: use a larger damping")
        return codes.T.contiguous()
