"""How much the output of a model minds an error in the output of each of its linears.

With p the distribution that the logits z mean, an error d in what a linear gives changes p by about
KL = 1/2 E (g . d)^2, g being the gradient of -log p(y) for a y that is drawn from p: the Fisher
information. Our reading: squares of g are summed per output feature, as if features and inputs were
independent (the diagonal of K-FAC, Martens and Grosse, arXiv 1503.05671).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.quantize.calibrate import evaluating, forward


def output_gradients(
    model: nn.Module,
    names: Sequence[str],
    batches: Iterable[Any],
    advance: Callable[[], object] = lambda: None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Sums of g^2 over all rows of the inputs, per prediction and halved: (N,) fp64 for each name.

    Times the mean of the squared error of that feature this is a KL divergence in nats per
    prediction. The model runs forward and backward once for each batch, in evaluation mode; no
    parameter gets a gradient.

    Args:
        model: its output, or the `logits` of its output, are logits (..., classes).
        names: linears that take part in it.
        batches: as in `quantize_model`.
        advance: called after every batch.
        seed: of the draws.

    Raises:
        TypeError: the output is neither a floating tensor nor something with such `logits`.
        ValueError: logits hold NaN or inf, there are none, or a linear has no part in them.
    """
    sums: dict[str, Tensor] = {}
    predictions = 0

    def watch(name: str) -> Callable[[nn.Module, Any, Tensor], Tensor]:
        def add(gradient: Tensor) -> None:
            square = gradient.detach().flatten(0, -2).double().square().sum(0)
            sums[name] = sums[name] + square if name in sums else square

        def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            # The first ones have no parameter before them that wants a gradient. A clone, unlike a
            # view, keeps its hook when the model changes it in place.
            output = (output if output.requires_grad else output.detach().requires_grad_()).clone()
            output.register_hook(add)
            return output

        return hook

    with evaluating(model), _frozen(model), contextlib.ExitStack() as stack, torch.enable_grad():
        for name in names:
            handle = model.get_submodule(name).register_forward_hook(watch(name))
            stack.callback(handle.remove)
        for i, batch in enumerate(batches):
            z = _logits(forward(model, batch))
            generator = torch.Generator(z.device).manual_seed(seed + i)
            y = torch.multinomial(z.detach().softmax(-1), 1, generator=generator)
            z.log_softmax(-1).gather(1, y).sum().backward()
            predictions += len(z)
            advance()
    for name in names:
        if name not in sums:
            raise ValueError(f"{name}: no gradient has reached this layer: use objective 'output'")
    return {name: sums[name] / (2 * predictions) for name in names}


def _logits(output: Any) -> Tensor:  # (predictions, classes) fp32
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or not logits.is_floating_point() or logits.dim() == 0:
        raise TypeError(
            f"the model must give logits for objective 'kl', got {type(output).__name__}: "
            "use objective 'output'"
        )
    z = logits.flatten(0, -2).float()
    if not z.numel() or not bool(torch.isfinite(z).all()) or not z.requires_grad:
        raise ValueError(
            f"logits of shape {tuple(logits.shape)} are empty, hold NaN or inf, or do not depend on "
            "the linears"
        )
    return z


@contextlib.contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No parameter wants a gradient inside."""
    wanting = [p for p in model.parameters() if p.requires_grad]
    for p in wanting:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in wanting:
            p.requires_grad_()
