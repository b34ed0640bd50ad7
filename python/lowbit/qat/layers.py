"""FakeQuantLinear: a linear layer that trains through its quantizers; prepare and convert: into and out of it.

A convolution becomes a `PatchConv2d` around a FakeQuantLinear. Converted, it is a `lowbit.nn.QuantConv2d`, or still a
PatchConv2d if its activations are quantized in a way that only a linear knows.
"""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowbit.formats import Format, as_format
from lowbit.nn import QuantLinear
from lowbit.nn.conv import matrix_of, packed_conv
from lowbit.nn.leaf import Proxy, node_of
from lowbit.nn.names import compile_patterns, warn_unmatched
from lowbit.nn.surgery import obstacle
from lowbit.ops import checks
from lowbit.ptq.plan import READS_WEIGHTS, names_in
from lowbit.ptq.swap import swapping
from lowbit.qat.activations import ActivationQuantizer, Int8Activation
from lowbit.qat.base import STE, WeightQuantizer
from lowbit.qat.few_levels import BWN, TTQ, TWN, BitNet, DoReFa
from lowbit.qat.learned_step import LSQ
from lowbit.qat.patch_conv import PatchConv2d
from lowbit.text import did_you_mean

_SHAPE = ("in_features", "out_features")
MakeWeight = Callable[[Tensor], WeightQuantizer]
MakeActivation = Callable[[], ActivationQuantizer]


@dataclass(frozen=True)
class Spec:
    """How to quantize a layer.

    Attributes:
        weight: a format that `lowbit.quantize` takes weights to (`qat.STE`), or what makes a
            quantizer of a weight (N, K): `qat.TTQ`, `functools.partial(qat.LSQ, format="int4_row_fp32")`.
        activation: what makes a quantizer of its input, `functools.partial(qat.PACT, 4)`; None leaves the input.
    """

    weight: Format | str | MakeWeight
    activation: MakeActivation | None = None

    def weight_quantizer(self, weight: Tensor) -> WeightQuantizer:
        """A new quantizer for a weight (N, K)."""
        if isinstance(self.weight, (Format, str)):
            return STE(weight, self.weight)
        return self.weight(weight)

    def activation_quantizer(self, device: torch.device) -> ActivationQuantizer | None:
        """A new quantizer for the input, or None."""
        if self.activation is None:
            return None
        with device:  # a quantizer makes its parameters on the default device
            return self.activation().to(device)


# What a name alone stands for; `qat.Spec` says it with other arguments.
SPECS = {
    "bitnet": Spec(BitNet, Int8Activation),
    "bwn": Spec(BWN),
    "dorefa": Spec(functools.partial(DoReFa, bits=4)),
    "lsq": Spec(LSQ),
    "ttq": Spec(TTQ),
    "twn": Spec(TWN),
}


def as_spec(spec: Spec | str | None) -> Spec | None:
    """The Spec that a name of `SPECS`, or that of a format, stands for.

    Raises:
        ValueError: it is neither.
    """
    if spec is None or isinstance(spec, Spec):
        return spec
    if not isinstance(spec, str):
        raise TypeError(
            f"recipe must be a qat.Spec, a name or a mapping, got {type(spec).__name__}"
        )
    if found := SPECS.get(spec.lower()):
        return found
    try:
        return Spec(as_format(spec))
    except ValueError as e:
        hint = did_you_mean(spec.lower(), SPECS)
        raise ValueError(
            f"{spec!r} is no quantizer ({', '.join(SPECS)}){hint} and no format: {e}"
        ) from e


