"""Calibration: what goes into the linears of a model, as running sums that forward hooks update.

Memory is what the sums take, whatever the amount of data: 4 K^2 bytes for each Hessian of a linear
with K input features, on the device of the linear. Padding does not count: `padding.Padding`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from lowbit.ops import checks
from lowbit.ptq.inputs import features_of, inputs_of
from lowbit.ptq.padding import Padding

T = TypeVar("T")

# Rows of an input that are converted to fp32 at a time hold about this many values.
_SLICE_VALUES = 1 << 22
# The Hessians of one part of a model, calibrated together, take at most this, or are one.
_HESSIAN_BYTES = 1 << 31
# Of so many rows one is held out.
_HELD_OUT_OF = 4
# Inputs up to magnitudes beyond these are divided by a power of two: sums of squares fit fp32 then.
_PLAIN = 2.0**-40, 2.0**40


class InputStatistics:
    """Running sums over all rows x (K,) of the inputs of one linear.

    Attributes:
        samples: how many rows there were.
        absmax: max |x_k|, (K,) fp32; 0 before the first row.
    """

    def __init__(
        self, features: int, hessian: bool = True, device: torch.device | str | None = None
    ) -> None:
        """`hessian`: whether the (K, K) sum is kept, too; else only sums per feature."""
        self.samples = 0
        self.absmax = torch.zeros(features, dtype=torch.float32, device=device)
        self._unit = 1.0
        self._abs = torch.zeros(features, dtype=torch.float64, device=device)
        self._square = torch.zeros(features, dtype=torch.float64, device=device)
        self._outer = (  # of x / unit
            torch.zeros(features, features, dtype=torch.float32, device=device) if hessian else None
        )

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Adds x (..., K), floating and finite.

        Raises:
            ValueError: x has another number of features, or holds NaN or inf; no row of the slice
                that holds it is counted then.
        """
        checks.check_tensors(x=x)
        features = len(self.absmax)
        if x.dim() == 0 or x.shape[-1] != features:
            raise ValueError(f"x must have {features} features, got shape {tuple(x.shape)}")
        rows = x.detach().reshape(-1, features)
        for part in rows.split(max(1, _SLICE_VALUES // features)):
            single = part.to(self.absmax.device, torch.float32)
            if not bool(torch.isfinite(single).all()):
                raise ValueError("calibration input holds NaN or inf")
            if not len(single):
                continue
            magnitude = single.abs()
            self.samples += len(single)
            self.absmax = torch.maximum(self.absmax, magnitude.amax(0))
            self._abs += magnitude.sum(0, dtype=torch.float64)
            self._square += single.double().square().sum(0)
            self._set_unit()
            if self._outer is not None:
                if self._unit != 1:
                    single = (single.double() / self._unit).float()
                self._outer.addmm_(single.T, single)

    def _set_unit(self) -> None:
        top = float(self.absmax.max())
        plain = top == 0 or _PLAIN[0] <= top <= _PLAIN[1]
        unit = 1.0 if plain else 2.0 ** math.frexp(top)[1]
        # It grows with the inputs; a first one below 1 finds sums of 0.
        if unit > self._unit and self._outer is not None:
            # Twice: the square of the ratio might be no fp32 number.
            self._outer.mul_(self._unit / unit).mul_(self._unit / unit)
        self._unit = unit

    @property
    def missing(self) -> str | None:
        """Why these inputs say nothing of what a layer must do well; None if they do."""
        if not self.samples:
            return "no input has reached it in calibration"
        return None if bool(self.absmax.any()) else "its inputs are all 0 in calibration"

    @property
    def absmean(self) -> Tensor:
        """The mean of |x_k|, (K,) fp32."""
        return (self._abs / self._count()).float()

    @property
    def unit(self) -> float:
        """What inputs are divided by in the relative Hessian, a power of two."""
        return self._unit

    @property
    def square_sums(self) -> Tensor:
        """The sum of x_k^2, (K,) fp64."""
        return self._square.clone()

    @property
    def diagonal(self) -> Tensor:
        """The mean of x_k^2, (K,) fp32: the diagonal of the Hessian, summed in fp64.

        Raises:
            ValueError: squares of such inputs do not fit fp32, or there were none.
        """
        return self._fitting((self._square / self._count()).float())

    @property
    def hessian(self) -> Tensor:
        """X^T X / samples, (K, K) fp32.

        Raises:
            ValueError: as for `diagonal`; it was not collected.
        """
        h = self.relative_hessian
        return self._fitting(h if self._unit == 1 else h.mul_(self._unit).mul_(self._unit))

    @property
    def relative_diagonal(self) -> Tensor:
        """The diagonal up to a factor, which fits fp32 whatever the inputs."""
        return (self._square / self._count() / self._unit**2).float()

    @property
    def relative_hessian(self) -> Tensor:
        """The Hessian up to a factor, which fits fp32 whatever the inputs."""
        if self._outer is None:
            raise ValueError("hessian was not collected: make the statistics with hessian=True")
        return self._outer / self._count()

    def _fitting(self, squares: Tensor) -> Tensor:
        top = float(self.absmax.max())
        if not bool(torch.isfinite(squares).all()) or (top > 0 and not bool(squares.any())):
            raise ValueError(f"squares of inputs up to {top:.3g} do not fit fp32: scale the inputs")
        return squares

    def _count(self) -> int:
        if not self.samples:
            raise ValueError("calibration is empty: no input has reached this layer")
        return self.samples


class SplitStatistics:
    """The Hessian of the inputs of one linear, and the part of it that comes of rows held out: the
    last quarter of the rows of every call, and a call of less than four rows now and then.
    """

    def __init__(self, features: int, device: torch.device | str | None = None) -> None:
        self._rest, self._held = (InputStatistics(features, device=device) for _ in range(2))

    @classmethod
    def of(cls, model: nn.Module, name: str) -> SplitStatistics:
        """For an `nn.Linear` or a convolution of a model."""
        module = model.get_submodule(name)
        return cls(features_of(module), model.get_parameter(f"{name}.weight").device)

    def update(self, x: Tensor) -> None:
        """Adds x (..., K); errors as `InputStatistics.update`."""
        checks.check_tensors(x=x)
        rows = x.detach().flatten(0, -2) if x.dim() > 1 else x.detach()[None]
        if len(rows) >= _HELD_OUT_OF:
            cut = len(rows) - len(rows) // _HELD_OUT_OF
            self._rest.update(rows[:cut])
            self._held.update(rows[cut:])
            return
        behind = (_HELD_OUT_OF - 1) * self._held.samples < self._rest.samples
        (self._held if behind else self._rest).update(rows)

    @property
    def missing(self) -> str | None:
        """Why one of the parts says nothing; None if both do."""
        if self._rest.missing or not self._held.missing:
            return self._rest.missing
        return f"of the rows held out {self._held.missing}"

    @property
    def relative_hessian(self) -> Tensor:
        """That of all rows, (K, K) fp32, up to a factor."""
        return self._scaled(self._rest) + self._scaled(self._held)

    @property
    def relative_held_out(self) -> Tensor:
        """The part of the rows held out, up to the same factor."""
        return self._scaled(self._held)

    @property
    def relative_diagonal(self) -> Tensor:
        """That of the Hessian of all rows."""
        return self.relative_hessian.diagonal()

    def _scaled(self, part: InputStatistics) -> Tensor:
        """A sum over rows in the larger unit of the two, over the number of all rows."""
        units = self._rest.unit, self._held.unit
        ratio = part.unit / max(units)
        samples = self._rest.samples + self._held.samples
        # Twice: the square of the ratio might be no fp32 number.
        return part.relative_hessian * (part.samples / samples) * ratio * ratio


@contextlib.contextmanager
def collect(
    model: nn.Module, names: Iterable[str], *, hessian: bool = True
) -> Iterator[dict[str, InputStatistics]]:
    """Collects the inputs of the named linears while the model runs in the body of `with`.

    Tokens that an `attention_mask` hides in a call of the model do not count: `padding.Padding`.

    Args:
        model: any module; it is left as it is, and the hooks are removed at the end.
        names: dotted names of modules with `in_features` that take x (..., K) as first argument, or of convolutions
            without groups, whose inputs are patches.
        hessian: as in `InputStatistics`.

    Raises:
        AttributeError: the model has no module of such a name.
        TypeError: a module is not a linear.
    """
    statistics = {}
    for name in names:
        module = model.get_submodule(name)
        features = features_of(module)
        if not features:
            raise TypeError(f"{name} must be a linear, got {type(module).__name__}")
        device = next((t.device for t in (*module.parameters(), *module.buffers())), None)
        statistics[name] = InputStatistics(features, hessian, device)
    with attach(model, statistics):
        yield statistics


class Recorder(Protocol):
    """What can be attached to a linear: `InputStatistics` and every `observers.Observer`."""

    def update(self, x: Tensor, /) -> None:
        """Takes an input x (..., K)."""


@contextlib.contextmanager
def attach(model: nn.Module, recorders: Mapping[str, Recorder]) -> Iterator[None]:
    """Gives recorders the inputs of the modules they are named for while the model runs in the body
    of `with`, but for rows of padding: `padding.Padding`.

    Args:
        model: any module; it is left as it is, and the hooks are removed at the end.
        recorders: by dotted names of modules that take x as first argument.

    Raises:
        AttributeError: the model has no module of such a name.
        ValueError: from the model's forward, with the name: what a recorder raises.
    """
    with Padding.watch(model) as padding, contextlib.ExitStack() as stack:
        for name, recorder in recorders.items():
            module = model.get_submodule(name)
            hook = module.register_forward_pre_hook(_hook(name, recorder, padding))
            stack.callback(hook.remove)
        yield


def _hook(
    name: str, recorder: Recorder, padding: Padding
) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def update(module: nn.Module, args: tuple[Any, ...]) -> None:
        if not args:
            raise TypeError(f"{name}: the input of a linear must be its first positional argument")
        try:
            for rows in inputs_of(module, padding.rows(args[0])):
                recorder.update(rows)
        except ValueError as e:
            raise ValueError(f"{name}: {e}") from e

    return update


def calibrate(
    model: nn.Module,
    names: Sequence[str],
    hessians: Collection[str],
    batches: Iterable[Any],
    advance: Callable[[], object],
) -> dict[str, InputStatistics]:
    """Runs the model as `run` does and collects the inputs of the named linears; those among
    `hessians` with their Hessian.
    """
    full = [name for name in names if name in hessians]
    rest = [name for name in names if name not in hessians]
    with collect(model, full) as first, collect(model, rest, hessian=False) as second:
        run(model, batches, advance)
    return first | second


def as_batches(calibration: Iterable[Any]) -> Sequence[Any]:
    """The inputs as a sequence that can be run several times.

    Raises:
        TypeError: it is a tensor or a mapping, not a sequence of inputs.
        ValueError: it is empty.
    """
    if isinstance(calibration, (Tensor, Mapping, str)) or not isinstance(calibration, Iterable):
        raise TypeError(
            f"calibration must be an iterable of model inputs, got {type(calibration).__name__}"
        )
    batches = list(calibration)
    if not batches:
        raise ValueError("calibration is empty: it must hold at least one input")
    return batches


@torch.no_grad()
def run(model: nn.Module, batches: Iterable[Any], advance: Callable[[], object]) -> None:
    """Runs the model in evaluation mode on every input and calls `advance` after each."""
    with evaluating(model):
        for batch in batches:
            forward(model, batch)
            advance()


def forward(model: nn.Module, batch: Any) -> Any:
    """What the model gives for an input: a tensor, a tuple or list of positional arguments, or a
    mapping of keywords.
    """
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; the modes of all modules are restored."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def parts(items: Iterable[T], hessian: Callable[[T], tuple[int, int]]) -> Iterator[list[T]]:
    """Runs of layers, or groups of them, whose Hessians fit in memory together: `hessian` gives of
    each how many it has, and of how many features.
    """
    part: list[T] = []
    used = 0
    for item in items:
        count, features = hessian(item)
        size = 4 * count * features**2
        if part and used + size > _HESSIAN_BYTES:
            yield part
            part, used = [], 0
        part.append(item)
        used += size
    if part:
        yield part
