"""Observers against torch.ao, numpy and sums over all values."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from lowbit.methods import clipping
from lowbit.ptq import OBSERVERS, Grid, Observer, attach
from lowbit.ptq.observers import (
    BINS,
    EMAObserver,
    KLObserver,
    MinMaxObserver,
    MSEObserver,
    PercentileObserver,
)

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
BATCHES = [
    torch.randn(50, 20, generator=torch.Generator().manual_seed(i)) * (i + 1) for i in range(5)
]
SHIFTED = [b + 2 for b in BATCHES]
POSITIVE = [b.relu() for b in BATCHES]


def fed(observer: Observer, batches: list[torch.Tensor]) -> Observer:
    for batch in batches:
        observer.update(batch)
    return observer


@pytest.mark.parametrize("batches", [BATCHES, SHIFTED, POSITIVE], ids=["normal", "shifted", "relu"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("name", ["minmax", "ema"])
def test_ranges_are_those_of_torch(name: str, symmetric: bool, bits: int, batches):
    from torch.ao.quantization import MinMaxObserver, MovingAverageMinMaxObserver

    low = -(2 ** (bits - 1)) + symmetric
    arguments = {
        "dtype": torch.qint8,
        "qscheme": torch.per_tensor_symmetric if symmetric else torch.per_tensor_affine,
        "quant_min": low,
        "quant_max": 2 ** (bits - 1) - 1,
    }
    theirs = MinMaxObserver(**arguments)
    if name == "ema":
        theirs = MovingAverageMinMaxObserver(averaging_constant=0.01, **arguments)
    for batch in batches:
        theirs(batch)
    scale, zero_point = theirs.calculate_qparams()
    grid = fed(OBSERVERS[name](), batches).grid(bits, symmetric)
    # torch computes in fp32: a few roundings for each batch.
    assert math.isclose(grid.scale, float(scale), rel_tol=1e-6)
    assert grid.zero_point == int(zero_point)
    assert (grid.low, grid.high) == (low, 2 ** (bits - 1) - 1)


def test_percentile_is_the_definition_of_fq_vit():
    ours = fed(PercentileObserver(0.98), SHIFTED)
    low = high = None
    for batch in SHIFTED:
        new_low, new_high = np.quantile(batch.numpy().astype(np.float64), [0.02, 0.98])
        low = new_low if low is None else low + 0.01 * (new_low - low)
        high = new_high if high is None else high + 0.01 * (new_high - high)
    assert math.isclose(ours.grid(8, symmetric=False).scale, (high - low) / 255, rel_tol=1e-9)
    assert math.isclose(ours.grid().scale, max(-low, high) / 127, rel_tol=1e-9)
    assert PercentileObserver().percentile == 0.99999


def histogram(values: torch.Tensor, top: float) -> np.ndarray:
    """Bins as the observer makes them: of [0, top) for positive, of [-top, 0) for negative values."""
    index = np.floor(values.double().numpy() / top * BINS).clip(-BINS, BINS - 1).astype(int)
    return np.bincount(index + BINS, minlength=2 * BINS)


@pytest.mark.parametrize("order", [1, -1], ids=["growing", "shrinking"])
def test_histograms_hold_all_values(order: int):
    """In either order of batches; a growing range doubles from the first batch's."""
    batches = [torch.zeros(7), *BATCHES[::order]]
    observer = fed(KLObserver(), batches)
    top = float(batches[1].abs().max())
    # The last bin is closed: the absmax of the first batch lies in it, and in what becomes of it.
    first = batches[1].where(batches[1].abs() < top, batches[1] * (1 - 2**-20))
    every = torch.cat([b.flatten() for b in (batches[0], first, *batches[2:])])
    while top < every.abs().max():
        top *= 2
    np.testing.assert_array_equal(observer._counts.numpy(), histogram(every, top))
    total = sum(float(b.double().sum()) for b in batches)
    assert math.isclose(observer._sums.sum(), total, rel_tol=1e-9)
    counts = histogram(every, top)
    folded = counts[BINS:] + counts[:BINS][::-1]
    used = int(np.nonzero(folded)[0].max()) + 1
    kept = clipping.entropy_threshold(torch.from_numpy(folded[:used].copy()), 128)
    wanted = (
        min(kept * top / BINS, float(every.abs().max()))
        if kept < used
        else float(every.abs().max())
    )
    assert math.isclose(observer.grid().scale, wanted / 127, rel_tol=1e-12)


def error(grid: Grid, values: torch.Tensor) -> float:
    return float((grid.rounded(values) - values.double()).square().sum())


