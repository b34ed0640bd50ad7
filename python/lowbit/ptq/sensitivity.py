"""The Fisher information of every weight of a model: what a change of it costs."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.nn.names import listed
from lowbit.ptq.calibration import as_batches, evaluating, forward

Loss = Callable[[Any, Any], Tensor]  # what the model returns, its input -> a number


def fisher_diagonal(
    model: nn.Module, batches: Iterable[Any], names: Iterable[str], *, loss: Loss | None = None
) -> dict[str, Tensor]:
    """The mean squared gradient of the loss by each weight, the diagonal of the empirical Fisher
    matrix, as SqueezeLLM (arXiv 2306.07629) weighs k-means: `quantize_model(..., method="kmeans",
    sensitivities=fisher_diagonal(...))`.

    Each input counts as one sample, and the loss of several sequences together averages their
    gradients before they are squared: for the paper's matrix give them one by one. Takes 4 bytes
    for each weight of the named layers besides one gradient at a time; the model runs in evaluation
    mode and is left as it was, gradients included. A weight that the loss does not depend on, as
    that of an expert without tokens, gets 0, with a warning.

    Args:
        model: any module.
        batches: its inputs, as for the `calibration` of `quantize_model`.
        names: dotted names of modules whose `weight` is a parameter, (N, K).
        loss: of what the model returns and its input; by default the `loss` that it returns, as
            models of transformers do when they are given `labels`.

    Returns:
        (N, K) fp32 for each name, on the device of the weight.

    Raises:
        AttributeError: the model has no module of such a name.
        TypeError: a module has no such weight; the loss is not a tensor.
        ValueError: there are no inputs; the loss is not one number, or depends on none of the
            weights; a gradient is NaN or inf.
    """
    weights = {name: _weight(model, name) for name in names}
    every = as_batches(batches)
    sums: dict[nn.Parameter, Tensor] = {}
    with evaluating(model), _alone(model, weights, sums), torch.enable_grad():
        for batch in every:
            output = forward(model, batch)
            value = _loss_of(output) if loss is None else loss(output, batch)
            if not isinstance(value, Tensor):
                raise TypeError(f"loss must be a tensor, got {type(value).__name__}")
            if value.numel() != 1 or not value.requires_grad:
                raise ValueError(
                    "loss must be one number that depends on the named weights, got "
                    f"shape {tuple(value.shape)}, requires_grad {value.requires_grad}"
                )
            value.sum().backward()
    if silent := [name for name, weight in weights.items() if weight not in sums]:
        warnings.warn(
            f"the loss does not depend on the weights of {listed(silent)}: 0 is assumed",
            stacklevel=2,
        )
    return {
        name: sums[weight] / len(every)
        if weight in sums
        else torch.zeros_like(weight, dtype=torch.float32, requires_grad=False)
        for name, weight in weights.items()
    }


def _weight(model: nn.Module, name: str) -> nn.Parameter:
    module = model.get_submodule(name)
    weight = module._parameters.get("weight")
    if weight is None or weight.dim() != 2:
        raise TypeError(f"{name} must have a weight (N, K), got {type(module).__name__}")
    return weight


def _loss_of(output: Any) -> Any:
    value = getattr(output, "loss", None)
    if value is None:
        raise TypeError(
            f"the model returns no loss ({type(output).__name__}): give it labels, or pass `loss`"
        )
    return value


@contextlib.contextmanager
def _alone(
    model: nn.Module, weights: dict[str, nn.Parameter], sums: dict[nn.Parameter, Tensor]
) -> Iterator[None]:
    """Only the named weights get gradients, which are squared and added as soon as they are there."""
    names = {weight: name for name, weight in weights.items()}

    def add(weight: Tensor) -> None:
        assert isinstance(weight, nn.Parameter)
        assert weight.grad is not None
        gradient = weight.grad.float()
        weight.grad = None
        if not bool(torch.isfinite(gradient).all()):
            raise ValueError(f"{names[weight]}: the gradient holds NaN or inf")
        if weight not in sums:
            sums[weight] = torch.zeros_like(gradient)
        sums[weight].addcmul_(gradient, gradient)

    before = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    with contextlib.ExitStack() as stack:
        try:
            for p, _, _ in before:
                p.requires_grad_(p in names)
                p.grad = None
            for weight in names:
                stack.callback(weight.register_post_accumulate_grad_hook(add).remove)
            yield
        finally:
            for p, needs, gradient in before:
                p.requires_grad_(needs)
                p.grad = gradient
