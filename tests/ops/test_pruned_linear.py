"""Products with pruned weights: against the dense product of the same entries, and as layers of a model."""

from __future__ import annotations

import copy

import pytest
import torch
from oracle import normal
from torch import nn

import lowbit
from lowbit import _C
from lowbit.backends.cpu import sparse
from lowbit.formats import Format
from lowbit.layouts import pruned_operands
from lowbit.nn import PrunedLinear
from lowbit.ops.pruned import operands_of
from lowbit.reference import pruned_weight
from lowbit.weights.pruned import PrunedTensor

ISAS = [isa for isa in ("scalar", "avx2", "avx512") if isa in _C.isa_detected()]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def pruned(
    n: int, k: int, bits: int = 4, density: float = 0.1, index_bits: int = 5
) -> PrunedTensor:
    """A pruned weight of normal values."""
    format = Format.lut(bits=bits, group=None, scale=None)
    qt = lowbit.quantize(normal(n, k), format, "prune", density=density)
    return PrunedTensor.of(qt, index_bits)


SHAPES = ((1, 1), (3, 17), (16, 64), (33, 300), (65, 1000), (17, 700))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("density", [0.002, 0.1, 1.0])
@pytest.mark.parametrize("index_bits", [4, 8])
def test_operands_hold_the_weight(shape: tuple[int, int], density: float, index_bits: int):
    """Entries far apart take fillers, rows are short and empty."""
    weight = pruned(*shape, density=density, index_bits=index_bits)
    w = pruned_operands(weight)
    assert torch.equal(pruned_weight(*w, shape[1]), weight.dequantize())


def test_rows_far_from_their_first_entry():
    """Distances of more than a byte, in the first and the last column, and rows without entries."""
    dense = torch.zeros(20, 5000)
    dense[3, 4999] = dense[7, 0] = dense[7, 256] = dense[7, 513] = dense[19, 255] = 1.0
    qt = lowbit.quantize(dense, Format.lut(bits=2, group=None, scale=None), "prune")
    weight = PrunedTensor.of(qt, 8)
    assert torch.equal(weight.dequantize(), dense)
    w = pruned_operands(weight)
    assert torch.equal(pruned_weight(*w, 5000), dense)
    for isa in ISAS:
        assert torch.equal(
            sparse.pruned_linear(torch.eye(5000)[:40], w, isa).T[3:20], dense[3:20, :40]
        )
        assert torch.equal(sparse.pruned_linear(torch.eye(5000)[4999:], w, isa)[0], dense[:, 4999])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", [2, 4, 5, 6, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_identity_gives_the_weight(isa: str, bits: int, shape: tuple[int, int]):
    """Bit for bit, one row of x at a time and all at once."""
    weight = pruned(*shape, bits=bits)
    dense, w = weight.dequantize(), operands_of(weight)
    x = torch.eye(shape[1])
    assert torch.equal(sparse.pruned_linear(x, w, isa).T, dense)
    for i in {0, shape[1] // 2, shape[1] - 1}:
        assert torch.equal(sparse.pruned_linear(x[i : i + 1], w, isa)[0], dense[:, i])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [1, 3, 4, 17, 40])
def test_products(isa: str, dtype: torch.dtype, m: int):
    """Within the rounding of fp32 sums, n u sum |w x|; a row alone and in a batch has the same bits."""
    weight = pruned(65, 300)
    dense, w = weight.dequantize().double(), operands_of(weight)
    x = normal(m, 310, seed=1).to(dtype)[:, 5:305]
    y = sparse.pruned_linear(x, w, isa)
    most = int((dense != 0).sum(1).max())
    bound = most * 2**-24 * (x.double().abs() @ dense.abs().T)
    assert bool(((y - x.double() @ dense.T).abs() <= bound).all())
    for i in range(m):
        assert torch.equal(sparse.pruned_linear(x[i : i + 1], w, isa)[0], y[i])


