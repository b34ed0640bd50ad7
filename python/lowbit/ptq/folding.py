"""fold_norms: batch norms become part of the convolutions and linears before them, before these are quantized."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights

from lowbit.nn.conv import CONVOLUTIONS
from lowbit.nn.surgery import obstacle, replace

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_STATE = ("running_mean", "running_var", "num_batches_tracked")


@torch.no_grad()
def fold_norms(model: nn.Module) -> list[str]:
    """Puts the factors of batch norms into the weights before them, in place: then `quantize_model` packs them along.

    A norm is folded if its input is the result of one convolution or nn.Linear that nothing else reads, and an
    nn.Identity takes its place. The model computes the same, but for rounding.

    Args:
        model: in evaluation mode; torch.fx must be able to trace it.

    Returns:
        The names of the norms that were folded.

    Raises:
        ValueError: the model is in training mode, or cannot be traced (the cause is that of torch.fx).

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)).eval()
        >>> lowbit.fold_norms(model)
        ['1']
    """
    if model.training:
        raise ValueError(
            "model must be in evaluation mode: a norm in training depends on the batch"
        )
    try:
        graph = fx.Tracer().trace(model)
    except Exception as e:
        raise ValueError(f"model cannot be traced by torch.fx: {e}") from e
    modules = dict(model.named_modules(remove_duplicate=False))
    calls = Counter(id(modules[str(n.target)]) for n in graph.nodes if n.op == "call_module")
    folded = []
    for node in graph.nodes:
        before = node.args[0] if node.op == "call_module" and node.args else None
        if not isinstance(before, fx.Node) or before.op != "call_module" or len(before.users) > 1:
            continue
        norm, layer = modules[str(node.target)], modules[str(before.target)]
        if calls[id(norm)] == calls[id(layer)] == 1 and _folds(layer, norm):
            _fold(layer, norm)
            names = [name for name, module in modules.items() if module is norm]
            replace(model, names, nn.Identity().eval(), own=_STATE)
            folded.append(str(node.target))
    return folded


def _folds(layer: nn.Module, norm: nn.Module) -> bool:
    kinds: tuple[type[nn.Module], ...] = (nn.Linear, *CONVOLUTIONS)
    kind = next((kind for kind in kinds if isinstance(layer, kind)), None)
    if kind is None or type(layer).forward is not kind.forward or obstacle(layer) is not None:  # type: ignore[attr-defined]
        return False
    # The channels of a linear's batch norm are the second dimension, which is not always the last.
    fits = type(norm) in _NORMS and not (kind is nn.Linear and type(norm) is not nn.BatchNorm1d)
    return fits and obstacle(norm) is None and getattr(norm, "running_mean", None) is not None


def _fold(layer: Any, norm: Any) -> None:
    terms = norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
    if isinstance(layer, nn.Linear):
        layer.weight, layer.bias = fuse_linear_bn_weights(layer.weight, layer.bias, *terms)
    elif layer.transposed and layer.groups > 1:
        # torch scales the second dimension by the channel: with groups it has those of one group alone.
        factor = (norm.running_var + norm.eps).rsqrt()
        factor = factor if norm.weight is None else factor * norm.weight
        per_group = factor.view(layer.groups, 1, -1).expand(
            -1, layer.in_channels // layer.groups, -1
        )
        view = (layer.in_channels, -1, *(1 for _ in layer.kernel_size))
        weight = layer.weight * per_group.reshape(view)
        bias = -norm.running_mean if layer.bias is None else layer.bias - norm.running_mean
        bias = bias * factor + (0 if norm.bias is None else norm.bias)
        learns = layer.weight.requires_grad
        layer.weight, layer.bias = nn.Parameter(weight, learns), nn.Parameter(bias, learns)
    else:
        layer.weight, layer.bias = fuse_conv_bn_weights(
            layer.weight, layer.bias, *terms, transpose=layer.transposed
        )
