"""LLM.int8() (Dettmers et al., arXiv 2208.07339): int8 products, but for the few features of x that are far larger.

A feature of x above a threshold would set the scale of its whole row to a number that rounds the others to 0. Such
features are multiplied in the dtype of x, and are 0 in what is quantized to int8.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowbit.formats import Format, as_format
from lowbit.nn.leaf import Proxy, node_of
from lowbit.nn.linear import QuantLinear, check_dense
from lowbit.nn.weight import HasPackedWeight
from lowbit.ops import checks
from lowbit.ops.linear import call_linear

THRESHOLD = 6.0  # of the paper


class LLMInt8Linear(HasPackedWeight):
    """y = x_R W_R^T + x_O W_O^T + bias: the rest R of the features in int8, the outlier features O as they are.

    Both products are rounded to the dtype of x, and so is their sum, as in the paper. As there, W is quantized per row
    and x per row of x, with the format "int8_row_a8".

    With the absolute maxima of calibration O is fixed: `columns` holds W_O in the dtype of the layer, and the scales of
    W_R do not see it. Without them O is found in every call, as in the paper: the features of which any row of x is
    above the threshold. Interpretation: W_O then has the values of the quantized weight (the authors' code does so for
    weights that it stores in int8), and x_O, 0 in all other features, is multiplied with all of it, so that no shape
    depends on values; that product costs as much as one with float activations.

    Attributes:
        in_features, out_features: K and N.
        threshold: the largest |x| that is not an outlier.
        quantized: the QuantLinear of W_R, or of all of W; it holds the bias.
        features: O, (F,) int64, ascending; None if it is found in every call.
        columns: W_O, (N, F); None with `features`.
        weight: stands for the dense weight (`lowbit.nn.weight.PackedWeight`).
    """

    features: Tensor | None
    columns: Tensor | None

    def __init__(
        self,
        quantized: QuantLinear,
        threshold: float = THRESHOLD,
        features: Tensor | None = None,
        columns: Tensor | None = None,
    ) -> None:
        """Makes a layer of its parts; `from_linear` finds them.

        Raises:
            TypeError: `quantized` is not a QuantLinear.
            ValueError: its format has no int8 activations, the threshold is not positive and finite,
                or features and columns do not fit it and each other.
        """
        super().__init__()
        if not isinstance(quantized, QuantLinear):
            raise TypeError(f"quantized must be a QuantLinear, got {type(quantized).__name__}")
        _check_format(quantized.format)
        _check_threshold(threshold)
        _check_outliers(quantized, features, columns)
        self.in_features, self.out_features = quantized.in_features, quantized.out_features
        self.threshold = threshold
        self.quantized = quantized
        self.register_buffer("features", features)
        self.register_buffer("columns", columns)
        exact = quantized.format.with_activation(None)
        self._exact_spec = exact.matrix.spec

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        format: Format | str = "int8_row_a8",
        *,
        threshold: float = THRESHOLD,
        absmax: Tensor | None = None,
        method: str | None = None,
    ) -> LLMInt8Linear:
        """Quantizes the weight of a dense layer; the bias is shared.

        Args:
            linear: an nn.Linear.
            format: one with int8 activations ("_a8", "_a8t").
            threshold: features with an absolute maximum above it are outliers.
            absmax: (K,), the absolute maximum of each feature of x in calibration
                (`lowbit.ptq.InputStatistics.absmax`); None finds outliers in every call.
            method: as in `lowbit.quantize`.

        Raises:
            TypeError, ValueError: as `QuantLinear.from_linear` and `__init__`; `absmax` is not
                finite and (K,).
        """
        check_dense(linear)
        _check_format(as_format(format))
        _check_threshold(threshold)
        if absmax is None:
            return cls(QuantLinear.from_linear(linear, format, method), threshold)
        k = linear.in_features
        if tuple(absmax.shape) != (k,) or not bool(torch.isfinite(absmax).all()):
            raise ValueError(f"absmax must be finite of shape ({k},), got {tuple(absmax.shape)}")
        weight = linear.weight.detach()
        features = (absmax.to(weight.device) > threshold).nonzero().flatten()
        rest = nn.Linear(k, linear.out_features, False, device="meta", dtype=weight.dtype)
        rest.weight = nn.Parameter(weight.index_fill(1, features, 0), requires_grad=False)
        quantized = QuantLinear.from_linear(rest, format, method)
        if linear.bias is not None:
            quantized.bias = nn.Parameter(linear.bias.detach(), requires_grad=False)
        quantized.set_weight_dtype(weight.dtype)
        made = cls(quantized, threshold, features, weight.index_select(1, features))
        return made.train(linear.training)

    @property
    def bias(self) -> nn.Parameter | None:
        """(N,), or None."""
        return self.quantized._parameters["bias"]

    def weight_spec(self) -> tuple[tuple[int, int], torch.dtype, torch.device]:
        """Shape, dtype and device of `weight`."""
        return self.quantized.weight_spec()

    def weight_source(self) -> Callable[[], Tensor]:
        """What makes the weight of this moment: W_R dequantized and W_O."""
        rest, features, columns = self.quantized.weight_source(), self.features, self.columns
        if features is None or columns is None:
            return rest
        values = columns.detach().to(self.quantized.dtype)
        return lambda: rest().index_copy(1, features, values)

    def learnable_parts(self) -> list[str]:
        """The tensors of the packed weight that require grad."""
        return self.quantized.learnable_parts()

    def set_weight_dtype(self, dtype: torch.dtype) -> None:
        """Sets the dtype that `weight` stands for."""
        self.quantized.set_weight_dtype(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K) in fp32, bf16 or fp16 gives (..., N) in its dtype; gradients for x and the bias."""
        if isinstance(x, Proxy):
            return node_of(self, x)
        checks.check_tensors(x=x)
        if self.features is None or self.columns is None:
            return self._forward_dynamic(x)
        if not len(self.features):
            return self.quantized(x)
        large = F.linear(x.index_select(-1, self.features), self.columns.to(x.dtype))
        return self.quantized(x.index_fill(-1, self.features, 0)) + large

    def _forward_dynamic(self, x: Tensor) -> Tensor:
        large = (x.detach().abs() > self.threshold).reshape(-1, self.in_features).any(0)
        w, others = self.quantized._terms(self.quantized._buffers)
        w = w._replace(spec=self._exact_spec)
        exact = call_linear(torch.where(large, x, 0), w, None, *others)
        return self.quantized(torch.where(large, 0, x)) + exact

    def extra_repr(self) -> str:
        """Threshold and number of outlier features."""
        found = "found in every call" if self.features is None else str(len(self.features))
        return f"threshold={self.threshold}, outlier features: {found}"


def _check_format(format: Format) -> None:
    if format.activation is None:
        raise ValueError(
            f"format must have int8 activations (suffix _a8 or _a8t), got {format.name!r}"
        )


def _check_threshold(threshold: float) -> None:
    if not 0 < threshold < math.inf:
        raise ValueError(f"threshold must be positive and finite, got {threshold}")


def _check_outliers(
    quantized: QuantLinear, features: Tensor | None, columns: Tensor | None
) -> None:
    if features is None or columns is None:
        if features is not columns:
            raise ValueError("features and columns must be given together")
        return
    n, k = quantized.shape
    if features.dtype != torch.int64 or features.dim() != 1 or len(features) > k:
        raise ValueError(
            f"features must be int64 of shape (F,) with F at most {k}, got {features.dtype} of "
            f"shape {tuple(features.shape)}"
        )
    if not columns.is_floating_point() or columns.shape != (n, len(features)):
        raise ValueError(
            f"columns must be floating of shape ({n}, {len(features)}), got {columns.dtype} of "
            f"shape {tuple(columns.shape)}"
        )
