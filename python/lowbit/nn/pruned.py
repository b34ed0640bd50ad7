"""PrunedLinear: y = x W^T + bias with a pruned weight, of which the entries alone are stored and multiplied."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lowbit import reference
from lowbit.layouts import PrunedOperands
from lowbit.nn.leaf import Proxy, node_of
from lowbit.nn.weight import HasPackedWeight
from lowbit.ops import checks
from lowbit.ops.linear import call_pruned
from lowbit.ops.pruned import operands_of
from lowbit.weights.pruned import PrunedTensor


class PrunedLinear(HasPackedWeight):
    """A linear layer of a `PrunedTensor`: 3 bytes for each weight that is kept, and no dense copy on a CPU.

    Attributes:
        in_features, out_features: K and N.
        entries, starts: buffers, as in `layouts.PrunedOperands`.
        table: Parameter (2^bits,) fp32 without grad. Let it require grad to train the centroids; the gradient of
            its first entry, which is 0, is 0.
        bias: Parameter (N,) or None.
        weight: stands for the dense weight.

    Example:
        >>> qt = lowbit.quantize(linear.weight, Format.lut(bits=4, group=None, scale=None), "prune", density=0.1)
        >>> layer = PrunedLinear.from_pruned(PrunedTensor.of(qt), linear.bias)
    """

    entries: Tensor
    starts: Tensor

    def __init__(self, operands: PrunedOperands, in_features: int, bias: Tensor | None) -> None:
        """Takes over the operands and the bias."""
        super().__init__()
        self.in_features, self.out_features = in_features, operands.n
        self.register_buffer("entries", operands.entries)
        self.register_buffer("starts", operands.starts)
        self.table = nn.Parameter(operands.table.clone(), requires_grad=False)
        self.bias = bias if bias is None or isinstance(bias, nn.Parameter) else nn.Parameter(bias)
        self._weight_dtype = torch.float32 if bias is None else bias.dtype

    @classmethod
    def from_pruned(cls, weight: PrunedTensor, bias: Tensor | None = None) -> PrunedLinear:
        """A layer of a pruned weight; the bias is shared.

        Raises:
            ValueError: the bias has another shape or device.
        """
        n, k = weight.shape
        if bias is not None:
            checks.check_bias(bias, n, weight.codes.device)
        return cls(operands_of(weight), k, bias)

    def weight_spec(self) -> tuple[tuple[int, int], torch.dtype, torch.device]:
        """Shape, dtype and device of `weight`."""
        return (self.out_features, self.in_features), self._weight_dtype, self.entries.device

    def weight_source(self) -> Callable[[], Tensor]:
        """What makes the dense weight of this moment."""
        return lambda: reference.pruned_weight(*self._operands, self.in_features).to(
            self._weight_dtype
        )

    def learnable_parts(self) -> list[str]:
        """The tensors of the weight that require grad."""
        return ["table"] if self.table.requires_grad else []

    def set_weight_dtype(self, dtype: torch.dtype) -> None:
        """Sets the dtype that `weight` stands for."""
        self._weight_dtype = dtype

    @property
    def _operands(self) -> PrunedOperands:
        return PrunedOperands(self.entries, self.starts, self.table, self.out_features)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K) in fp32, bf16 or fp16 gives (..., N) in the same dtype."""
        if isinstance(x, Proxy):
            return node_of(self, x)
        checks.check_tensors(x=x)
        return call_pruned(x, self._operands, self.in_features, self.bias)

    def extra_repr(self) -> str:
        """Shape and what is kept."""
        kept = int((self.entries[:, 1] != 0).sum()) / (self.in_features * self.out_features)
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, kept={kept:.1%}"
        )
