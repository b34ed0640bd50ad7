"""A network as nodes of real numbers, as a tracer found it: what the schemes turn into integers."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Node:
    """One operation on activations.

    Attributes:
        name: of the node and of its result, unique in the graph and an identifier of C.
        path: of the module that it came from, for messages.
        inputs: names of the results it takes.
        shape: of its result, without the batch.
        low, high: its result is clamped to these, as a ReLU is to 0 and infinity.
    """

    name: str
    path: str
    inputs: tuple[str, ...]
    shape: tuple[int, ...]
    low: float = -math.inf
    high: float = math.inf

    @property
    def where(self) -> str:
        """The node for an error message: its module's path and its own name."""
        return f"{self.path or 'the model'} ({self.name})"

    def compute(self, *inputs: Tensor) -> Tensor:
        """The result in real numbers, without the clamp: (batch, *shape)."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Weighted(Node):
    """A node with a weight (O, ...) and a bias (O,), both float64; O are its channels."""

    weight: Tensor
    bias: Tensor

    @property
    def channel_dim(self) -> int:
        """Where the channels are in a result with its batch."""
        return 1

    @property
    def macs(self) -> int:
        """Multiply-adds for one sample."""
        return math.prod(self.shape) * math.prod(self.weight.shape[1:])

    def sums(self, x: Tensor, weight: Tensor, bias: Tensor, fill: float) -> Tensor:
        """The products with another weight and bias of the same shapes, in the dtype of all; padding is `fill`."""
        raise NotImplementedError

    def compute(self, *inputs: Tensor) -> Tensor:
        """As torch's own function."""
        (x,) = inputs
        return self.sums(x, self.weight.to(x.dtype), self.bias.to(x.dtype), 0)


@dataclass(frozen=True, kw_only=True)
class Linear(Weighted):
    """y = x W^T + bias over the last dimension; weight (N, K)."""

    @property
    def channel_dim(self) -> int:
        """The last one."""
        return len(self.shape)

    def sums(self, x: Tensor, weight: Tensor, bias: Tensor, fill: float) -> Tensor:
        """As torch.nn.functional.linear, in integers too."""
        return x @ weight.T + bias


@dataclass(frozen=True, kw_only=True)
class Window:
    """A window that moves over (height, width); a signal of one dimension has height 1.

    Attributes:
        size, stride, dilation: of both dimensions.
        padding: before the first row and the first column; what is read behind the last ones is padding, too.
    """

    size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int] = (1, 1)

    def positions(self, x: Tensor, out: tuple[int, int], fill: float) -> list[Tensor]:
        """For each element of the window, row by row, what it reads: x is (..., H, W), results (..., *out)."""
        rows, columns = (
            (o - 1) * s + d * (k - 1) + 1
            for o, s, d, k in zip(out, self.stride, self.dilation, self.size, strict=True)
        )
        top, left = self.padding
        # A negative amount cuts off what no window reads.
        below, right = rows - top - x.shape[-2], columns - left - x.shape[-1]
        x = F.pad(x, (left, right, top, below), value=fill)
        (sy, sx), (dy, dx) = self.stride, self.dilation
        return [
            x[..., i * dy : i * dy + (out[0] - 1) * sy + 1 : sy, j * dx : j * dx + (out[1] - 1) * sx + 1 : sx]
            for i in range(self.size[0])
            for j in range(self.size[1])
        ]  # fmt: skip