def test_infinite_x_stays_where_it_is():
    """Entries that pad a block read no element of x that a row has not."""
    weight = PrunedTensor.of(
        lowbit.quantize(torch.eye(40), Format.lut(bits=2, group=None, scale=None), "prune")
    )
    x = torch.ones(2, 40)
    x[:, 39] = torch.inf
    for m in (1, 2):
        y = lowbit.linear(x[:m], weight)
        assert torch.equal(y[:, 39], torch.full((m,), torch.inf))
        assert torch.equal(y[:, :39], torch.ones(m, 39))


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_rounds_once(dtype: torch.dtype):
    weight = pruned(33, 200)
    bias = normal(1, 33, seed=2)[0].to(dtype)
    x = normal(2 * 3, 200, seed=3).to(dtype).view(2, 3, 200)
    gate, residual = (normal(6, 33, seed=s).to(dtype).view(2, 3, 33) for s in (4, 5))
    y = lowbit.linear(x, weight, bias)
    wanted = sparse.pruned_linear(x.view(6, 200), operands_of(weight)).view(2, 3, 33) + bias.float()
    assert torch.equal(y, wanted.to(dtype))
    full = lowbit.linear(x, weight, bias, activation="silu", gate=gate, residual=residual)
    wanted = nn.functional.silu(gate.float()) * wanted + residual.float()
    assert torch.equal(full, wanted.to(dtype))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(
            lowbit.linear(x, weight, bias), lowbit.linear(x.bfloat16(), weight, bias)
        )


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_gradients():
    """Of x and the table: those of the dense product whose weight is table[codes]; the entry of zeros has none."""
    weight = pruned(20, 50, density=0.3)
    layer = PrunedLinear.from_pruned(weight, torch.zeros(20))
    layer.table.requires_grad_()
    x = normal(7, 50, seed=1).requires_grad_()
    g = normal(7, 20, seed=2)
    (layer(x) * g).sum().backward()
    codes = weight.quant_tensor().unpack().long()
    table, x2 = weight.table.clone().requires_grad_(), x.detach().clone().requires_grad_()
    ((x2 @ table[codes].T) * g).sum().backward()
    assert layer.table.grad[0] == 0
    # Sums of at most 7 * 1000 products.
    assert torch.allclose(layer.table.grad[1:], table.grad[1:], rtol=1e-4, atol=1e-4)
    assert torch.allclose(x.grad, x2.grad, rtol=1e-5, atol=1e-5)
    doubled = torch.func.jvp(lambda t: lowbit.linear(t, weight), (x.detach(),), (x.detach(),))
    assert torch.allclose(doubled[0], doubled[1])
    torch.library.opcheck(torch.ops.lowbit.pruned_linear, (x.detach(), *operands_of(weight)))


def test_layer():
    """Saves and loads as plain tensors, copies, compiles, and stands for its dense weight."""
    weight = pruned(33, 70)
    model = nn.Sequential(PrunedLinear.from_pruned(weight, torch.ones(33)), nn.ReLU())
    x = normal(5, 70, seed=1)
    y = model(x)
    assert torch.equal(model[0].weight.float(), weight.dequantize())
    assert "kept=10.0%" in repr(model)
    assert model[0].weight.shape == (33, 70)
    other = copy.deepcopy(model)
    for t in other.state_dict().values():
        t.zero_()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), y)
    assert torch.equal(torch.compile(model, backend="eager", fullgraph=True)(x), y)
    assert torch.equal(model(x[None, :, :]), y[None])
    # 3 bytes and less for an entry of this small weight: 16 rows take as many steps as the longest of them.
    assert model[0].entries.numel() + model[0].starts.nbytes < 33 * 70


def test_explain_names_the_kernel():
    weight = pruned(33, 70)
    found = lowbit.explain(torch.ones(3, 70, dtype=torch.bfloat16), weight)
    assert found.selected == f"pruned_{_C.pruned_isa()}"
    assert "bf16 PrunedTensor(33x70" in str(found)
    assert "M=3" in str(found)


def test_bad_input():
    weight = pruned(33, 70)
    w = operands_of(weight)
    x = torch.ones(2, 70)
    with pytest.raises(ValueError, match=r"x must have shape \(\.\.\., 70\), got \(2, 71\)"):
        lowbit.linear(torch.ones(2, 71), weight)
    with pytest.raises(ValueError, match="bias must"):
        lowbit.linear(x, weight, torch.ones(34))
    with pytest.raises(TypeError, match="entries must be uint8"):
        torch.ops.lowbit.pruned_linear(x, w.entries.int(), *w[1:])
    with pytest.raises(ValueError, match=r"entries must have shape \(steps, 2, 16\), got"):
        torch.ops.lowbit.pruned_linear(x, w.entries[:, :1], *w[1:])
    with pytest.raises(ValueError, match=r"starts of 33 rows must have shape \(4,\), got \(3,\)"):
        torch.ops.lowbit.pruned_linear(x, w.entries, w.starts[:3], w.table, 33)
    with pytest.raises(ValueError, match="table must have 2 to 256 entries"):
        torch.ops.lowbit.pruned_linear(x, w.entries, w.starts, torch.ones(3), 33)
    with pytest.raises(ValueError, match="starts must ascend from 0 to the"):
        torch.ops.lowbit.pruned_linear(x, w.entries, w.starts.flip(0), w.table, 33)
    with pytest.raises(ValueError, match="activation must be one of"):
        lowbit.linear(x, weight, activation="tanh")
    with pytest.raises(TypeError, match="x must be a torch.Tensor"):
        PrunedLinear.from_pruned(weight)([1.0])
