"""BinaryLinear: binary weights times the signs of x, by xor and popcount (`lowbit.binary`)."""

from __future__ import annotations

from torch import Tensor

from lowbit.nn.leaf import Proxy, node_of
from lowbit.nn.linear import QuantLinear
from lowbit.ops import binary, checks
from lowbit.strides import shaped


class BinaryLinear(QuantLinear):
    """A linear of XNOR-Net (arXiv 1603.05279): each row of x counts as mean |x| * sign(x).

    Its weight has 1 bit and the table (-1, 1), in groups that are multiples of 32 or the row. The
    sign of 0 is 1. There are no gradients.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K) gives (..., N) in its dtype; checks as `lowbit.binary`."""
        if isinstance(x, Proxy):
            return node_of(self, x)
        checks.check_tensors(x=x)
        bits, scales = binary.quantize(x.reshape(-1, self.in_features))
        w, _ = self._terms({**self._buffers, **self._learned()})
        y = binary.call_linear(bits, scales, w, self._parameters["bias"], x.dtype)
        return shaped(y, *x.shape[:-1], self.out_features)
