"""Layers in graphs of torch.fx: each is one node, as those of torch.nn are."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.fx import Proxy

__all__ = ["Proxy", "node_of"]


def node_of(layer: nn.Module, x: Any, *args: Any) -> Any:
    """The call of a layer in the graph that x, a Proxy, belongs to: its forward looks at values, which x has not."""
    tracer = x.tracer
    return tracer.create_proxy("call_module", tracer.path_of_module(layer), (x, *args), {})
