"""Integer transformers: every node is Python's integers bit for bit, methods are close, errors name nodes."""

from __future__ import annotations

import functools
import math
from pathlib import Path

import integer_models
import plain_integers
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowbit.export.c.project import write_c
from lowbit.integer import Graph, quantize_qmn, quantize_tflite, quantize_transformer, trace
from lowbit.integer.calibration import calibrate
from lowbit.integer.coded import Coded, Shifted
from lowbit.integer.graph import Linear
from lowbit.integer.post_training import METHODS
from lowbit.integer.reparametrization import reparametrize
from lowbit.integer.transformer import LayerNorm, Softmax
from lowbit.ptq import OBSERVERS

pytestmark = pytest.mark.usefixtures("one_thread")


@functools.cache
def small(mean: bool = False) -> tuple[Graph, Tensor]:
    """A network that nobody trained, with norms whose channels differ as those of trained ones do, and images."""
    torch.manual_seed(3)
    model = integer_models.ViT(width=8, heads=2, depth=1, mean=mean, fused=mean)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            nn.init.normal_(module.weight, 0, 1)
            nn.init.normal_(module.bias, 0, 0.3)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0, 0.4)
    # Of the size of patches: layer norms would enlarge the errors of a smaller one.
    nn.init.normal_(model.token, 0, 0.5)
    x = torch.rand(24, 1, 8, 8)
    return trace(integer_models.program_of(model, x)), x


CASES = [
    *((m, b, {}) for m in ("minmax", "fq_vit", "ptq4vit", "repq_vit") for b in (8, 4)),
    ("i_vit", 8, {}),
    ("fq_vit", 8, {"attention_bits": 4}),
    ("minmax", 6, {"everything": False}),
]


@pytest.mark.parametrize(("method", "bits", "setting"), CASES, ids=str)
def test_every_node_is_pythons_integers(method: str, bits: int, setting: dict[str, int]) -> None:
    """Bit for bit, for images and for one that saturates; no step leaves int32 there."""
    for mean in (False, True):
        graph, x = small(mean)
        made = quantize_transformer(graph, x, method, bits=bits, **setting)  # type: ignore[arg-type]
        q = made.quantize(torch.stack([x[0], 10 * x[1] - 5]))
        got = made.run(q)
        for i in range(len(q)):
            for name, want in plain_integers.run(made, q[i]).items():
                assert got[name][i].tolist() == want.tolist(), name


def test_a_traced_transformer_is_the_module() -> None:
    """In float64, with either attention, pooled either way."""
    x = torch.rand(3, 1, 8, 8, dtype=torch.float64)
    for mean, fused in ((False, True), (True, False)):
        torch.manual_seed(0)
        model = integer_models.ViT(width=8, heads=2, depth=1, mean=mean, fused=fused).double()
        graph = trace(integer_models.program_of(model, x))
        with torch.no_grad():
            assert (graph(x) - model(x)).abs().max() < 1e-12


class Views(nn.Module):
    """Views of all kinds, and parameters of several shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.place = nn.Linear(6, 12), nn.Parameter(torch.randn(5, 6))
        self.row = nn.Parameter(torch.randn(1, 1, 6))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 5, 6) to (batch, 6)."""
        x = torch.cat([self.row.expand(x.shape[0], -1, -1), x], 1)[:, 1:] + self.place[:5]
        a, b = self.linear(x).chunk(2, -1)
        c, d = (a + self.row).split([2, 4], 2)
        y = torch.cat([d, c], 2) / 4 + b[..., :] * 0.5
        heads = y.unflatten(-1, (2, 3)).permute(2, 1, 0, 3)
        last: Tensor = heads[-1].transpose(0, 1)[:, -2]
        return torch.cat([last, y.transpose(-1, -2)[..., 0][:, :3]], 1)


def test_views_and_parameters() -> None:
    torch.manual_seed(0)
    model, x = Views().double(), torch.randn(4, 5, 6, dtype=torch.float64)
    for program in (integer_models.program_of(model, x), torch.export.export(model, (x,))):
        graph = trace(program)
        with torch.no_grad():
            assert (graph(x) - model(x)).abs().max() < 1e-12


def test_reparametrization_is_exact() -> None:
    """To 1e-10 in float64; and channels of norms that linears read have one range then."""
    graph, x = small()
    results = graph.run(x)
    made = reparametrize(graph, results, 8)
    after = made.run(x)
    assert (after[graph.output] - results[graph.output]).abs().max() < 1e-10
    changed = [n for n in graph.nodes if isinstance(n, LayerNorm)][:2]
    for node in changed:
        y = after[node.name].flatten(0, -2)
        # Zero points are not rounded: a range starts at -zero * scale.
        assert torch.allclose(y.amin(0), y.amin(0).mean().expand(8), atol=1e-10)
        assert torch.allclose(y.amax(0), y.amax(0).mean().expand(8), atol=1e-10)
        assert not torch.allclose(results[node.name].flatten(0, -2).amax(0), y.amax(0))


