"""Sensitivity of a model's output to errors in its weights: `fisher_diagonal` asks for each weight
alone, `output_fisher` for the rows of a linear together.

For the latter, with p the distribution that the logits mean and y drawn from p, an error E of a
weight (N, K) changes p by about KL = 1/2 mean (sum_n g_n e_n x)^2: x is the layer's input, g the
gradient of log p(y) at its output, e_n a row of E. Interpretation, after K-FAC (Martens and Grosse,
arXiv 1503.05671): products of two features are dropped, and each feature has the share of |g|^2
that it has on average, but |g|^2 and x stay together, token by token.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.nn.names import listed
from lowbit.ptq.calibration import as_batches, evaluating, forward
from lowbit.ptq.padding import Padding

Loss = Callable[[Any, Any], Tensor]  # what the model returns, its input -> a number


@dataclass(frozen=True)
class Fisher:
    """Factors of one linear's Fisher information: sum_n outputs_n e_n inputs e_n^T is the KL
    divergence, in nats per prediction, that an error of its weight with rows e_n makes.

    Attributes:
        inputs: the sum of |g|^2 x x^T over all rows, halved and per prediction, (K, K) fp32.
        outputs: the share of the sum of |g|^2 that each feature has, (N,) fp64.
    """

    inputs: Tensor
    outputs: Tensor


def output_fisher(
    model: nn.Module,
    names: Sequence[str],
    batches: Iterable[Any],
    advance: Callable[[], object] = lambda: None,
    seed: int = 0,
) -> dict[str, Fisher]:
    """Runs a model forward and backward once for each batch, in evaluation mode.

    No parameter gets a gradient. Padding counts neither as an input nor as a prediction, where a
    batch has an `attention_mask`. A linear that no gradient reaches, as an expert without tokens,
    has factors of 0, with a warning. Besides what the backward pass needs, memory is 4 K^2 bytes for
    each linear.

    Args:
        model: its output, or the `logits` of its output, are logits (..., classes).
        names: linears that take part in it.
        batches: as in `quantize_model`.
        advance: called after every batch.
        seed: of the draws of y.

    Raises:
        TypeError: the output is neither a floating tensor nor something with such `logits`.
        ValueError: logits hold NaN or inf, there are none, or no linear has a part in them; the
            model changes the input of a linear in place.
    """
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    count = 0

    def watch(name: str) -> Callable[[nn.Module, Any, Tensor], Tensor]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            x, version, mask = args[0].detach(), args[0]._version, padding.mask(args[0])

            def add(gradient: Tensor) -> None:
                if x._version != version:
                    raise ValueError(f"{name}: the model changes the input of this layer in place")
                square = gradient.detach().flatten(0, -2).double().square()
                rows = x.flatten(0, -2).float()
                if mask is not None:
                    square, rows = square[mask], rows[mask]
                if name not in inputs:
                    inputs[name] = rows.new_zeros(rows.shape[1], rows.shape[1])
                    outputs[name] = square.new_zeros(square.shape[1])
                weighted = rows * square.sum(1, keepdim=True).float()
                inputs[name].addmm_(weighted.T, rows)
                outputs[name] += square.sum(0)

            # The first ones have no parameter before them that wants a gradient. A clone, unlike a
            # view, keeps its hook when the model changes it in place.
            output = (output if output.requires_grad else output.detach().requires_grad_()).clone()
            output.register_hook(add)
            return output

        return hook

    with (
        Padding.watch(model) as padding,
        evaluating(model),
        _frozen(model),
        contextlib.ExitStack() as stack,
        torch.enable_grad(),
    ):
        for name in names:
            handle = model.get_submodule(name).register_forward_hook(watch(name))
            stack.callback(handle.remove)
        for i, batch in enumerate(batches):
            z = predictions(forward(model, batch), padding)
            if not z.requires_grad:
                raise ValueError(f"logits of shape {tuple(z.shape)} do not depend on the linears")
            generator = torch.Generator(z.device).manual_seed(seed + i)
            y = torch.multinomial(z.detach().softmax(-1), 1, generator=generator)
            z.log_softmax(-1).gather(1, y).sum().backward()
            count += len(z)
            advance()
    if silent := [name for name in names if name not in inputs]:
        warnings.warn(f"no gradient has reached {listed(silent)}: 0 is assumed", stacklevel=2)
    found = {}
    for name in names:
        if name not in inputs:
            weight = model.get_parameter(f"{name}.weight").detach()
            n, k = weight.shape
            inputs[name] = torch.zeros(k, k, dtype=torch.float32, device=weight.device)
            outputs[name] = torch.zeros(n, dtype=torch.float64, device=weight.device)
        # Without any gradient there are no shares, and nothing to share.
        total = float(outputs[name].sum()) or 1.0
        found[name] = Fisher(inputs.pop(name) / (2 * count), outputs[name] / total)
    return found


def predictions(output: Any, padding: Padding) -> Tensor:  # (predictions, classes) fp32
    """The logits that a model has given, but for those of padding.

    Raises:
        TypeError: the output is neither a floating tensor nor something with such `logits`.
        ValueError: there are none, or they hold NaN or inf.
    """
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or not logits.is_floating_point() or logits.dim() == 0:
        raise TypeError(
            f"the model must give logits for objective 'kl', got {type(output).__name__}: "
            "use objective 'output'"
        )
    z, mask = logits.flatten(0, -2).float(), padding.mask_of_result(logits)
    z = z if mask is None else z[mask]
    if not z.numel() or not bool(torch.isfinite(z).all()):
        raise ValueError(f"logits of shape {tuple(logits.shape)} are empty, or hold NaN or inf")
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
