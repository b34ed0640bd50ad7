"""What quantizers refuse, by name and value; and that whatever they accept comes out valid."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lowbit.formats import Format
from lowbit.methods import METHODS, grid, quantize
from weights import ALL_FORMATS


def with_value(value: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    weight = torch.ones(3, 40, dtype=dtype)
    weight[1, 7] = value
    return weight


BAD_WEIGHTS = [
    (np.ones((2, 2)), TypeError, "weight must be a torch.Tensor, got ndarray"),
    (torch.ones(2, 2, dtype=torch.int8), TypeError, "weight must be one of .* got torch.int8"),
    (torch.ones(2, 2, dtype=torch.complex64), TypeError, "got torch.complex64"),
    (torch.ones(4), ValueError, r"matrix, got shape \(4,\)"),
    (torch.ones(2, 3, 4), ValueError, r"matrix, got shape \(2, 3, 4\)"),
    (torch.ones(0, 4), ValueError, r"non-empty .* got shape \(0, 4\)"),
    (torch.ones(4, 0), ValueError, r"non-empty .* got shape \(4, 0\)"),
    (torch.ones(4, 4, device="meta"), ValueError, "got a meta tensor"),
    (with_value(math.nan), ValueError, r"weight\[1, 7\] = nan is not finite"),
    (with_value(math.inf, torch.bfloat16), ValueError, r"weight\[1, 7\] = inf is not finite"),
    (with_value(-math.inf), ValueError, r"weight\[1, 7\] = -inf is not finite"),
    (with_value(-3e38), ValueError, r"weight\[1, 7\] = -3.* is above 2\^126"),
    (with_value(1e300, torch.float64), ValueError, r"weight\[1, 7\] = 1e\+300 is above 2\^126"),
]


@pytest.mark.parametrize("name", ["int4", "uint4", "nf4", "e4m3", "kmeans4", "kmeans4_pr"])
@pytest.mark.parametrize(("weight", "error", "message"), BAD_WEIGHTS, ids=lambda v: str(v)[:40])
def test_bad_weights(name, weight, error, message):
    with pytest.raises(error, match=message):
        quantize(weight, name)


W = torch.ones(4, 64)
BAD_ARGUMENTS = [
    ({"format": "int7"}, ValueError, "unknown format 'int7'"),
    ({"format": 4}, TypeError, "format must be a Format or a string, got int"),
    ({"format": "nf4", "method": "gptq2"}, ValueError, r"one of .*, got 'gptq2'"),
    ({"format": "nf4", "method": "kmeans"}, ValueError, "format 'nf4' has its own values"),
    (
        {"format": "kmeans4", "method": "rtn"},
        ValueError,
        "no table of its own: use method='kmeans'",
    ),
    ({"format": "nf4", "weights": W}, ValueError, "method 'rtn' takes no weights"),
    ({"format": "nf4", "table": W}, ValueError, "table is only for fitted formats"),
    ({"format": "kmeans2", "table": torch.ones(3)}, ValueError, r"of shape \(4,\), got \(3,\)"),
    (
        {"format": "kmeans2", "table": [1, 2, 3, 4]},
        TypeError,
        "table must be a torch.Tensor, got list",
    ),
    (
        {"format": "kmeans2", "table": torch.tensor([0, 1, 2, math.inf])},
        ValueError,
        "table must be finite",
    ),
    ({"format": "kmeans2", "weights": W[:2]}, ValueError, "weights must have the shape and device"),
    ({"format": "kmeans2", "weights": W.int()}, TypeError, "weights must be a floating tensor"),
    (
        {"format": "kmeans2", "weights": 2.0},
        TypeError,
        "weights must be a floating tensor, got float",
    ),
    ({"format": "kmeans2", "weights": W * math.nan}, ValueError, r"weights\[0, 0\] = nan"),
    (
        {"format": "kmeans2", "weights": W.cumsum(1) - 9},
        ValueError,
        r"weights\[0, 0\] = -8.0, impo",
    ),
    (
        {"format": Format(name="x", codec="affine", bits=4, scale_rule="minmax")},
        ValueError,
        "scale_rule 'minmax' needs an affine format with a zero",
    ),
]


@pytest.mark.parametrize(
    ("arguments", "error", "message"), BAD_ARGUMENTS, ids=lambda v: str(v)[:60]
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        quantize(W, **arguments)


def test_methods_are_listed():
    assert set(METHODS) == {
        "bitnet", "caldera", "distq", "gptq", "hqq", "kde", "kmeans", "lattice", "lloyd", "multibit", "nuuq", "prune",
        "rtn", "search", "trellis", "twn", "vq",
    }  # fmt: skip


small = st.integers(1, 5)


@pytest.mark.filterwarnings(
    "ignore:weight. .* (groups|super-blocks|outliers) .* so small:UserWarning"
)
@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(
    weight=hnp.arrays(
        np.float32,
        st.tuples(small, st.integers(1, 70)),
        elements=st.floats(width=32) | st.sampled_from([0.0, 1.0, -1.0, 65504.0, 3e38, 1e-45]),
        fill=st.nothing() | st.floats(width=32, allow_nan=False, allow_infinity=False),
    ),
    format=st.sampled_from([f for f in ALL_FORMATS if f.table_scope != "group"]),
)
def test_any_weight_is_quantized_or_refused(weight: np.ndarray, format: Format):
    """A refusal names the place; what is not refused is valid and holds no NaN."""
    bad = np.argwhere(~(np.abs(weight) <= grid.MAX_MAGNITUDE))
    refused = None
    try:
        qt = quantize(torch.from_numpy(weight), format).validate()
    except ValueError as e:
        refused = str(e)
    if len(bad):
        assert f"weight[{bad[0][0]}, {bad[0][1]}]" in (refused or "")
    elif refused is None:
        assert not qt.dequantize().isnan().any()
    else:
        # Only large values overflow a scale or a zero.
        assert "does not fit" in refused
        assert np.abs(weight).max() > 30000