class FakeQuantLinear(nn.Module):
    """y = A(x) Q(W)^T + bias with a weight quantizer Q and an activation quantizer A.

    Attributes:
        weight: Parameter (N, K), the weight that is trained; a Parameter that was given is kept.
        bias: Parameter (N,) or None.
        quantizer, activation: the quantizers; `activation` may be None.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        quantizer: WeightQuantizer,
        activation: ActivationQuantizer | None = None,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight = _as_parameter(weight)
        self.register_parameter("bias", None if bias is None else _as_parameter(bias))
        self.quantizer, self.activation = quantizer, activation

    @classmethod
    def from_linear(cls, linear: nn.Linear, spec: Spec) -> FakeQuantLinear:
        """Makes a layer that shares weight and bias with a dense one."""
        activation = spec.activation_quantizer(linear.weight.device)
        quantizer = spec.weight_quantizer(linear.weight.detach())
        return cls(linear.weight, linear.bias, quantizer, activation).train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K) gives (..., N)."""
        if isinstance(x, Proxy):
            return node_of(self, x)
        checks.check_tensors(x=x)
        x = x if self.activation is None else self.activation(x)
        return F.linear(x, self.quantizer(self.weight), self.bias)

    def convert(self) -> nn.Module:
        """The same layer with its weight packed: a QuantLinear, or what the activation quantizer makes of it.

        Raises:
            NotImplementedError: the quantizer's weights have no packed form.
        """
        weight = self.quantizer.quant_tensor(self.weight)
        if self.activation is None:
            made: nn.Module = QuantLinear.from_quant_tensor(weight, self.bias)
        else:
            made = self.activation.convert(weight, self.bias)
        return made.train(self.training)

    def extra_repr(self) -> str:
        """Shape and bias."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}"
        )


class BitLinear(FakeQuantLinear):
    """The linear layer of BitNet b1.58 (arXiv 2402.17764): ternary weights, int8 activations per token.

    It takes the place of nn.Linear in a model that is trained from the start. The norm that BitNet has in front of it
    stays a module of its own. Converted, it is a QuantLinear of "ternary_row_fp32" with int8 activations.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Arguments and initialization as in nn.Linear, without a bias unless asked for."""
        dense = nn.Linear(in_features, out_features, bias, device=device, dtype=dtype)
        quantizer = BitNet(dense.weight)
        super().__init__(dense.weight, dense.bias, quantizer, Int8Activation())


def prepare(
    model: nn.Module,
    recipe: Spec | str | Mapping[str, Spec | str | None],
    *,
    skip: Iterable[str] = (),
) -> list[str]:
    """Puts fake quantizers into the linears and 2-D convolutions of a model, in place.

    nn.Linear becomes FakeQuantLinear, which keeps the Parameters; nn.Conv2d becomes PatchConv2d around a
    FakeQuantLinear with a new Parameter (N, taps * C), behind its activation quantizer in an nn.Sequential unless
    that works on patches. A module under two names stays one. Call it before the optimizer is made.

    Args:
        model: trained or not; subclasses of the two with a forward of their own, and linears whose weight
            torch's attention modules read themselves, are left.
        recipe: one Spec, or patterns with a Spec or None each; the first that matches counts. How
            a pattern matches: `lowbit.ptq.Selection`. For a Spec the name of one will do: "lsq" (4 bits),
            "bitnet", "bwn", "twn", "ttq", "dorefa" (4 bits), or of a format.
        skip: patterns of modules to leave.

    Returns:
        The names of the layers that were replaced.

    Warns:
        UserWarning: a pattern matches nothing in the model, or a layer that the recipe names is left because
            something of it would be lost (`lowbit.nn.surgery.obstacle`).

    Raises:
        ValueError: nothing was replaced, the model is a layer itself, or a quantizer refuses a weight.
        NotImplementedError: a convolution that the recipe names has groups.
        Whatever is raised, the model is as it was before.
    """
    skipping = compile_patterns(skip)
    given = recipe if isinstance(recipe, Mapping) else {".*": recipe}
    rules = {pattern: as_spec(spec) for pattern, spec in given.items()}
    chosen = compile_patterns([*rules])
    known = names_in(model)
    warn_unmatched("skip", skipping, known)
    warn_unmatched("recipe", chosen, known)
    compiled: list[tuple[re.Pattern[str], Spec | None]] = [(p, None) for p in skipping.values()]
    compiled += [(chosen[text], spec) for text, spec in rules.items()]
    kept = {
        id(child)
        for module in model.modules()
        if isinstance(module, READS_WEIGHTS)
        for child in module.children()
    }
    # Every name of each module to replace, and what takes its place.
    made: dict[int, tuple[list[str], nn.Module]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        spec = next((spec for pattern, spec in compiled if pattern.search(name)), None)
        if spec is None or id(module) in kept or not _replaceable(module):
            continue
        if not name:
            raise ValueError(
                f"model must contain the layers to replace, it is one itself ({type(module).__name__})"
            )
        if id(module) in made:
            made[id(module)][0].append(name)
        elif reason := obstacle(module):
            warnings.warn(f"{name} is left as it is: {reason}", stacklevel=2)
        else:
            try:
                made[id(module)] = [name], _fake(module, spec)
            except (TypeError, ValueError, NotImplementedError) as e:
                raise type(e)(f"{name}: {e}") from e
    if not made:
        raise ValueError("recipe matches no linear and no convolution of the model")
    return _swap_all(model, made.values())


def convert(model: nn.Module) -> list[str]:
    """Packs every FakeQuantLinear of a model, in place.

    The packed weights dequantize to the fake-quantized ones bit for bit.
    To load the result elsewhere (`lowbit.load`), prepare and convert an untrained model alike first: files
    hold weights, not what was done to activations or convolutions.

    Returns:
        The names of the layers that were replaced.

    Raises:
        ValueError: there are none, or the model is one itself: use its method `convert`.
        NotImplementedError: a quantizer's weights have no packed form, or something of a layer would be lost
            (`lowbit.nn.surgery.obstacle`).
        Whatever is raised, the model is as it was before.
    """
    if isinstance(model, FakeQuantLinear):
        raise ValueError(
            "model must contain the layers to replace, it is one itself: use its convert"
        )
    made: dict[int, tuple[list[str], nn.Module]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if not isinstance(module, FakeQuantLinear):
            continue
        if id(module) in made:
            made[id(module)][0].append(name)
            continue
        try:
            converted = module.convert()
        except NotImplementedError as e:
            raise NotImplementedError(f"{name}: {e}") from e
        parent = model.get_submodule(name.rpartition(".")[0])
        if (
            isinstance(parent, PatchConv2d)
            and parent is not model
            and type(converted) is QuantLinear
        ):
            name, converted = name.rpartition(".")[0], _packed_conv(parent, converted)
        made[id(module)] = [name], converted
    if not made:
        raise ValueError("model has no FakeQuantLinear")
    return _swap_all(model, made.values(), own=("quantizer", "activation", "linear", *_SHAPE))


def _packed_conv(conv: PatchConv2d, linear: QuantLinear) -> nn.Module:
    dense = nn.Conv2d(
        conv.in_channels,  # type: ignore[arg-type]
        conv.out_channels,  # type: ignore[arg-type]
        conv.kernel_size,  # type: ignore[arg-type]
        conv.stride,  # type: ignore[arg-type]
        conv.padding,  # type: ignore[arg-type]
        conv.dilation,  # type: ignore[arg-type]
        padding_mode=conv.padding_mode,  # type: ignore[arg-type]
        device="meta",
        dtype=linear.dtype,
    )
    return packed_conv(dense, linear.quant_tensor(), linear._parameters["bias"]).train(
        conv.training
    )


def _swap_all(
    model: nn.Module, made: Iterable[tuple[list[str], nn.Module]], own: tuple[str, ...] = ()
) -> list[str]:
    """Replaces modules, or none of them, and gives all their names in the order of the model."""
    replaced: set[str] = set()
    with swapping(model) as swap:
        for names, module in made:
            swap(names, module, own)
            replaced.update(names)
    return [name for name, _ in model.named_modules(remove_duplicate=False) if name in replaced]


def _replaceable(module: nn.Module) -> bool:
    return any(
        isinstance(module, kind) and type(module).forward is kind.forward  # type: ignore[attr-defined]
        for kind in (nn.Linear, nn.Conv2d)
    )


def _fake(module: nn.Module, spec: Spec) -> nn.Module:
    if isinstance(module, nn.Linear):
        return FakeQuantLinear.from_linear(module, spec)
    assert isinstance(module, nn.Conv2d)
    weight = matrix_of(module).clone(memory_format=torch.contiguous_format)
    activation = spec.activation_quantizer(weight.device)
    on_patches = activation if activation is not None and activation.per_row else None
    inner = FakeQuantLinear(weight, module.bias, spec.weight_quantizer(weight), on_patches)
    made: nn.Module = PatchConv2d(module, inner)
    if activation is not None and on_patches is None:
        made = nn.Sequential(activation, made)
    return made.train(module.training)


def _as_parameter(t: Tensor) -> nn.Parameter:
    return t if isinstance(t, nn.Parameter) else nn.Parameter(t)
