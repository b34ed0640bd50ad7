"""JoinedLinear: one linear of a model whose weight is stored as two halves of its rows, each in a format of its own.

Models have gates and what they multiply in one weight (GraniteMoe's shared expert); llama.cpp has them apart, of two
types. `halved` takes such a linear apart, without a copy, and `whole` is the way back.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

_HALVES = 2


class JoinedLinear(nn.ModuleList):
    """The results of several linears of one x, side by side: x [W_0; W_1]^T + [b_0; b_1].

    Args:
        layers: `QuantLinear`s, or dense ones, each (N_i, K).

    Raises:
        ValueError: there is none, or they differ in K.

    Example:
        >>> halves = (QuantLinear.from_linear(nn.Linear(64, 32), name) for name in ("nf4", "int8_g32"))
        >>> JoinedLinear(halves)(torch.randn(3, 64)).shape
        torch.Size([3, 64])
    """

    not_carried = ("stands_for",)

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        super().__init__(layers)
        sizes = {layer.in_features for layer in self}
        if len(sizes) != 1:
            raise ValueError(f"layers must have one K, got {sorted(sizes, key=str) or 'none'}")

    @property
    def out_features(self) -> int:
        """N, of all."""
        layers: Any = self
        return sum(layer.out_features for layer in layers)

    @property
    def in_features(self) -> int:
        """K."""
        first: Any = self[0]
        return first.in_features  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) gives (..., N)."""
        return torch.cat([layer(x) for layer in self], -1)


class RowsOfLinear(nn.Linear):
    """Some rows of a linear as an nn.Linear, whose weight is a view of its.

    Attributes:
        views: the weight and the bias that it was made with.
    """

    not_carried = ("views",)
    views: Any

    def __init__(self, linear: Any, rows: slice) -> None:
        weight = linear.weight.detach()[rows]
        super().__init__(weight.shape[1], weight.shape[0], False, device="meta", dtype=weight.dtype)
        self.weight = nn.Parameter(weight, requires_grad=False)
        if linear.bias is not None:
            self.bias = nn.Parameter(linear.bias.detach()[rows], requires_grad=False)  # type: ignore[assignment]
        vars(self)["views"] = self.weight, self.bias

    def alone(self, learns: bool) -> nn.Linear:
        """A linear with memory of its own, that `learns` or not."""
        made = nn.Linear(
            self.in_features, self.out_features, False, device="meta", dtype=self.weight.dtype
        )
        made.weight = nn.Parameter(self.weight.detach().clone(), learns)
        if self.bias is not None:
            made.bias = nn.Parameter(self.bias.detach().clone(), learns)  # type: ignore[assignment]
        return made.train(self.training)


def rows_of_halves(linear: Any) -> tuple[slice, ...]:
    """Those of each half of a linear; none if its rows are odd in number."""
    half, odd = divmod(linear.out_features, _HALVES)
    return () if odd else (slice(0, half), slice(half, None))


def halved(linear: nn.Linear) -> JoinedLinear:
    """A linear as its halves, which share its memory."""
    made = JoinedLinear(RowsOfLinear(linear, rows) for rows in rows_of_halves(linear))
    vars(made)["stands_for"] = linear
    return made.train(linear.training)


def whole(joined: JoinedLinear) -> nn.Linear | None:
    """The linear that dense halves are, the one that was `halved` if there is; None if one is not dense."""
    layers: list[Any] = list(joined)
    if not all(isinstance(layer, nn.Linear) for layer in layers):
        return None
    linear: Any = vars(joined).get("stands_for")
    if linear is None:
        weight = layers[0].weight
        linear = nn.Linear(
            joined.in_features, joined.out_features, False, device="meta", dtype=weight.dtype
        )
        learns = weight.requires_grad
    else:
        learns = linear.weight.requires_grad
        if all(layer.weight is layer.views[0] and layer.bias is layer.views[1] for layer in layers):
            return linear.train(joined.training)  # type: ignore[no-any-return]
    for key in ("weight", "bias"):
        parts = [getattr(layer, key) for layer in layers]
        if parts[0] is not None:
            values = torch.cat([part.detach() for part in parts])
            linear.register_parameter(key, nn.Parameter(values, learns))
    return linear.train(joined.training)  # type: ignore[no-any-return]


def settle(joined: JoinedLinear) -> None:
    """Dense halves beside packed ones become linears of their own, and what was halved is forgotten."""
    linear = vars(joined).pop("stands_for", None)
    for i, layer in enumerate(joined):
        if isinstance(layer, RowsOfLinear):
            joined[i] = layer.alone(linear is not None and linear.weight.requires_grad)
