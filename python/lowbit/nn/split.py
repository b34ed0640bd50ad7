"""Split: what a module of packed weights asks of whatever has spread it over processes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor


class Split(Protocol):
    """How a weight lies in parts on several processes, of which a module holds one and gives the whole result."""

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

    def load(self, layer: Any, state_dict: Mapping[str, Any], prefix: str) -> Mapping[str, Any]:
        """A state dict with the module's own part in the place of a whole weight."""
