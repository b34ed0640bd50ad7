"""PTQ4ViT (arXiv 2111.12293): scales of products searched so that their results change the loss least."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.integer.coded import Coded, twin_gelu, twin_softmax
from lowbit.integer.graph import Graph, Weighted
from lowbit.integer.rescaling import Grid
from lowbit.integer.transformer import MatMul

# The paper's: candidates from 0.01 to 1.2 times the scale of the largest value, and turns.
CANDIDATES, LEAST, MOST = 100, 0.01, 1.2
TURNS = 3
_SPLITS = 12
_DRAWS = 4
# Samples that a search looks at.
SAMPLES = 32


def sensitivity(graph: Graph, x: Tensor) -> dict[str, Tensor]:
    """The squared gradient of the loss by each result of a product: the diagonal of its Hessian, as Fisher has it.

    Interpretation: the loss is -log softmax of the network's result (samples, ..., classes) at classes that are drawn
    from it, four times; the mean of their squares.

    Args:
        graph: from `trace`.
        x: (samples, *shape).

    Returns:
        By name: (samples, *shape of the result), float64.
    """
    with torch.enable_grad():
        results = graph.run(x.to(torch.float64).requires_grad_())
        names = [n.name for n in graph.nodes if isinstance(n, (Weighted, MatMul))]
        logs = results[graph.output].log_softmax(-1)
        found = {name: torch.zeros_like(results[name]).detach() for name in names}
        generator = torch.Generator().manual_seed(0)
        for _ in range(_DRAWS):
            p = logs.detach().exp().flatten(0, -2)
            drawn = torch.multinomial(p, 1, generator=generator)
            loss = -logs.flatten(0, -2).gather(1, drawn).sum()
            wanted = [results[name] for name in names]
            gradients = torch.autograd.grad(loss, wanted, retain_graph=True, allow_unused=True)
            for name, gradient in zip(names, gradients, strict=True):
                if gradient is not None:
                    found[name] += gradient.square() / _DRAWS
    return found


def _factors() -> list[float]:
    return torch.linspace(LEAST, MOST, CANDIDATES, dtype=torch.float64, device="cpu").tolist()


def scaled(grid: Grid, factor: float) -> Grid:
    """A symmetric grid with another step."""
    return Grid(grid.scale * factor, grid.zero, grid.bits, grid.rounding)


def candidates(grid: Grid) -> list[Grid]:
    """The grids to choose from in place of one."""
    if not isinstance(grid, Coded):
        return [scaled(grid, f) for f in _factors()]
    if grid.used[0] == 0:
        return [twin_softmax(grid.bits, split) for split in range(_SPLITS)]
    top = float(
        grid.dequantize(torch.tensor((1 << (grid.bits - 1)) - 1, dtype=torch.int64, device="cpu"))
    )
    steps = ((1 << (grid.bits - 1)) - 1) / top
    return [twin_gelu(grid.bits, f / steps) for f in _factors()]


def _rounded(x: Tensor, grid: Grid) -> Tensor:
    return grid.dequantize(grid.quantize(x))


def _weights(weight: Tensor, steps: Tensor, bits: int) -> Tensor:
    most = (1 << (bits - 1)) - 1
    view = steps.reshape(-1, *(1 for _ in weight.shape[1:]))
    return (weight / view).round().clamp(-most - 1, most) * view


def search_weighted(
    node: Weighted, x: Tensor, importance: Tensor, grid: Grid, steps: Tensor, bits: int
) -> tuple[Grid, Tensor]:
    """The grid of the input and the steps (O,) of the weight of a node with the least weighted squared error.

    Args:
        node: its weight and bias are float64.
        x: (samples, ...) float64, what it takes.
        importance: of its results, as `sensitivity` gives it.
        grid, steps: where the search starts.
        bits: of the weight.
    """
    exact = node.sums(x, node.weight, node.bias, 0)
    others = [d for d in range(exact.dim()) if d != node.channel_dim]

    def errors(x: Tensor, weight: Tensor) -> Tensor:
        error = node.sums(x, weight, node.bias, 0) - exact
        return (error.square() * importance).sum(others)

    options = candidates(grid)
    base, factors = steps, _factors()
    for _ in range(TURNS):
        rounded = _rounded(x, grid)
        found = torch.stack(
            [errors(rounded, _weights(node.weight, base * f, bits)) for f in factors]
        )
        steps = base * torch.tensor(factors, dtype=torch.float64, device="cpu")[found.argmin(0)]
        weight = _weights(node.weight, steps, bits)
        sums = [float(errors(_rounded(x, option), weight).sum()) for option in options]
        best = options[sums.index(min(sums))]
        if best is grid:
            break
        grid = best
    return grid, steps


def search_matmul(
    node: MatMul, inputs: list[Tensor], importance: Tensor, grids: list[Grid]
) -> list[Grid]:
    """The grids of both inputs of a product of activations with the least weighted squared error."""
    exact = node.product(*inputs)
    grids = list(grids)
    options = [candidates(grid) for grid in grids]
    for _ in range(TURNS):
        for side in range(2):
            other = _rounded(inputs[1 - side], grids[1 - side])
            sums = []
            for option in options[side]:
                mine = _rounded(inputs[side], option)
                y = node.product(mine, other) if side == 0 else node.product(other, mine)
                sums.append(float(((y - exact).square() * importance).sum()))
            grids[side] = options[side][sums.index(min(sums))]
    return grids
