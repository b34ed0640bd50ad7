"""What a walk over a `torch.export` program keeps: shapes, constants, and the nodes that ops become."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind

from lowbit.integer.graph import Graph, Node
from lowbit.integer.transformer import Constant


def module_of(node: fx.Node) -> str:
    """The path of the module that an op came from."""
    stack = node.meta.get("nn_module_stack") or {}
    return str(list(stack.values())[-1][0]) if stack else ""


# Makes a node of an op; None if the result is that of the op's first argument.
Op = Callable[["Tracer", fx.Node], Node | None]


class Tracer:
    """What a program holds, by the names of its nodes."""

    def __init__(self, program: ExportedProgram, ops: Mapping[str, Op]) -> None:
        self.ops = ops
        signature = program.graph_signature
        inputs = [spec for spec in signature.input_specs if spec.kind == InputKind.USER_INPUT]
        outputs = [spec for spec in signature.output_specs if spec.kind == OutputKind.USER_OUTPUT]
        if len(inputs) != 1 or len(outputs) != 1 or len(signature.output_specs) != 1:
            raise ValueError(
                "the program must take one tensor and return one, and change no buffer (eval mode), got "
                f"{len(inputs)} inputs, {len(outputs)} results and {len(signature.output_specs) - len(outputs)} "
                "changed tensors"
            )
        self.input, self.output = str(inputs[0].arg.name), str(outputs[0].arg.name)
        self.constants: dict[str, Tensor] = {}
        held = {**program.state_dict, **program.constants}
        for spec in signature.input_specs:
            if spec.target is not None and isinstance(held.get(spec.target), Tensor):
                t = held[spec.target].detach().to("cpu")
                self.constants[spec.arg.name] = t.to(torch.float64) if t.is_floating_point() else t
        self.fx_nodes = list(program.graph.nodes)
        self.batch: Any = None
        self.shapes: dict[str, tuple[int, ...]] = {}
        # Where the batch of a result is that does not have it first: views of attention heads.
        self.batch_at: dict[str, int] = {}
        self.aliases: dict[str, str] = {}
        self.nodes: list[Node] = []

    def graph(self) -> Graph:
        """Walks the program."""
        for node in self.fx_nodes:
            if node.op == "placeholder" and node.name == self.input:
                self._enter(node)
            elif node.op == "call_function":
                self._add(node)
        output = self.aliases.get(self.output, self.output)
        if output == self.input or output not in self.shapes:
            raise ValueError(f"the program must compute its result from its input, got {output}")
        needed, nodes = {output}, []
        for made in reversed(self.nodes):
            if made.name in needed:
                needed.update(made.inputs)
                nodes.append(made)
        return Graph(self.input, self.shapes[self.input], tuple(reversed(nodes)), output)

    def _enter(self, node: fx.Node) -> None:
        value = node.meta.get("val")
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.dim() < 2:
            raise ValueError(
                f"the input must be a tensor (batch, ...) of floating point, got {value}"
            )
        self.batch = value.shape[0]
        self.shapes[node.name] = self.sample(node)

    def sample(self, node: fx.Node) -> tuple[int, ...]:
        """The shape of a result without its batch."""
        value = node.meta["val"]
        if not isinstance(value, Tensor) or value.dim() < 2 or value.shape[0] != self.batch:
            shape = tuple(value.shape) if isinstance(value, Tensor) else type(value)
            raise ValueError(
                f"{where(node)}: results must keep the batch of {self.batch} as their first dimension, "
                f"got {shape}"
            )
        sizes = tuple(value.shape[1:])
        if not all(isinstance(size, int) and size > 0 for size in sizes):
            raise ValueError(
                f"{where(node)}: all sizes but the batch must be fixed and positive, got {sizes}"
            )
        return sizes

    def _add(self, node: fx.Node) -> None:
        if isinstance(node.meta.get("val"), (int, torch.SymInt)):
            # The batch, as a reshape takes it.
            return
        name = str(node.target).removeprefix("aten.")
        if self._is_constant(node):
            self.constants[node.name] = self._evaluate(node)
            return
        if name not in self.ops:
            raise NotImplementedError(f"{where(node)}: {node.target} has no integer form")
        try:
            made = self.ops[name](self, node)
            if made is None:
                if node.name not in self.aliases:
                    self.aliases[node.name] = self.source(node.args[0], moved=True)
                return
        except NoForm as why:
            raise NotImplementedError(f"{where(node)}: {node.target} {why}") from None
        self.emit(made)

    def _is_constant(self, node: fx.Node) -> bool:
        """Whether an op takes parameters alone, and nothing of the batch."""
        names = [n.name for n in node.all_input_nodes]
        if str(node.target) == "aten.expand.default" and node.meta["val"].shape[0] == self.batch:
            return False
        return bool(names) and all(name in self.constants for name in names)

    def _evaluate(self, node: fx.Node) -> Any:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: self.constants[n.name])
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def emit(self, made: Node) -> str:
        """Adds a node; its name."""
        self.nodes.append(made)
        self.shapes[made.name] = made.shape
        return made.name

    def source(self, argument: Any, moved: bool = False) -> str:
        """The name of an activation; `moved` if its batch may be at another place than the first."""
        name = argument.name if isinstance(argument, fx.Node) else str(argument)
        name = self.aliases.get(name, name)
        if name not in self.shapes:
            raise NoForm(f"takes {name:.80} where a result of the network is expected")
        if name in self.batch_at and not moved:
            raise NoForm(f"takes {name:.80}, whose batch is not its first dimension")
        return name

    def constant(self, argument: Any) -> Tensor | None:
        """A parameter, or what was computed from parameters alone."""
        if argument is None:
            return None
        name = argument.name if isinstance(argument, fx.Node) else repr(argument)
        if name not in self.constants:
            raise NoForm(f"takes {name:.80} where a parameter is expected")
        return self.constants[name]

    def common(self, node: fx.Node, *inputs: Any) -> dict[str, Any]:
        """The fields that every node has."""
        names = tuple(self.source(i) for i in inputs)
        return {
            "name": node.name,
            "path": module_of(node),
            "inputs": names,
            "shape": self.sample(node),
        }

    def before(self, node: fx.Node, source: str, shape: tuple[int, ...]) -> dict[str, Any]:
        """The fields of a node that an op needs before its own."""
        count = sum(made.name.startswith(f"{node.name}_before") for made in self.nodes)
        name = f"{node.name}_before{count}"
        return {"name": name, "path": module_of(node), "inputs": (source,), "shape": shape}

    def spread(self, node: fx.Node, place: int) -> str:
        """An argument of an op between results of one shape: an activation, or a parameter that is spread to it."""
        argument, shape = node.args[place], self.sample(node)
        if not isinstance(argument, fx.Node) or argument.name not in self.constants:
            return self.source(argument)
        value = self.constants[argument.name]
        if value.dim() > len(shape) and value.shape[0] == 1:
            value = value[0]
        if value.dim() > len(shape) or not value.is_floating_point():
            raise NoForm(
                f"takes a parameter of shape {tuple(value.shape)} for each sample's {shape}"
            )
        return self.fixed(node, value.expand(shape))

    def fixed(self, node: fx.Node, value: Tensor) -> str:
        """A parameter as an activation: value is that of every sample."""
        if not bool(value.isfinite().all()):
            raise ValueError(f"{where(node)}: a parameter is NaN or infinite")
        fields = self.before(node, self.input, tuple(value.shape))
        return self.emit(Constant(**fields, value=value.to(torch.float64)))

    def weighted(self, node: fx.Node, arguments: list[Any]) -> dict[str, Any]:
        """Those of a node with a weight and a bias, the second and third arguments."""
        weight, bias = self.constant(arguments[1]), self.constant(arguments[2])
        assert weight is not None
        if bias is None:
            bias = torch.zeros(weight.shape[0], dtype=torch.float64, device="cpu")
        if not bool(weight.isfinite().all() and bias.isfinite().all()):
            raise ValueError(f"{where(node)}: a weight or bias is NaN or infinite")
        return {**self.common(node, arguments[0]), "weight": weight, "bias": bias}

    def in_shape(self, argument: Any, dims: int) -> tuple[int, ...]:
        """The shape (C, W) or (C, H, W) of an activation."""
        shape = self.shapes[self.source(argument)]
        if len(shape) != dims + 1:
            raise NoForm(f"needs an input of {dims + 2} dimensions, got {len(shape) + 1}")
        return shape


class NoForm(Exception):
    """Why these arguments of an op have no integer form."""


def where(node: fx.Node) -> str:
    """An op for a message: its module's path and its own name."""
    return f"{module_of(node) or 'the model'} ({node.name})"


def given(node: fx.Node, *defaults: tuple[str, Any]) -> list[Any]:
    """The arguments of an op, in order, with what is not given as its schema has it."""
    found = []
    for place, (name, default) in enumerate(defaults):
        value = node.args[place] if place < len(node.args) else node.kwargs.get(name, default)
        found.append(value)
    return found
