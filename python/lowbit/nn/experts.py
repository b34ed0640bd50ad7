"""QuantExperts: one projection of a mixture of experts, a layer for each expert, and what calls them in transformers.

transformers 5 keeps the experts of a layer in 3-D parameters, (experts, N, K) or transposed, and computes with a
function that its `ExpertsInterface` names. `split` puts a `QuantExperts` of linears in the place of such a parameter,
without a copy, and lets `experts_forward` compute; `fuse` is the way back. Gates and what they multiply are one
parameter there; where they are stored in two formats, or each in an order of its own, they are two `QuantExperts`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lowbit.formats import Format
from lowbit.methods import quantize
from lowbit.nn.linear import QuantLinear
from lowbit.nn.split import Split
from lowbit.ops import checks
from lowbit.ops.experts import linear_experts

# The name of `experts_forward` in transformers' ExpertsInterface.
IMPLEMENTATION = "lowbit"
_FLAGS = (
    "config",
    "has_bias",
    "has_gate",
    "has_post_expert_norm",
    "is_concatenated",
    "is_transposed",
)
_PROJECTIONS = ("gate_up_proj", "up_proj", "down_proj")
# What `split` makes of gate_up_proj where gates are apart from what they multiply.
HALVES = ("gate_proj", "up_proj")
_CONFIG = "_config_when_dense"


class QuantExperts(nn.ModuleList):
    """Linears of the same shape, one an expert, each of which gets the rows that are meant for it.

    The result is, bit for bit, that of the layers called one by one; an expert without a row is not called.

    Args:
        layers: `QuantLinear`s, or dense ones.

    Raises:
        ValueError: there is none, or their shapes differ.

    Example:
        >>> experts = QuantExperts.from_weights(torch.randn(4, 32, 64), "nf4")
        >>> experts(torch.randn(6, 64), torch.tensor([3, 0, 0, 1, 3, 0])).shape
        torch.Size([6, 32])
    """

    # What brings x and sums results up where the experts are parts of others; `grouped` leaves that to its caller.
    split: Split | None = None

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        super().__init__(layers)
        shapes = {(layer.out_features, layer.in_features) for layer in self}
        if len(shapes) != 1:
            raise ValueError(f"layers must have one shape, got {sorted(shapes, key=str) or 'none'}")

    @classmethod
    def from_weights(
        cls,
        weight: Tensor,
        format: Format | str,
        method: str | None = None,
        *,
        bias: Tensor | None = None,
    ) -> QuantExperts:
        """Quantizes a weight (experts, N, K), expert by expert.

        Args:
            weight: fp32, bf16, fp16 or fp64.
            format, method: as in `lowbit.quantize`.
            bias: (experts, N), or None.

        Raises:
            TypeError, ValueError: as `lowbit.quantize`, or a shape is another one.
        """
        checks.check_tensors(weight=weight)
        checks.check_optional(bias=bias)
        if weight.dim() != 3 or not len(weight):
            raise ValueError(f"weight must be (experts, N, K), got {tuple(weight.shape)}")
        if bias is not None and bias.shape != weight.shape[:2]:
            expected = tuple(weight.shape[:2])
            raise ValueError(f"bias must have shape {expected}, got {tuple(bias.shape)}")
        layers = []
        for e in range(len(weight)):
            made = quantize(weight[e].detach(), format, method)
            layers.append(QuantLinear.from_quant_tensor(made, None if bias is None else bias[e]))
            layers[-1].set_weight_dtype(weight.dtype)
        return cls(layers)

    @property
    def _first(self) -> nn.Linear | QuantLinear:
        first: Any = self[0]
        return first  # type: ignore[no-any-return]

    @property
    def out_features(self) -> int:
        """N."""
        return self._first.out_features

    @property
    def in_features(self) -> int:
        """K."""
        return self._first.in_features

    @property
    def shape(self) -> tuple[int, int, int]:
        """(experts, N, K)."""
        return len(self), self.out_features, self.in_features

    def forward(self, x: Tensor, experts: Tensor) -> Tensor:  # type: ignore[override]
        """x W[experts]^T + bias[experts], row by row: x (S, K) and experts (S,) int64 or int32 give (S, N).

        Raises:
            TypeError, ValueError: a shape or dtype is another one, or an expert is out of range.
        """
        checks.check_tensors(x=x, experts=experts)
        if experts.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"experts must be int64 or int32, got {experts.dtype}")
        if x.dim() != 2 or experts.shape != x.shape[:1]:
            shapes = f"{tuple(x.shape)} and {tuple(experts.shape)}"
            raise ValueError(f"x must be (S, K) and experts (S,), got {shapes}")
        x = x if self.split is None else self.split.take(x)
        ids, order = torch.sort(experts, stable=True)
        y = self.grouped(x[order], counts_of(ids, len(self)))
        y = torch.empty_like(y).index_copy(0, order, y)
        return y if self.split is None else self.split.give(y)

    def grouped(self, x: Tensor, counts: Tensor | Sequence[int]) -> Tensor:
        """The product of rows that are sorted by expert.

        Args:
            x: (S, K).
            counts: how many rows each expert has, one number an expert; a tensor while torch compiles.
        """
        if isinstance(counts, Tensor):
            plain = self._plain()
            if plain is not None and not torch.is_grad_enabled():
                return linear_experts(x, counts, *plain)
            counts = counts.tolist()
        made = []
        start = 0
        for e, count in enumerate(counts):
            if count:
                made.append(self[e](x[start : start + count]))
                start += count
        return torch.cat(made) if made else x.new_empty((0, self.out_features))

    def _plain(self) -> Any:
        """Weights and biases of layers that do nothing but a product; None if there are others."""
        layers: list[Any] = list(self)
        if not all(type(layer) is QuantLinear and layer.is_plain() for layer in layers):
            return None
        weights = [layer.operands() for layer in layers]
        return weights, [layer._parameters["bias"] for layer in layers]

    def extra_repr(self) -> str:
        """Nothing: the layers say it."""
        return ""


def counts_of(ids: Tensor, experts: int) -> Tensor | list[int]:
    """How many of these sorted ids (S,) are those of each of so many experts; a tensor while torch compiles.

    Raises:
        ValueError: an id is out of range.
    """
    if torch.compiler.is_compiling():
        every = torch.arange(experts, dtype=ids.dtype, device=ids.device)
        return (ids[:, None] == every).sum(0)
    if not len(ids):
        return [0] * experts
    low, high = int(ids[0]), int(ids[-1])
    if low < 0 or high >= experts:
        raise ValueError(f"experts must be in [0, {experts}), got {low if low < 0 else high}")
    return torch.bincount(ids, minlength=experts).tolist()  # type: ignore[no-any-return]


def experts_forward(
    self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """What a fused experts module of transformers computes, with a `QuantExperts` in the place of its parameters.

    Args:
        self: the module; its `_apply_gate`, biases, layout and norm count.
        hidden_states: (tokens, hidden).
        top_k_index: (tokens, k) int64, the experts of each token. One more than there are means none where experts
            are spread over processes.
        top_k_weights: (tokens, k), what their results are multiplied by.

    Raises:
        ValueError: an expert is out of range.
    """
    firsts = [self._modules[name] for name in _names_in(self, _PROJECTIONS[not self.has_gate])]
    top_k = top_k_index.shape[-1]
    ids, order = torch.sort(top_k_index.reshape(-1), stable=True)
    if self._is_expert_parallel:
        inside = int((ids < len(firsts[0])).sum())
        ids, order = ids[:inside], order[:inside]
    counts = counts_of(ids, len(firsts[0]))
    x = hidden_states[order // top_k]
    x = _joined([first.grouped(x, counts) for first in firsts], 1, self)
    x = self.down_proj.grouped(self._apply_gate(x) if self.has_gate else self.act_fn(x), counts)
    if self.has_post_expert_norm:
        x = self.post_expert_norm(x)
    x = x * top_k_weights.reshape(-1)[order][:, None]
    rows = x.new_zeros((top_k_index.numel(), x.shape[-1])).index_copy(0, order, x)
    summed = rows.view(-1, top_k, x.shape[-1]).sum(1)
    return summed.to(hidden_states.dtype)


def projections(module: nn.Module) -> list[str]:
    """The 3-D parameters of a fused experts module of transformers; none of any other module."""
    own = vars(module)
    if not all(flag in own for flag in _FLAGS) or not hasattr(type(module).forward, "__wrapped__"):
        return []
    expected = [n for n in _PROJECTIONS if n != ("up_proj" if own["has_gate"] else "gate_up_proj")]
    if parametrize.is_parametrized(module) or "forward" in own:
        return []
    found = []
    for name in expected:
        parameter = module._parameters.get(name)
        bias = module._parameters.get(f"{name}_bias")
        fits = parameter is not None and parameter.dim() == 3 and len(parameter)
        if fits and (bias is not None) == own["has_bias"]:
            found.append(name)
        elif name not in held(module):
            return []
    return found


def held(module: nn.Module) -> list[str]:
    """The projections of a fused experts module that are in `QuantExperts`, gate_up_proj for its halves too."""
    return [
        name
        for name in _PROJECTIONS
        if (name != "up_proj" or not vars(module).get("has_gate"))
        and all(isinstance(module._modules.get(n), QuantExperts) for n in _names_in(module, name))
    ]


def _names_in(module: nn.Module, projection: str) -> tuple[str, ...]:
    """Under which names a module has a projection: its own, or those of its halves."""
    apart = projection == "gate_up_proj" and HALVES[0] in module._modules
    return HALVES if apart else (projection,)


def _joined(halves: Sequence[Tensor], dim: int, module: Any) -> Tensor:
    """Rows of gates and of what they multiply as the module has them in one: one after the other, or by turns."""
    if len(halves) == 1:
        return halves[0]
    if module.is_concatenated:
        return torch.cat(list(halves), dim)
    return torch.stack(list(halves), dim + 1).flatten(dim, dim + 1)


def rows_of_halves(module: Any, count: int) -> tuple[slice, slice]:
    """Which of `count` rows of gate_up_proj are those of gates, and of what they multiply."""
    if module.is_concatenated:
        return slice(0, count // 2), slice(count // 2, None)
    return slice(0, None, 2), slice(1, None, 2)


class ExpertLinear(nn.Linear):
    """One expert of a fused parameter, or some of its rows, as an nn.Linear, whose weight is a view of it.

    Attributes:
        fused: (Parameter, bias or None) that it is a part of.
        views: the weight and the bias that it was made with.
    """

    not_carried = ("fused", "views")
    fused: Any
    views: Any

    def __init__(
        self, fused: Tensor, bias: Tensor | None, expert: int, transposed: bool, rows: slice
    ) -> None:
        weight = fused.detach()[expert]
        weight = (weight.t() if transposed else weight)[rows]
        super().__init__(weight.shape[1], weight.shape[0], False, device="meta", dtype=weight.dtype)
        self.weight = nn.Parameter(weight, requires_grad=False)
        if bias is not None:
            self.bias = nn.Parameter(bias.detach()[expert][rows], requires_grad=False)  # type: ignore[assignment]
        vars(self).update(fused=(fused, bias), views=(self.weight, self.bias))


def split(module: Any, name: str, halves: bool = False) -> dict[str, QuantExperts]:
    """Puts linears in the place of one of the `projections` of a module, which computes with them from now on.

    Args:
        module, name: as above.
        halves: make two of gate_up_proj, by the names of `HALVES`.

    Returns:
        What takes its place, by name.
    """
    order = list(module._parameters)
    fused, bias = module._parameters.pop(name), module._parameters.pop(f"{name}_bias", None)
    rows = {name: slice(None)}
    if halves:
        count = fused.shape[2 if module.is_transposed else 1]
        rows = dict(zip(HALVES, rows_of_halves(module, count), strict=True))
    made = {
        key: QuantExperts(
            ExpertLinear(fused, bias, e, module.is_transposed, own) for e in range(len(fused))
        ).train(module.training)
        for key, own in rows.items()
    }
    for key, experts in made.items():
        vars(experts)["parameters_before"] = order
        setattr(module, key, experts)
    if _CONFIG not in vars(module):
        # A copy: other modules share it, and what says how to compute is a part of it.
        vars(module)[_CONFIG] = module.config
        module.config = copy.copy(module.config)
        module.config._experts_implementation_internal = IMPLEMENTATION
    # transformers shall not initialize parameters that are none any more.
    module._is_hf_initialized = True
    return made


def fuse(module: Any, name: str) -> None:
    """Puts a parameter (experts, N, K) in the place of the dense linears of a projection again.

    It is the parameter that was `split` if nothing has changed, and a new one if weights have been set.

    Raises:
        ValueError: a layer is packed.
    """
    names = _names_in(module, name)
    halves: list[Any] = [module._modules[key] for key in names]
    for key, layers in zip(names, halves, strict=True):
        packed = [str(e) for e, layer in enumerate(layers) if not isinstance(layer, nn.Linear)]
        if packed:
            raise ValueError(f"{key} must have dense layers alone, {', '.join(packed)} are not")
    fused, bias = _fused(halves, module)
    order = vars(halves[0]).get("parameters_before", [])
    for key in names:
        del module._modules[key]
    module.register_parameter(name, fused)
    if bias is not None:
        module.register_parameter(f"{name}_bias", bias)
    for key in [key for key in order if key in module._parameters]:
        module._parameters[key] = module._parameters.pop(key)
    if not any(isinstance(child, QuantExperts) for child in module.children()):
        module.config = vars(module).pop(_CONFIG)


def _fused(halves: Sequence[Any], module: Any) -> tuple[nn.Parameter, nn.Parameter | None]:
    first = halves[0][0]
    if all(
        isinstance(layer, ExpertLinear)
        and layer.weight is layer.views[0]
        and layer.bias is layer.views[1]
        and layer.fused[0] is first.fused[0]
        for layers in halves
        for layer in layers
    ):
        return first.fused  # type: ignore[no-any-return]
    rows = []
    for each in zip(*halves, strict=True):
        weight = _joined([layer.weight.detach() for layer in each], 0, module)
        rows.append(weight.t() if module.is_transposed else weight)
    learns = first.weight.requires_grad or (
        isinstance(first, ExpertLinear) and first.fused[0].requires_grad
    )
    made = nn.Parameter(torch.stack(rows), learns)
    if first.bias is None:
        return made, None
    biases = [
        _joined([layer.bias.detach() for layer in each], 0, module)
        for each in zip(*halves, strict=True)
    ]
    return made, nn.Parameter(torch.stack(biases), learns)
