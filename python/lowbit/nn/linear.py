"""QuantLinear: y = x W^T + bias with W quantized; takes the place of nn.Linear.

x (..., K) in fp32, bf16 or fp16 gives (..., N) in the same dtype, with gradients for x (LoRA);
`train_parameters` makes scales, float zeros, tables, dense factors of a low-rank term and the bias learnable.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lowbit.formats import Format
from lowbit.layouts import Operands
from lowbit.methods import quantize
from lowbit.nn.base import PackedModule, zero_weight
from lowbit.nn.leaf import Proxy, node_of
from lowbit.nn.product import PackedProduct
from lowbit.ops import checks
from lowbit.ops.int8 import call_static_linear
from lowbit.ops.linear import call_linear
from lowbit.weights.quantized import QuantTensor


def check_dense(linear: nn.Linear) -> None:
    """Raises TypeError unless `linear` is an nn.Linear, and NotImplementedError if it has another forward."""
    if not isinstance(linear, nn.Linear):
        raise TypeError(f"linear must be an nn.Linear, got {type(linear).__name__}")
    if type(linear).forward is not nn.Linear.forward:
        raise NotImplementedError(
            f"linear is a {type(linear).__name__}, whose forward is not that of nn.Linear"
        )


class _Group(Protocol):
    """Layers that compute their products together: `lowbit.nn.siblings.Siblings`."""

    def product(self, layer: QuantLinear, x: Tensor) -> Tensor | None: ...

    def dissolve(self) -> None: ...


class QuantLinear(PackedProduct):
    """A linear layer whose weight is quantized.

    Attributes:
        in_features, out_features: K and N.
        weight: stands for the dense weight (`lowbit.nn.weight.PackedWeight`).
        bias: Parameter (N,) or None. It does not require grad unless `train_parameters` says so.
        input_scale: Parameter () fp32 without grad, the one scale that int8 activations are quantized
            by (static quantization), or None: those of the format, found in each call.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        format: Format | str,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Makes a layer whose tensors are zero, to be filled by `load_state_dict`.

        Args:
            in_features, out_features, bias: as in nn.Linear.
            format: a Format or its name.
            device: where the weight and the bias live; "meta" works.
            dtype: of the bias, and of `weight`.
        """
        weight = zero_weight(format, out_features, in_features, device)
        vector = torch.zeros(out_features, device=weight.device, dtype=dtype) if bias else None
        self._init(weight, vector, dtype)

    # The group that computes the product of this layer with others' (`nn/siblings.py`).
    _siblings: _Group | None = None

    def __getstate__(self) -> dict[str, object]:
        # A group is copied and pickled with the module around its layers, and joins them again.
        return {name: value for name, value in self.__dict__.items() if name != "_siblings"}

    def _resized(self) -> None:
        self.out_features, self.in_features = self.shape

    def _changed(self) -> None:
        if self._siblings is not None:
            self._siblings.dissolve()

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, format: Format | str, method: str | None = None
    ) -> QuantLinear:
        """Quantizes the weight of a dense layer; the bias is shared.

        Raises:
            TypeError: `linear` is not an nn.Linear.
            NotImplementedError: it is a subclass that computes something else.
        """
        check_dense(linear)
        weight = quantize(linear.weight.detach(), format, method)
        layer = cls.from_quant_tensor(weight, linear.bias)
        layer.set_weight_dtype(linear.weight.dtype)
        return layer.train(linear.training)

    @classmethod
    def from_quant_tensor(
        cls, weight: QuantTensor, bias: Tensor | None = None, dtype: torch.dtype | None = None
    ) -> QuantLinear:
        """Makes a layer of a quantized (N, K) weight.

        Args:
            weight: on the device where the layer shall run.
            bias: (N,) in fp32, bf16 or fp16.
            dtype: the bias is cast to it, and `weight` stands for it; by default that of the bias, or torch's
                default dtype.

        Raises:
            ValueError: the bias has another shape.
        """
        checks.check_optional(bias=bias)
        if bias is not None:
            if tuple(bias.shape) != weight.shape[:1]:
                raise ValueError(
                    f"bias must have shape {weight.shape[:1]}, got {tuple(bias.shape)}"
                )
            bias = bias.to(weight.device, dtype)
        layer = cls.__new__(cls)
        layer._init(weight, bias, dtype)
        return layer

    @classmethod
    def tied_to(cls, module: PackedModule, bias: Tensor | None = None) -> QuantLinear:
        """Makes a layer that shares the weight of another module, as a tied head does."""
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.share_weight(module)
        layer.dtype = module.dtype
        layer._finish(bias)
        return layer

    def to_linear(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """The dense layer with the values that the weight stands for; it shares the bias.

        Args:
            dtype: of its weight; None is that of `weight`.

        Example:
            >>> QuantLinear.from_linear(nn.Linear(64, 32), "nf4").to_linear().weight.shape
            torch.Size([32, 64])
        """
        values = self.quant_tensor().dequantize().to(dtype or self.dtype)
        n, k = values.shape
        made = nn.Linear(k, n, device="meta", dtype=values.dtype)
        made.register_parameter("bias", self._parameters["bias"])
        made.weight = nn.Parameter(values)
        return made.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        """x W^T + bias: x (..., K) gives (..., N) in its dtype; checks as `lowbit.linear`."""
        if isinstance(x, Proxy):
            return node_of(self, x)
        if self.split is not None:
            return self.split.linear(self, x)
        if self._siblings is not None and not torch.compiler.is_compiling():
            y = self._siblings.product(self, x)
            if y is not None:
                return y
        return self.product(x, self._parameters["bias"])

    def product(
        self, x: Tensor, bias: Tensor | None, tensors: Mapping[str, Any] | None = None
    ) -> Tensor:
        """x W^T + bias of the weight that is here and any bias; `forward` gives it that of the layer.

        Args:
            x, bias: as in `forward`.
            tensors: those of the weight, by the names of buffers, where they are not the buffers.
        """
        b = self._buffers if tensors is None else tensors
        if self._trained:
            b = {**b, **self._learned()}
        w, others = self._terms(b)
        x_scale = self._parameters["input_scale"]
        if x_scale is not None:
            return call_static_linear(x, x_scale, w, bias)
        return call_linear(x, w, bias, *others)

    def is_plain(self) -> bool:
        """Whether a call is a product of `operands` and nothing else: no hooks, nothing learnable of the weight, no
        outliers, no static scale of activations, nothing that other processes have.
        """
        more = self._trained or self.format.outliers or self._parameters["input_scale"] is not None
        more = more or (self.split is not None and not self.split.is_plain(self))
        hooks = self._forward_hooks or self._forward_pre_hooks or self._backward_hooks
        return not (more or hooks or self._backward_pre_hooks)

    def operands(self) -> Operands:
        """The weight, without outliers, as ops take it."""
        return self._terms(self._buffers)[0]

    def extra_repr(self) -> str:
        """Shape, bias, format and bytes."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, {super().extra_repr()}"
            f"{'' if self.input_scale is None else ', static input scale'}"
        )
