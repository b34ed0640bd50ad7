"""Masks that keep pruned weights 0 while a model is trained on (Han et al. 2015, arXiv 1506.02626)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lowbit.methods import prune


class Mask(nn.Module):
    """Takes a weight to the weight with 0 where it is pruned; gradients are 0 there, too.

    Attributes:
        kept: bool, the shape of the weight.
    """

    kept: Tensor

    def __init__(self, kept: Tensor) -> None:
        super().__init__()
        self.register_buffer("kept", kept)

    def forward(self, weight: Tensor) -> Tensor:
        """The masked weight."""
        return torch.where(self.kept, weight, torch.zeros_like(weight))


def mask(
    model: nn.Module,
    density: float | Mapping[str, float] | None = None,
    *,
    quality: float | None = None,
) -> dict[str, Tensor]:
    """Prunes the linears and convolutions of a model by magnitude, in place, until `unmask`.

    Whatever trains the model then, its optimizer's momentum and weight decay included, what is pruned computes as 0.

    Args:
        model: any module.
        density: the share of weights that each layer keeps, or that of layers by name; others stay as they are.
        quality: or the threshold in standard deviations, as `lowbit.methods.prune.mask`.

    Returns:
        The masks, bool, by the name of a layer.

    Raises:
        TypeError, ValueError: as `lowbit.methods.prune.mask`; no such layer, or one is masked already.

    Example:
        >>> qat.mask(model, density=0.08)
        >>> train(model)
        >>> qat.unmask(model)
        >>> lowbit.quantize_model(model, Format.lut(bits=5, group=None, scale=None), method="prune")
    """
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    found = {name: m for name, m in model.named_modules() if isinstance(m, kinds)}
    if isinstance(density, Mapping):
        if unknown := sorted(density.keys() - found.keys()):
            raise ValueError(f"density names {unknown}, the model has {sorted(found)}")
        found = {name: found[name] for name in density}
    if not found:
        raise ValueError("model has no linear or convolution to prune")
    masks = {}
    for name, layer in found.items():
        if parametrize.is_parametrized(layer, "weight"):
            raise ValueError(f"{name} has a parametrized weight already")
        share = density[name] if isinstance(density, Mapping) else density
        masks[name] = prune.mask(layer.weight, density=share, quality=quality)
    for name, kept in masks.items():
        parametrize.register_parametrization(found[name], "weight", Mask(kept))
    return masks


def unmask(model: nn.Module) -> None:
    """Makes masked weights plain Parameters again, with zeros where they were pruned.

    Raises:
        ValueError: there is none.
    """
    masked = [
        module
        for module in model.modules()
        if parametrize.is_parametrized(module, "weight")
        and isinstance(module.parametrizations["weight"][0], Mask)  # type: ignore[index, union-attr]
    ]
    if not masked:
        raise ValueError("model has no masked weight")
    for module in masked:
        parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