def planes(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """A shape (C, W) or (C, H, W) as (C, H, W)."""
    channels, *space = shape
    height, width = ([1] * (2 - len(space)) + space)[-2:]
    return channels, height, width


@dataclass(frozen=True, kw_only=True)
class Conv(Weighted):
    """A convolution over (C, W) or (C, H, W): weight (O, C / groups, kernel height, kernel width)."""

    window: Window
    groups: int
    in_shape: tuple[int, ...]

    def sums(self, x: Tensor, weight: Tensor, bias: Tensor, fill: float) -> Tensor:
        """As torch.nn.functional.conv1d and conv2d, in integers too."""
        _, height, width = planes(self.shape)
        x = x.reshape(x.shape[0], *planes(self.in_shape))
        y = bias.reshape(1, self.groups, -1, 1, 1)
        weight = weight.reshape(self.groups, -1, *weight.shape[1:])
        for part, tap in zip(
            self.window.positions(x, (height, width), fill),
            weight.flatten(3).unbind(3),
            strict=True,
        ):
            grouped = part.reshape(x.shape[0], self.groups, -1, height, width)
            y = y + torch.einsum("bgchw,goc->bgohw", grouped, tap)
        return y.reshape(x.shape[0], *self.shape)


@dataclass(frozen=True, kw_only=True)
class Pool(Node):
    """The maximum or the mean of each window over (C, W) or (C, H, W).

    Attributes:
        mean: whether it is the mean.
        count_padding: whether the mean counts padding as zeros.
    """

    window: Window
    mean: bool
    in_shape: tuple[int, ...]
    count_padding: bool = True

    def counts(self) -> Tensor:
        """By how much the sum of each window is divided: (height, width) int64."""
        _, height, width = planes(self.shape)
        if self.count_padding:
            return torch.full(
                (height, width), math.prod(self.window.size), dtype=torch.int64, device="cpu"
            )
        ones = torch.ones(planes(self.in_shape)[1:], dtype=torch.int64, device="cpu")
        return torch.stack(self.window.positions(ones, (height, width), 0)).sum(0)

    def parts(self, x: Tensor, fill: float) -> Tensor:
        """What the windows read of (batch, C, ...): (positions, batch, C, height, width)."""
        x = x.reshape(x.shape[0], *planes(self.in_shape))
        _, height, width = planes(self.shape)
        return torch.stack(self.window.positions(x, (height, width), fill))

    def compute(self, *inputs: Tensor) -> Tensor:
        """As the pooling functions of torch."""
        (x,) = inputs
        parts = self.parts(x, 0 if self.mean else -math.inf)
        y = parts.sum(0) / self.counts().to(x.dtype) if self.mean else parts.amax(0)
        return y.reshape(x.shape[0], *self.shape)


@dataclass(frozen=True, kw_only=True)
class Add(Node):
    """The sum of two results of one shape."""

    def compute(self, *inputs: Tensor) -> Tensor:
        """a + b."""
        a, b = inputs
        return a + b


@dataclass(frozen=True, kw_only=True)
class Concat(Node):
    """Results one behind the other along `axis` of their shapes."""

    axis: int

    def compute(self, *inputs: Tensor) -> Tensor:
        """As torch.cat."""
        return torch.cat(inputs, self.axis + 1)


@dataclass(frozen=True, kw_only=True)
class Clamp(Node):
    """Its clamp and nothing else: a ReLU that no node before it could take."""

    def compute(self, *inputs: Tensor) -> Tensor:
        """x."""
        return inputs[0]


@dataclass(frozen=True, kw_only=True)
class Reshape(Node):
    """The same numbers in another shape."""

    def compute(self, *inputs: Tensor) -> Tensor:
        """As torch.reshape."""
        return inputs[0].reshape(-1, *self.shape)


@dataclass(frozen=True, kw_only=True)
class Permute(Node):
    """The same numbers with dimensions in another order; `order` counts them without the batch."""

    order: tuple[int, ...]

    def compute(self, *inputs: Tensor) -> Tensor:
        """As torch.permute."""
        return inputs[0].permute(0, *(d + 1 for d in self.order))


@dataclass(frozen=True, kw_only=True)
class Take(Node):
    """Some of the numbers: `length` from `start` along `axis` of the shape of what it takes."""

    axis: int
    start: int
    length: int

    def compute(self, *inputs: Tensor) -> Tensor:
        """As torch.narrow; one that is taken alone may have no dimension of its own in the node's shape."""
        return inputs[0].narrow(self.axis + 1, self.start, self.length).reshape(-1, *self.shape)


# Their results have the scale of what they take.
SAME_SCALE = (Pool, Clamp, Reshape, Permute, Take)


@dataclass(frozen=True)
class Graph:
    """A network of one input and one output.

    Attributes:
        input: the name of what it takes.
        shape: of one sample of it.
        nodes: in an order in which they can run.
        output: the name of the node whose result is the network's.
    """

    input: str
    shape: tuple[int, ...]
    nodes: tuple[Node, ...]
    output: str

    def run(self, x: Tensor) -> dict[str, Tensor]:
        """All results in float64, by name: x is (batch, *shape) in any dtype."""
        results = {self.input: x.to(torch.float64)}
        for node in self.nodes:
            y = node.compute(*(results[name] for name in node.inputs))
            results[node.name] = y.clamp(node.low, node.high)
        return results

    def __call__(self, x: Tensor) -> Tensor:
        """The result of the network in float64: (batch, *shape of the output)."""
        return self.run(x)[self.output]
