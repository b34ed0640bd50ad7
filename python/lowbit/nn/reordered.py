"""ReorderedLinear: a QuantLinear whose columns are those of x in another order, as act-order GPTQ stores them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lowbit.nn.leaf import Proxy, node_of
from lowbit.nn.linear import QuantLinear
from lowbit.weights.quantized import QuantTensor


class ReorderedLinear(QuantLinear):
    """y = x[..., input_order] W^T + bias: weights of one group then lie side by side, whatever columns they multiply.

    `weight` stands for the dense weight in the order of x; `quant_tensor()` is W, as stored.

    Attributes:
        input_order: Parameter (K,) int64 without grad, a permutation of 0 .. K - 1.
    """

    input_order: nn.Parameter

    def _finish(self, bias: Tensor | None) -> None:
        super()._finish(bias)
        device = self._buffers["codes"].device
        order = torch.arange(self.in_features, dtype=torch.int64, device=device)
        self.register_parameter("input_order", nn.Parameter(order, requires_grad=False))

    @classmethod
    def from_ordered(
        cls,
        weight: QuantTensor,
        order: Tensor,
        bias: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> ReorderedLinear:
        """Makes a layer of a weight whose column j multiplies x[..., order[j]].

        Args:
            weight, bias, dtype: as in `QuantLinear.from_quant_tensor`.
            order: (K,) int64, a permutation.

        Raises:
            ValueError: `order` is none, or the bias has another shape.
        """
        layer = cls.from_quant_tensor(weight, bias, dtype)
        assert isinstance(layer, cls)
        layer.set_input_order(order)
        return layer

    def set_input_order(self, order: Tensor) -> None:
        """Sets the order of the columns; ValueError unless it is a permutation (K,) int64."""
        order = self._checked_order(order).to(self._buffers["codes"].device, copy=True)
        self.input_order = nn.Parameter(order, requires_grad=False)

    def _checked_order(self, order: Tensor) -> Tensor:
        if tuple(order.shape) != (self.in_features,) or order.dtype != torch.int64:
            raise ValueError(
                f"input_order must be int64 of shape ({self.in_features},), got {order.dtype} of shape "
                f"{tuple(order.shape)}"
            )
        straight = torch.arange(self.in_features, dtype=torch.int64, device=order.device)
        if not order.is_meta and not torch.equal(order.sort().values, straight):
            raise ValueError(
                f"input_order must hold each of 0 .. {self.in_features - 1} once, got {order}"
            )
        return order.detach()

    def forward(self, x: Tensor) -> Tensor:
        """x[..., input_order] W^T + bias: x (..., K) gives (..., N) in its dtype; checks as `lowbit.linear`."""
        if isinstance(x, Proxy):
            return node_of(self, x)
        if x.dim() and x.shape[-1] == self.in_features:  # else the product says what is wrong
            x = x.index_select(-1, self.input_order)
        return super().forward(x)

    def to_linear(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """As `QuantLinear`; its columns are in the order of x."""
        made = super().to_linear(dtype)
        inverse = torch.argsort(self.input_order.detach())
        made.weight = nn.Parameter(made.weight.detach().index_select(1, inverse))
        return made

    def weight_source(self) -> Callable[[], Tensor]:
        """What makes the weight, its columns in the order of x."""
        source, inverse = super().weight_source(), torch.argsort(self.input_order.detach())
        return lambda: source().index_select(1, inverse)

    def _other_value(
        self, name: str, old: Tensor, value: Tensor, device: torch.device, assign: bool
    ) -> Tensor:
        if name == "input_order":
            return self._checked_order(value).to(device, copy=True)
        return super()._other_value(name, old, value, device, assign)

    def extra_repr(self) -> str:
        """As `QuantLinear`."""
        return f"{super().extra_repr()}, reordered"
