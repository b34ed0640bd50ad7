"""PackedProduct: a packed weight with a bias, a static scale of activations and tensors that learn: the base of linears
and convolutions.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

import torch
from torch import Tensor, nn

from lowbit import layouts
from lowbit.backends import available
from lowbit.formats import Format
from lowbit.nn.base import PackedModule
from lowbit.weights.quantized import FACTORS, SCALE_DTYPES, QuantTensor

TRAINABLE = ("bias", "scales", "zeros", "table", *FACTORS)
# Stored scales that are the learnable number itself, not a code for it.
_FLOAT_SCALES = ("fp32", "fp16", "bf16")


class PackedProduct(PackedModule):
    """Multiplies what it is given by a packed weight; subclasses say how.

    Attributes:
        bias: Parameter or None. It does not require grad unless `train_parameters` says so.
        input_scale: Parameter () fp32 without grad, the one scale that int8 activations are quantized
            by (static quantization), or None: those of the format, found in each call.
    """

    def _init(self, weight: QuantTensor, bias: Tensor | None, dtype: torch.dtype | None) -> None:
        super().__init__(weight, dtype if bias is None else bias.dtype)
        self._finish(bias)

    def _finish(self, bias: Tensor | None) -> None:
        self._resized()
        self.register_parameter(
            "bias", None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        )
        # Not a buffer: tied layers share those, and each has inputs of its own.
        self.register_parameter("input_scale", None)
        self._trained: frozenset[str] = frozenset()

    def _changed(self) -> None:
        """Called when the weight or the activations are others."""

    def set_weight(self, weight: QuantTensor) -> None:
        """As `PackedModule`; the bias stays.

        Raises:
            ValueError: tensors of the weight are learnable.
        """
        if self._trained:
            raise ValueError(
                f"{sorted(self._trained)} of the layer are learnable: train_parameters(()) ends that"
            )
        super().set_weight(weight)
        self._changed()

    def set_activations(self, activation: str | None, group: int | None = None) -> None:
        """Changes what the product takes x as, and nothing of the weight.

        Args:
            activation: None, as it is given; "int8"; or "int8_table", with the table rounded to int8.
            group: values of a row of x that share a scale; None means the whole row. `Format` says more of both.

        Raises:
            ValueError: the table is not exact in int8, the group does not fit that of the weight, or the layer has a
                static scale and the activation is None.
            NotImplementedError: the layer is spread over processes.
        """
        self.format = self.check_activations(activation, group)
        self._set_specs(self.format)
        self._changed()

    def check_activations(self, activation: str | None, group: int | None = None) -> Format:
        """The format that the layer has after `set_activations`, which raises what this does."""
        if self.split is not None:
            raise NotImplementedError(
                f"activations of a layer must be set before it is split: {self.split}"
            )
        if activation is None and self.input_scale is not None:
            raise ValueError(
                "activation must be int8 or int8_table in a layer with a static input scale, got None"
            )
        return self.format.with_activation(activation, group)

    def set_input_scale(self, scale: float | Tensor | None) -> None:
        """Fixes the scale of int8 activations: q = round(x / scale), saturated at -127 and 127.

        The layer then has no gradients, and computes its product apart from `fuse`d ones. State
        dicts hold the scale, and loading one that does sets it.

        Args:
            scale: one positive and finite number; None goes back to absmax / 127 of each row of x, or block of one.

        Raises:
            ValueError: the number is not that, or the format takes activations as they are or has
                another term.
        """
        if scale is None:
            self.input_scale = None
        else:
            device = self._buffers["codes"].device
            self._set_input_scale(self._checked_input_scale(scale, device))

    def _checked_input_scale(self, scale: float | Tensor, device: torch.device) -> Tensor:
        if self.format.activation is None:
            raise ValueError(
                f"format {self.format.name!r} does not quantize activations: use one with the "
                "suffix _a8 or _a8t"
            )
        if more := self.format.more_terms:
            raise ValueError(
                f"format {self.format.name!r} has {more}, which multiply activations as they are"
            )
        if isinstance(scale, Tensor):
            value = scale.detach().to(torch.float32)
        else:
            value = torch.tensor(scale, dtype=torch.float32, device="cpu")
        if value.numel() != 1 or not bool((value > 0) & value.isfinite()):
            raise ValueError(f"input_scale must be one positive, finite number, got {scale!r:.200}")
        return value.reshape(()).to(device, copy=True)

    def _set_input_scale(self, value: Tensor) -> None:
        self.register_parameter("input_scale", nn.Parameter(value, requires_grad=False))
        self._changed()

    def train_parameters(self, names: Iterable[str]) -> list[nn.Parameter]:
        """Makes the named tensors learnable, and every other one not; () freezes the layer again.

        Scales, zeros and factors become fp32 Parameters in canonical layout; the product uses them
        rounded to their stored dtype, with the gradient passed straight through. The layer stops sharing
        its weight with tied modules.

        Args:
            names: some of "bias", "scales", "zeros", "table", "lowrank_l", "lowrank_r".

        Returns:
            The learnable Parameters, for an optimizer.

        Raises:
            ValueError: a name is unknown, or the layer has no such tensor.
            NotImplementedError: the format stores its scales in two levels or as powers of two, or the weight is
                spread over processes.
        """
        wanted = frozenset(names)
        self._check_trainable(wanted)
        if self.split is not None and wanted - {"bias"}:
            raise NotImplementedError(f"a weight in parts does not learn: {self.split}")
        current = self.own_part()
        codebook = wanted - {"bias"}
        self._buffers = dict(self._buffers)
        for name in self._trained - codebook:
            del self._parameters[name]
        self._trained = frozenset()
        self._set_operands(available.kernel_weight(current))
        for name in sorted(codebook):
            self._buffers.pop(name, None)  # a Parameter already, if it was learnable before
            values = current.tensors[name].detach().to(torch.float32, copy=True)
            self.register_parameter(name, nn.Parameter(values))
        self._trained = codebook
        if self.bias is not None:
            self.bias.requires_grad_("bias" in wanted)
        return [self._parameters[name] for name in TRAINABLE if name in wanted]  # type: ignore[misc]

    def _check_trainable(self, names: frozenset[str]) -> None:
        if unknown := sorted(names - set(TRAINABLE)):
            raise ValueError(f"names must be some of {TRAINABLE}, got {unknown}")
        f = self.format
        has = {
            "bias": self.bias is not None,
            "scales": f.scale is not None,
            "zeros": f.zero in ("float", "min"),
            "table": f.fitted,
            **dict.fromkeys(FACTORS, f.rank > 0 and f.factor_format is None),
        }
        if absent := sorted(name for name in names if not has[name]):
            raise ValueError(f"a layer of format {f.name!r} has no learnable {absent}")
        if "scales" in names and f.scale not in _FLOAT_SCALES:
            raise NotImplementedError(
                f"scales of format {f.name!r} are stored as {f.scale!r}; "
                f"learnable are {_FLOAT_SCALES}"
            )

    def _learned(self) -> dict[str, Tensor]:
        """The learnable tensors as the kernels read them, differentiable."""
        learned: dict[str, Tensor] = {}
        layout = layouts.find(self.layout)
        for name in self._trained:
            p = self._parameters[name]
            assert p is not None
            if name == "table":
                learned[name] = layout.pack_table(p, self.format)
            else:
                # Rounded to the stored dtype, kept in fp32: a gradient in fp16 could overflow.
                rounded = p + (p.detach().to(self._dtype_of(name)).to(p.dtype) - p.detach())
                learned[name] = rounded if name in FACTORS else layout.from_rows(rounded)
        return learned

    @property
    def _stored_dtype(self) -> torch.dtype:
        return SCALE_DTYPES[self.format.scale or "fp32"]

    def _dtype_of(self, name: str) -> torch.dtype:
        return SCALE_DTYPES[self.format.factor] if name in FACTORS else self._stored_dtype

    def own_part(self) -> QuantTensor:
        """As `PackedModule`."""
        with torch.no_grad():
            learned = {
                name: t.detach() if name == "table" else t.to(self._dtype_of(name))
                for name, t in self._learned().items()
            }
            return layouts.from_kernel(self._make_weight(learned))

    def _set_learned(self, weight: QuantTensor) -> None:
        for name in self._trained:
            old, value = self._parameters[name], weight.tensors[name]
            assert old is not None
            if old.device == value.device:
                with torch.no_grad():
                    old.copy_(value)
            else:
                self._parameters[name] = nn.Parameter(value.to(old.dtype), old.requires_grad)

    def _made_by_loading(self, names: Collection[str]) -> dict[str, Tensor]:
        return (
            {"input_scale": torch.empty((), dtype=torch.float32, device="cpu")}
            if "input_scale" in names
            else {}
        )

    def _other_value(
        self, name: str, old: Tensor, value: Tensor, device: torch.device, assign: bool
    ) -> Tensor:
        if name == "input_scale":
            return self._checked_input_scale(value, device)
        return super()._other_value(name, old, value, device, assign)

    def _store_other(self, name: str, value: Tensor, assign: bool) -> None:
        if name == "input_scale":
            self._set_input_scale(value)
        else:
            super()._store_other(name, value, assign)

    def _apply_other(self, fn: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
        new = fn(t)
        parameters = [self._parameters[name] for name in (*self._trained, "input_scale")]
        learned = any(t is p or (p is not None and t is p.grad) for p in parameters)
        return t.to(new.device) if learned and new.dtype != t.dtype else new
