"""Split: what a module of packed weights asks of whatever has spread it over processes."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Protocol

from torch import Tensor

# A Parameter (B,) uint8: the tensors of a weight one after the other, where they are no buffers of their own.
BYTES = "packed"


class Split(Protocol):
    """How a weight lies in parts on several processes, of which a module holds one and gives the whole result."""

    def is_plain(self, layer: Any) -> bool:
        """Whether a call of a linear is the product of its buffers and its bias, and nothing else."""

    def linear(self, layer: Any, x: Tensor) -> Tensor:
        """What a linear gives with the whole weight."""

    def embedding(self, layer: Any, indices: Tensor) -> Tensor:
        """Rows of the whole weight."""

    def take(self, x: Tensor) -> Tensor:
        """What a part multiplies of the input of the whole."""

    def give(self, y: Tensor) -> Tensor:
        """The output of the whole, of what the parts give."""

    def save(self, layer: Any, state_dict: dict[str, Any], prefix: str) -> None:
        """Makes what a module has put into a state dict parts of what a whole one would."""

    def load(
        self, layer: Any, state_dict: Mapping[str, Any], prefix: str
    ) -> tuple[Mapping[str, Any], Collection[str]]:
        """A state dict with the module's own part in the place of a whole weight, and what of it is loaded already."""


class ConvolutionSplit(Split, Protocol):
    """Of weights of convolutions too."""

    def convolution(self, layer: Any, x: Tensor) -> Tensor:
        """What a convolution gives with the whole weight."""
