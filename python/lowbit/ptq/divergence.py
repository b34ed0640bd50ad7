"""What quantizing one weight of a model does to its outputs, measured: the model runs with every candidate."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowbit.ptq.calibration import evaluating, forward
from lowbit.ptq.fisher import predictions
from lowbit.ptq.padding import Padding
from lowbit.weights.quantized import QuantTensor

# Distributions that are compared at a time hold about this many numbers.
_SLICE = 1 << 24


@torch.no_grad()
def divergences(
    model: nn.Module,
    candidates: Sequence[tuple[str, Sequence[QuantTensor]]],
    batches: Iterable[Any],
    advance: Callable[[], object] = lambda: None,
) -> list[list[float]]:
    """KL(dense || with one weight replaced), in nats per prediction, of every candidate of every weight.

    The model runs once for every batch and candidate, in evaluation mode, and once for every batch as it is. Its
    weights are what they were at the end, also where something raises. Padding is no prediction, where a batch has an
    `attention_mask`.

    Args:
        model: its output, or the `logits` of its output, are logits (..., classes).
        candidates: names of modules whose `weight` is a parameter (N, K), each with quantizations of it. What other
            modules share is replaced there, too.
        batches: as in `quantize_model`.
        advance: called after every run of the model.

    Raises:
        AttributeError: the model has no weight of such a name.
        TypeError, ValueError: the output holds no logits; logits hold NaN or inf, or there are none.
    """
    weights = [model.get_parameter(f"{name}.weight") for name, _ in candidates]
    totals = [[0.0] * len(made) for _, made in candidates]
    count = 0
    with Padding.watch(model) as padding, evaluating(model):
        for batch in batches:
            dense = predictions(forward(model, batch), padding).log_softmax(-1)
            count += len(dense)
            advance()
            for weight, (_, made), total in zip(weights, candidates, totals, strict=True):
                kept = weight.data
                try:
                    for i, qt in enumerate(made):
                        weight.data = qt.dequantize().to(kept.dtype)
                        total[i] += _divergence(dense, predictions(forward(model, batch), padding))
                        advance()
                finally:
                    weight.data = kept
    # Rounding may find a divergence below 0 between equal distributions.
    return [[max(0.0, value / count) for value in total] for total in totals]


def _divergence(dense: Tensor, logits: Tensor) -> float:
    """The sum over predictions of KL; `dense` are logs of probabilities."""
    step = max(1, _SLICE // dense.shape[1])
    return sum(
        float(F.kl_div(q.log_softmax(-1), p, reduction="sum", log_target=True))
        for p, q in zip(dense.split(step), logits.split(step), strict=True)
    )