def cosine(method: str, bits: int, **setting: object) -> float:
    graph, x = small()
    made = quantize_transformer(graph, x, method, bits=bits, **setting)  # type: ignore[arg-type]
    return float(F.cosine_similarity(made(x).flatten(), graph(x).flatten(), dim=0))


def test_methods_are_close_to_real_numbers() -> None:
    for method in METHODS:
        assert cosine(method, 8) > 0.97
    assert cosine("i_vit", 8) > 0.99
    # Fewer bits lose more; products alone, with more bits for the rest, less; methods less than plain scales.
    plain = {bits: cosine("minmax", bits, everything=False) for bits in (8, 6, 4)}
    assert plain[8] > plain[6] > plain[4]
    assert plain[6] > cosine("minmax", 6)
    assert cosine("ptq4vit", 4) > plain[4]
    assert cosine("repq_vit", 4) > plain[4]


@pytest.mark.parametrize("name", sorted(OBSERVERS))
def test_observers(name: str) -> None:
    """Those of lowbit.ptq give the ranges; without one it is the plain one, as a moving average of one batch is."""
    graph, x = small()
    made = quantize_transformer(graph, x, observer=OBSERVERS[name])
    plain = quantize_transformer(graph, x)
    if name in ("minmax", "ema"):
        assert torch.equal(made(x), plain(x))
    else:
        assert made.grids != plain.grids
    assert F.cosine_similarity(made(x).flatten(), graph(x).flatten(), dim=0) > 0.95


def test_where_grids_are() -> None:
    """Factors before layer norms, logarithms behind softmax, 16 bits where nothing is a product."""
    graph, x = small()
    norms = [n for n in graph.nodes if isinstance(n, LayerNorm)]
    maps = [n.name for n in graph.nodes if isinstance(n, Softmax)]
    fq = quantize_transformer(graph, x, "fq_vit", bits=8, attention_bits=4).grids
    for node in norms:
        grid = fq[node.inputs[0]]
        assert isinstance(grid, Shifted)
        assert int(grid.shifts.max()) == 3
    for name in maps:
        grid = fq[name]
        assert isinstance(grid, Coded)
        assert grid.bits == 4
        assert grid.bound == 2**14
    repq = quantize_transformer(graph, x, "repq_vit", bits=4).grids
    assert all(repq[node.inputs[0]].bits == 16 for node in norms)
    assert repq[norms[0].name].bits == 4
    linears = [n for n in graph.nodes if isinstance(n, Linear)]
    assert all(repq[n.inputs[0]].bits == 4 for n in linears[:-1])


def test_what_is_refused() -> None:
    graph, x = small()
    for bad, error, message in (
        (torch.zeros(3, 1, 8, 7), ValueError, "must have shape"),
        (torch.full((3, 1, 8, 8), math.nan), ValueError, "sample 0 has NaN"),
        (torch.zeros(3, 1, 8, 8, dtype=torch.int8), TypeError, "must be a tensor of floating"),
    ):
        with pytest.raises(error, match=message):
            quantize_transformer(graph, bad)
    with pytest.raises(ValueError, match="method must be one of minmax, .*, got 'best'"):
        quantize_transformer(graph, x, "best")
    for name, value in (("bits", 3), ("weight_bits", 9), ("attention_bits", 2)):
        with pytest.raises(ValueError, match=f"{name} must be . to 8, got {value}"):
            quantize_transformer(graph, x, **{name: value})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="bits must be 8 for method i_vit, got 6"):
        quantize_transformer(graph, x, "i_vit", bits=6)
    ranges = calibrate(graph, x)
    with pytest.raises(
        NotImplementedError, match=r"the model \(\w+\): Constant has no integer form"
    ):
        quantize_tflite(graph, ranges)


def test_sums_that_overflow_are_found_before_a_run() -> None:
    """In a linear, in a product of activations and in a norm; with the node."""
    wide = nn.Linear(1 << 17, 2)
    nn.init.constant_(wide.weight, 0.5)
    x = torch.rand(2, 1 << 17)
    graph = trace(integer_models.program_of(wide, x))
    with pytest.raises(
        ValueError, match=r"the model \(linear\): sums may reach \d+, which overflo"
    ):
        quantize_transformer(graph, x)


def test_export_names_the_node(tmp_path: Path) -> None:
    """C has no form of transformers' nodes yet."""
    graph, x = small()
    made = quantize_transformer(graph, x)
    with pytest.raises(NotImplementedError, match=r"\(.*\): \w+ has no C form"):
        write_c(made, made.quantize(x[:2]), tmp_path / "out", 0.0)
    assert not (tmp_path / "out").exists()
    with pytest.raises(NotImplementedError, match="has no integer form"):
        quantize_qmn(graph, calibrate(graph, x))
