"""Which weights become outliers, and what is quantized without them."""

from __future__ import annotations

import pytest
import torch
from oracle import normal

import lowbit
from lowbit.formats import parse
from lowbit.methods import kmeans, rtn, sparse
from lowbit.weights.quantized import QuantTensor


def test_the_largest_weights_are_outliers_and_exact() -> None:
    """Against a search that looks at every weight."""
    w = normal(9, 50)
    qt = lowbit.quantize(w, "int4_g16_o3fp32")
    for row in range(9):
        largest = sorted(range(50), key=lambda k: -abs(float(w[row, k])))[:3]
        assert qt.outlier_columns[row].tolist() == sorted(largest)
    # An fp32 difference of fp32 numbers, added back in fp32: at most one unit in the last place.
    picked = torch.zeros(9, 50, dtype=torch.bool).scatter(1, qt.outlier_columns.long(), True)
    torch.testing.assert_close(qt.dequantize()[picked], w[picked], rtol=2**-23, atol=0)


def test_scales_are_fitted_without_outliers() -> None:
    """The rest is what round to nearest makes of a weight that has no large values in the first place."""
    w = normal(20, 64).clamp(-2, 2)
    spiked = w.clone()
    spiked[torch.arange(20), torch.arange(20)] = 100.0
    w[torch.arange(20), torch.arange(20)] = 0.0
    for name in ("int4_g32", "uint4_g32", "q4_1", "nf4"):
        qt = lowbit.quantize(spiked, f"{name}_o1")
        base = lowbit.quantize(w, name)
        assert torch.equal(qt.outlier_columns[:, 0], torch.arange(20, dtype=torch.int32))
        assert torch.equal(qt.scales, base.scales), name
        expected = torch.where(spiked == 100, 100.0, base.dequantize())
        torch.testing.assert_close(qt.dequantize(), expected, rtol=2**-10, atol=0)


def test_zero_points_measure_outliers_from_the_mean_of_the_group() -> None:
    w = 5 + 0.01 * normal(4, 32)
    w[:, 7] = 4.0
    for name in ("q4_1_o1", "uint4_g32_o1"):
        assert lowbit.quantize(w, name).outlier_columns.flatten().tolist() == [7] * 4


def test_importance_chooses() -> None:
    w, weights = normal(6, 40), torch.zeros(40)
    weights[[3, 30]] = 1.0
    qt = lowbit.quantize(w, "int4_g20_o2", weights=weights)
    assert qt.outlier_columns.tolist() == [[3, 30]] * 6
    qt = lowbit.quantize(w, "kmeans3_g20_o2", weights=weights.expand(6, 40))
    assert qt.outlier_columns.tolist() == [[3, 30]] * 6
    with pytest.raises(ValueError, match="weights must have the shape"):
        lowbit.quantize(w, "int4_o2", weights=weights[:5])
    with pytest.raises(ValueError, match="method 'rtn' takes no weights"):
        lowbit.quantize(w, "int4", weights=weights)


def test_kmeans_does_not_see_outliers() -> None:
    w = normal(4, 64)
    f = parse("kmeans2_pr_o4fp32")
    qt = lowbit.quantize(w, f)
    picked = torch.zeros(4, 64, dtype=torch.bool).scatter(1, qt.outlier_columns.long(), True)
    for row in range(4):
        others = w[row][~picked[row]].view(1, -1)
        assert torch.equal(kmeans.quantize(others, f.matrix).table[0], qt.table[row])


@pytest.mark.parametrize("method", ("rtn", "kmeans", "gptq", "hqq"))
def test_every_method_gains_from_outliers(method: str) -> None:
    w = torch.distributions.StudentT(3.0).sample((24, 64))
    x = normal(200, 64, 1)
    options = {"hessian": x.T @ x / 200} if method == "gptq" else {}
    name = {"kmeans": "kmeans3_g32", "hqq": "uint3_zfloat_g32"}.get(method, "int3_g32")

    def error(qt: QuantTensor) -> float:
        return float((x @ (w - qt.dequantize()).T).norm())

    plain = lowbit.quantize(w, name, method, **options)
    sparse = lowbit.quantize(w, f"{name}_o4", method, **options)
    again = lowbit.quantize(w, f"{name}_o4", method, **options)
    assert error(sparse) < 0.7 * error(plain)
    assert all(torch.equal(t, again.tensors[key]) for key, t in sparse.tensors.items())


def test_degenerate_weights() -> None:
    for w in (torch.zeros(3, 8), torch.ones(3, 8), torch.full((3, 8), -2.5)):
        for name in ("int4_g4_o2", "uint4_g4_o3", "q4_1_o1", "kmeans2_g4_o2", "nf4_o8", "int4_o100"):  # fmt: skip
            qt = lowbit.quantize(w, name).validate()
            bound = (lowbit.quantize(w, qt.format.matrix).dequantize() - w).abs()
            assert bool(((qt.dequantize() - w).abs() <= bound + 2**-10 * w.abs()).all()), name
    # Every weight is an outlier: 2 K values.
    w = normal(3, 8)
    qt = lowbit.quantize(w, "int2_o8fp32")
    assert qt.outlier_columns.tolist() == [list(range(8))] * 3
    assert torch.equal(qt.dequantize(), w)


def test_bad_weights() -> None:
    w = normal(3, 8)
    w[1, 2] = 1e6
    with pytest.raises(ValueError, match="row 1, column 2 needs the value .* does not fit fp16"):
        lowbit.quantize(w, "int4_o1")
    assert lowbit.quantize(w, "int4_o1fp32").dequantize()[1, 2] == 1e6
    w[1, 2] = float("nan")
    with pytest.raises(ValueError, match=r"weight\[1, 2\] = nan"):
        lowbit.quantize(w, "int4_o1")
    with pytest.raises(ValueError, match="lowbit.quantize finds them"):
        rtn.quantize(normal(3, 8), "int4_o1")
    with pytest.raises(ValueError, match="method 'gptq' needs hessian"):
        lowbit.quantize(normal(3, 8), "int4_o1", "gptq")


def test_fill_takes_the_mean_of_the_others() -> None:
    w = torch.tensor([[1.0, 2.0, 30.0, 4.0, 50.0, 60.0]])
    columns = torch.tensor([[2, 4, 5]], dtype=torch.int32)
    filled = sparse.fill(w, parse("int4_g4_o3"), columns)
    assert torch.equal(filled, torch.tensor([[1.0, 2.0, 7 / 3, 4.0, 0.0, 0.0]]))
