"""Convolutions whose weight is quantized, in the place of nn.Conv1d, nn.ConvTranspose2d and so on.

The weight is a matrix: a filter a row, tap by tap, and of a transposed convolution a row for each tap of an output
(`lowbit.reference.to_rows`, `to_transposed_rows`). That is what `quant_tensor` and state dicts hold.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowbit import backends, reference
from lowbit.backends.base import Backend
from lowbit.explanation import Explanation, explain_request
from lowbit.formats import Format, as_format
from lowbit.methods import quantize
from lowbit.nn.base import zero_weight
from lowbit.nn.leaf import Proxy, node_of
from lowbit.nn.product import PackedProduct
from lowbit.nn.split import ConvolutionSplit
from lowbit.ops import checks
from lowbit.ops.conv import call_conv, call_conv_transpose
from lowbit.reference import Geometry
from lowbit.strides import shaped
from lowbit.weights.quantized import QuantTensor

# By the names that torch has for padding modes, those of F.pad.
PAD_MODES = {
    "zeros": "constant",
    "reflect": "reflect",
    "replicate": "replicate",
    "circular": "circular",
}
# What says where the patches of a convolution lie, with the names of torch.
SHAPE = (
    "in_channels",
    "out_channels",
    "kernel_size",
    "stride",
    "padding",
    "dilation",
    "groups",
    "padding_mode",
    "output_padding",
)
Self = TypeVar("Self", bound="QuantConv")


class QuantConv(PackedProduct):
    """A convolution whose weight is quantized; subclasses say of which class of torch.

    x (B, C, *size) or (C, *size) in fp32, bf16 or fp16 gives (B, N, *out) or (N, *out) in its dtype, in channels_last
    memory if x is.

    Attributes:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode, output_padding: as in
            torch, `padding` also "same" and "valid".
        weight: stands for the dense weight, in the shape that torch has it.
        bias: Parameter (N,) or None.
        input_scale: as in `QuantLinear`.
    """

    kind: ClassVar[type[nn.Module]]
    dims: ClassVar[int]
    transposed: ClassVar[bool] = False
    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    groups: int
    padding_mode: str
    output_padding: tuple[int, ...]
    split: ConvolutionSplit | None
    _geometry: Geometry
    _pads: tuple[int, ...] | None
    takes_over = (*SHAPE, "transposed", "_reversed_padding_repeated_twice")

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        *args: Any,
        format: Format | str,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        """Makes a layer whose tensors are zero, to be filled by `load_state_dict`.

        Args:
            in_channels, out_channels, kernel_size, *args, **kwargs: as of the class of torch.
            format: a Format or its name.
            device: where the weight and the bias live; "meta" works.
            dtype: of the bias, and of `weight`.
        """
        dense: Any = self.kind(
            in_channels, out_channels, kernel_size, *args, device="meta", dtype=dtype, **kwargs
        )
        n, k = matrix_of(dense).shape
        weight = zero_weight(check_format(dense, format), n, k, device)
        bias = None
        if dense.bias is not None:
            bias = torch.zeros(out_channels, device=weight.device, dtype=dtype)
        self._set_geometry(dense)
        self._init(weight, bias, dtype)

    @classmethod
    def from_conv(
        cls: type[Self],
        conv: nn.Module,
        format: Format | str,
        method: str | None = None,
        **options: Any,
    ) -> Self:
        """Quantizes the weight of a dense convolution; the bias is shared.

        Args:
            conv: of the class of torch that this one takes the place of.
            format: a Format or its name; without quantized activations if the convolution has groups.
            method: as in `lowbit.quantize`, and `options` of it.

        Raises:
            TypeError, ValueError, NotImplementedError: `conv` is something else, or has a forward of its own; as
                `lowbit.quantize`.
        """
        check_dense(conv, cls.kind)
        check_format(conv, format)
        dense: Any = conv
        weight = quantize(matrix_of(conv), format, method, **options)
        made = cls.from_quant_tensor(weight, dense.bias, like=conv)
        made.set_weight_dtype(dense.weight.dtype)
        return made.train(conv.training)

    @classmethod
    def from_quant_tensor(
        cls: type[Self],
        weight: QuantTensor,
        bias: Tensor | None = None,
        dtype: torch.dtype | None = None,
        *,
        like: nn.Module,
    ) -> Self:
        """Makes a layer of a quantized matrix.

        Args:
            weight: as `matrix_of` has it, on the device where the layer shall run.
            bias: (N,) in fp32, bf16 or fp16.
            dtype: the bias is cast to it, and `weight` stands for it; by default that of the bias, or torch's default.
            like: a convolution, dense or not, of this geometry.

        Raises:
            ValueError: the weight or the bias has another shape.
        """
        checks.check_optional(bias=bias)
        check_format(like, weight.format)
        made = cls.__new__(cls)
        made._set_geometry(like)
        if weight.shape != made.matrix_shape:
            raise ValueError(f"weight must have shape {made.matrix_shape}, got {weight.shape}")
        if bias is not None:
            if tuple(bias.shape) != (made.out_channels,):
                raise ValueError(
                    f"bias must have shape {(made.out_channels,)}, got {tuple(bias.shape)}"
                )
            bias = bias.to(weight.device, dtype)
        made._init(weight, bias, dtype)
        return made

    def _set_geometry(self, like: Any) -> None:
        # Before the layer is a module: it has no members yet.
        vars(self).update({name: getattr(like, name) for name in SHAPE})
        pads = _pads(self)
        vars(self)["_pads"] = pads if self.padding_mode != "zeros" else None
        vars(self)["_geometry"] = Geometry(
            tuple(self.kernel_size),
            tuple(self.stride),
            tuple(0 for _ in pads) if self._pads else pads,
            tuple(self.dilation),
            self.groups,
            tuple(self.output_padding) if self.transposed else (),
        )

    @property
    def geometry(self) -> Geometry:
        """What the layer is apart from its numbers; a padding that is not of zeros is done before."""
        return self._geometry

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(N, K) of the matrix of the weight."""
        if self.transposed:
            return self._geometry.taps * self.out_channels // self.groups, self.in_channels
        return self.out_channels, self._geometry.taps * self.in_channels // self.groups

    def to_conv(self, dtype: torch.dtype | None = None) -> nn.Module:
        """The dense convolution with the values that the weight stands for; it shares the bias.

        Args:
            dtype: of its weight; None is that of `weight`.
        """
        values = self._as_filters(self.quant_tensor().dequantize()).to(dtype or self.dtype)
        more = {"output_padding": self.output_padding} if self.transposed else {}
        made: Any = self.kind(
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
            bias=False,
            padding_mode=self.padding_mode,
            device="meta",
            dtype=values.dtype,
            **more,
        )
        made.register_parameter("bias", self._parameters["bias"])
        made.weight = nn.Parameter(values.contiguous())
        return made.train(self.training)  # type: ignore[no-any-return]

    def blank(self) -> QuantConv:
        """A layer as this one was made, on the meta device."""
        return type(self).from_quant_tensor(self.quant_tensor().to("meta"), like=self)

    def weight_spec(self) -> tuple[Sequence[int], torch.dtype, torch.device]:  # type: ignore[override]
        """Shape, dtype and device of `weight`."""
        _, dtype, device = super().weight_spec()
        per_group = self.in_channels // self.groups, self.out_channels // self.groups
        ends = (
            (self.in_channels, per_group[1])
            if self.transposed
            else (self.out_channels, per_group[0])
        )
        return (*ends, *self.kernel_size), dtype, device

    def weight_source(self) -> Callable[[], Tensor]:
        """What dequantizes the weight of this moment."""
        source = super().weight_source()
        return lambda: self._as_filters(source()).contiguous()

    def _as_filters(self, rows: Tensor) -> Tensor:
        made = reference.to_transposed_filters if self.transposed else reference.to_filters
        return made(rows, self.kernel_size)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, *size) or (C, *size) gives (B, N, *out) or (N, *out)."""
        if isinstance(x, Proxy):
            return node_of(self, x)
        return self.product(x) if self.split is None else self.split.convolution(self, x)

    def product(self, x: Tensor, tensors: Mapping[str, Any] | None = None) -> Tensor:
        """What `forward` gives, with the weight that is here.

        Args:
            x: as there.
            tensors: those of the weight, by the names of buffers, where they are not the buffers.
        """
        checks.check_tensors(x=x)
        if x.dim() == self.dims + 1:
            y = self.product(x[None], tensors)
            return shaped(y, *y.shape[1:])
        if self._pads:
            x = F.pad(x, _torch_pads(self._pads), PAD_MODES[self.padding_mode])
        b = self._buffers if tensors is None else tensors
        w, others = self._terms({**b, **self._learned()} if self._trained else b)
        bias, x_scale = self._parameters["bias"], self._parameters["input_scale"]
        if self.transposed:
            return call_conv_transpose(x, w, bias, self._geometry, *others, x_scale=x_scale)
        takes_int8 = self.format.activation is not None
        return call_conv(
            x, w, bias, self._geometry, *others, x_scale=x_scale, takes_int8=takes_int8
        )

    def explain(self, x: Tensor) -> Explanation:
        """Says what computes a call: the kernel of a product, as `lowbit.explain`, and what it multiplies.

        Args:
            x: as in `forward`; only shape, dtype and device are read.
        """
        checks.check_tensors(x=x)
        size = x.shape[-self.dims :]
        batch = x.shape[0] if x.dim() == self.dims + 2 else 1
        n, k = self.matrix_shape
        backend = backends.find(x.device.type, self.layout)
        if self.transposed:
            m, how = batch * math.prod(size), "{} of the pixels, and sums of its taps"
            how = "the decoded weight by torch" if self.groups > 1 else how
        else:
            pads = self._pads or (0,) * (2 * self.dims)
            padded = [s + pads[2 * i] + pads[2 * i + 1] for i, s in enumerate(size)]
            m = batch * math.prod(self._geometry.out_size(padded))
            named = Backend.conv_name if self.format.more_terms else type(backend).conv_name
            how = named(backend, "{}", self.groups)
        dtype = torch.float32 if self.transposed else x.dtype
        found = explain_request(self.format, n, k, m, dtype, str(x.device), self.layout)
        found = replace(found, selected=how.format(found.selected), kernels=(), memory=None)
        request = found.request.removeprefix("linear ")
        return replace(found, request=f"{self.kind.__name__} of {tuple(x.shape)}: {request}")

    def rows(self, x: Tensor) -> Tensor:
        """What the matrix multiplies of x, (..., K): patches, or the pixels of a transposed convolution."""
        return rows_of(self, x)

    def extra_repr(self) -> str:
        """The geometry, the bias, format and bytes."""
        more = "".join(
            f", {name}={getattr(self, name)}"
            for name, usual in (("groups", 1), ("padding_mode", "zeros"))
            if getattr(self, name) != usual
        )
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, dilation={self.dilation}{more}, bias={self.bias is not None}, "
            f"{super().extra_repr()}{'' if self.input_scale is None else ', static input scale'}"
        )


class QuantConv1d(QuantConv):
    """nn.Conv1d with a quantized weight."""

    kind, dims = nn.Conv1d, 1


class QuantConv2d(QuantConv):
    """nn.Conv2d with a quantized weight.

    Example:
        >>> QuantConv2d.from_conv(nn.Conv2d(8, 16, 3, padding="same"), "nf4")(torch.randn(1, 8, 5, 5)).shape
        torch.Size([1, 16, 5, 5])
    """

    kind, dims = nn.Conv2d, 2


class QuantConv3d(QuantConv):
    """nn.Conv3d with a quantized weight."""

    kind, dims = nn.Conv3d, 3


class QuantConvTranspose1d(QuantConv):
    """nn.ConvTranspose1d with a quantized weight; its forward takes no output_size."""

    kind, dims, transposed = nn.ConvTranspose1d, 1, True


class QuantConvTranspose2d(QuantConv):
    """nn.ConvTranspose2d with a quantized weight; its forward takes no output_size."""

    kind, dims, transposed = nn.ConvTranspose2d, 2, True


class QuantConvTranspose3d(QuantConv):
    """nn.ConvTranspose3d with a quantized weight; its forward takes no output_size."""

    kind, dims, transposed = nn.ConvTranspose3d, 3, True


_KINDS: dict[type[nn.Module], type[QuantConv]] = {
    made.kind: made
    for made in (
        QuantConv1d,
        QuantConv2d,
        QuantConv3d,
        QuantConvTranspose1d,
        QuantConvTranspose2d,
        QuantConvTranspose3d,
    )
}
CONVOLUTIONS: tuple[type[nn.Module], ...] = tuple(_KINDS)


def packed_conv(conv: nn.Module, weight: QuantTensor, bias: Tensor | None) -> QuantConv:
    """The packed layer for a dense convolution and its quantized matrix."""
    kind = next(made for kind, made in _KINDS.items() if isinstance(conv, kind))
    return kind.from_quant_tensor(weight, bias, like=conv)


def check_dense(conv: nn.Module, kind: type[nn.Module]) -> None:
    """Raises TypeError unless `conv` is of a class, and NotImplementedError if it has another forward."""
    if not isinstance(conv, kind):
        raise TypeError(f"conv must be an nn.{kind.__name__}, got {type(conv).__name__}")
    if type(conv).forward is not kind.forward:
        raise NotImplementedError(
            f"conv is a {type(conv).__name__}, whose forward is not that of nn.{kind.__name__}"
        )


def check_format(conv: Any, format: Format | str) -> Format:
    """The format; NotImplementedError if it quantizes activations and the convolution has groups."""
    f = as_format(format)
    if conv.groups > 1 and f.activation is not None:
        raise NotImplementedError(
            f"a convolution with groups ({conv.groups}) takes activations as they are, got format {f.name!r}: "
            "leave out its suffix"
        )
    return f


def matrix_of(module: nn.Module, weight: Tensor | None = None) -> Tensor:  # (N, K)
    """The weight of a dense linear, embedding or convolution, or another one for it, as the matrix that is quantized;
    without grad.
    """
    weight = module.weight.detach() if weight is None else weight.detach()  # type: ignore[operator,union-attr]
    if not isinstance(module, CONVOLUTIONS):
        return weight
    transposed = module.transposed  # type: ignore[union-attr]
    return (reference.to_transposed_rows if transposed else reference.to_rows)(weight)


def rows_of(conv: Any, x: Tensor) -> Tensor:  # (..., K)
    """What the matrix of a convolution, dense or not, multiplies of x (B, C, *size) or (C, *size); with groups those of
    all groups one after the other.
    """
    dims = len(conv.kernel_size)
    x = x[None] if x.dim() == dims + 1 else x
    if conv.transposed:
        return x.movedim(1, -1)
    pads = _pads(conv)
    if any(pads):
        x = F.pad(x, _torch_pads(pads), PAD_MODES[conv.padding_mode])
    none = (0,) * len(pads)
    g = Geometry(conv.kernel_size, conv.stride, none, conv.dilation, conv.groups)
    return reference.patches(x, g)


def _pads(conv: Any) -> tuple[int, ...]:  # (2 D,), before and after each dimension
    if conv.padding == "valid":
        return (0,) * (2 * len(conv.kernel_size))
    if conv.padding != "same":
        return tuple(int(p) for p in conv.padding for _ in range(2))
    totals = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
    return tuple(p for total in totals for p in (total // 2, total - total // 2))


def _torch_pads(
    pads: Sequence[int],
) -> list[int]:  # in the order of F.pad, the last dimension first
    return [p for i in range(len(pads) - 2, -1, -2) for p in pads[i : i + 2]]