@pytest.mark.parametrize("batches", [BATCHES, SHIFTED, POSITIVE], ids=["normal", "shifted", "relu"])
@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_mse_is_the_best_of_its_grid(symmetric: bool, bits: int, batches):
    values = torch.cat([b.flatten() for b in batches])
    low, high = float(values.min()), float(values.max())
    every = [
        error(Grid.of(low * f, high * f, bits, symmetric), values)
        for f in (1 - i / 100 for i in range(90))
    ]
    got = error(fed(MSEObserver(), batches).grid(bits, symmetric), values)
    # It knows means of bins 1/1024 of absmax wide or less; steps are 8 of them or more.
    assert got <= 1.02 * min(every)
    assert got <= 1.02 * every[0]


@pytest.mark.parametrize("bits", [4, 8])
def test_mse_is_no_worse_than_the_histogram_of_torch(bits: int):
    from torch.ao.quantization import HistogramObserver

    values = torch.distributions.StudentT(3.0).sample((20000,))
    theirs = HistogramObserver(
        dtype=torch.qint8, quant_min=-(2 ** (bits - 1)), quant_max=2 ** (bits - 1) - 1
    )
    theirs(values)
    scale, zero_point = theirs.calculate_qparams()
    other = Grid(float(scale), int(zero_point), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    # The grid is of steps of 1 %: next to the best range the error is flat.
    assert error(fed(MSEObserver(), [values]).grid(bits, False), values) <= 1.02 * error(
        other, values
    )


def test_clipping_pays_where_there_are_outliers():
    values = torch.randn(20000)
    values[0] = 80.0
    errors = {
        name: error(fed(observer(), [values]).grid(4), values[1:])
        for name, observer in OBSERVERS.items()
    }
    assert errors["mse"] < 0.2 * errors["minmax"]
    assert errors["kl"] < 0.2 * errors["minmax"]
    assert errors["ema"] == errors["minmax"]


@pytest.mark.parametrize("name", OBSERVERS)
def test_defined_results(name: str):
    """Nothing seen, zeros alone, one value, tiny and huge values, half precision, bad input."""
    observer = OBSERVERS[name]()
    observer.update(torch.empty(0, 3))
    with pytest.raises(ValueError, match="calibration is empty"):
        observer.grid()
    with pytest.raises(ValueError, match="bits must be 2 to 8, got 9"):
        observer.grid(9)
    with pytest.raises(TypeError, match="x must be a floating tensor, got torch.int64"):
        observer.update(torch.ones(3, dtype=torch.int64))
    for bad in (torch.nan, torch.inf):
        with pytest.raises(ValueError, match="holds NaN or inf"):
            observer.update(torch.tensor([1.0, bad]))
    observer.update(torch.zeros(5))
    for symmetric in (True, False):
        grid = observer.grid(8, symmetric)
        assert (grid.scale, grid.zero_point) == (1.0, 0)
    for value in (3.0, -3.0, 1e-44, 1e38):
        for dtype in (torch.float32, torch.bfloat16):
            single = torch.full((4,), value, dtype=dtype)
            for symmetric in (True, False):
                grid = fed(OBSERVERS[name](), [single]).grid(8, symmetric)
                assert grid.scale >= 2**-126
                if abs(value) > 1e-40:
                    made = grid.rounded(single)
                    torch.testing.assert_close(made, single.double(), rtol=1e-6, atol=0)


def test_bad_arguments():
    for make, message in (
        (lambda: EMAObserver(0), "momentum must be above 0 and at most 1, got 0"),
        (lambda: PercentileObserver(0.4), "percentile must be above 0.5 and at most 1, got 0.4"),
        (lambda: PercentileObserver(momentum=2), "momentum must be"),
    ):
        with pytest.raises(ValueError, match=message):
            make()


def test_hooks_feed_observers():
    model = nn.Sequential(nn.Linear(20, 8), nn.ReLU(), nn.Linear(8, 3))
    observers = {"0": MinMaxObserver(), "2": MinMaxObserver()}
    with attach(model, observers):
        for batch in BATCHES:
            model(batch)
    model(1e6 * BATCHES[0])
    absmax = max(float(b.abs().max()) for b in BATCHES)
    assert observers["0"].grid().scale == absmax / 127
    hidden = max(float(model[0](b).relu().detach().max()) for b in BATCHES)
    assert observers["2"].grid().scale == hidden / 127
    assert not any(m._forward_pre_hooks for m in model.modules())
    model[0].bias.data[0] = torch.inf
    with (
        pytest.raises(ValueError, match="2: calibration input holds NaN"),
        attach(model, observers),
    ):
        model(BATCHES[0])
