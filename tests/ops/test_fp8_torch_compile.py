"""FP8 activations and layers under torch.compile, in one graph: the values and the gradients are those of eager."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lowbit.nn import fp8_activations as fp8

# Of torch's own tracing of an autograd.Function.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")

K = 48
SCALE, SHIFT = torch.linspace(0.5, 2, K), torch.linspace(-1, 1, K)


def gated_norm(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    """What follows attention in a transformer layer: the sum is saved once, for the norm."""
    total, saved = fp8.fp8_add(x, y)
    normed = fp8.fp8_rms_norm(total, (K,), scale, saved=saved)
    return total + fp8.fp8_mul(fp8.fp8_silu(normed), y)


# The function, its inputs and their dtype.
CASES: dict[str, tuple[Callable[..., Tensor], tuple[str, ...], torch.dtype]] = {
    "gelu": (lambda x: fp8.fp8_gelu(x, "tanh"), ("x",), torch.float32),
    "mul": (fp8.fp8_mul, ("x", "scale"), torch.float32),
    "square": (lambda x: fp8.fp8_mul(x, x), ("x",), torch.bfloat16),
    "rms_norm": (lambda x: fp8.fp8_rms_norm(x, (K,)), ("x",), torch.float32),
    "layer_norm": (
        lambda x, s, b: fp8.fp8_layer_norm(x, (K,), s, b),
        ("x", "scale", "shift"),
        torch.bfloat16,
    ),
    "gated_norm": (gated_norm, ("x", "y", "scale"), torch.float32),
}


def results(f: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    y = f(*inputs)
    return [y, *torch.autograd.grad(y, inputs, torch.cos(y.detach()))]


def assert_same(f: Callable[..., Tensor], inputs: list[Tensor]) -> None:
    """The values and gradients of one compiled graph and of eager."""
    torch._dynamo.reset()
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    for got, want in zip(results(compiled, inputs), results(f, inputs), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("name", CASES)
def test_one_graph_equals_eager(name: str) -> None:
    f, names, dtype = CASES[name]
    values = {"x": torch.randn(2, 3, K), "y": torch.randn(2, 3, K), "scale": SCALE, "shift": SHIFT}
    assert_same(f, [values[n].to(dtype, copy=True).requires_grad_() for n in names])


@pytest.mark.parametrize(
    ("kind", "frozen"), ((fp8.FP8RMSNorm, False), (fp8.FP8LayerNorm, True)), ids=str
)
def test_norm_modules(kind: type, frozen: bool) -> None:
    """Frozen parameters get no gradient, x does."""
    layer = kind(K).requires_grad_(not frozen)
    with torch.no_grad():
        layer.weight.copy_(SCALE)
    parameters = [] if frozen else list(layer.parameters())
    assert_same(lambda x, *_: layer(x), [torch.randn(5, K, requires_grad=True), *parameters])


def test_a_square_is_saved_once() -> None:
    x = torch.randn(4, K, requires_grad=True)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = fp8.fp8_mul(x, x)
    assert [t.dtype for t in saved] == [torch.float8_e4m3fn, torch.bfloat16]
    assert torch.equal(y, x.detach() * x.detach())
    kept = x.detach().clone().requires_grad_()
    with torch.no_grad():
        kept.copy_(fp8._load(*saved, torch.float32))
    got, want = (torch.autograd.grad(t.sum(), u)[0] for t, u in ((y, x), (kept * kept, kept)))
    assert torch.equal(got, want)
