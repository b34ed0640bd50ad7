"""Tensor parallel plans of transformers ("layers.*.mlp.down_proj": "rowwise") for models of packed weights."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ParallelStyle
from transformers import PreTrainedModel
from transformers.distributed.parallel_utils import replace_layer_number_by_wildcard as generic
from transformers.distributed.tensor_parallel import apply_tensor_parallelism

from lowbit.files import cut
from lowbit.integrations.distributed import (
    ColwiseParallel,
    PackedColwiseParallel,
    RowwiseParallel,
    split_experts,
)
from lowbit.nn import JoinedLinear, PackedModule, QuantExperts

Plan = Mapping[str, "str | ParallelStyle"]

_STYLES: dict[str, Callable[[], ParallelStyle]] = {
    "colwise": ColwiseParallel,
    "colwise_gather_output": lambda: ColwiseParallel(output_layouts=Replicate()),
    "colwise_rep": lambda: ColwiseParallel(output_layouts=Replicate()),
    "rowwise": RowwiseParallel,
    "rowwise_split_input": lambda: RowwiseParallel(input_layouts=Replicate()),
    "rowwise_rep": lambda: RowwiseParallel(input_layouts=Replicate()),
    "embedding_rowwise": lambda: RowwiseParallel(input_layouts=Replicate()),
    "embedding_colwise": lambda: ColwiseParallel(output_layouts=Replicate()),
    "packed_colwise": PackedColwiseParallel,
}
# What an expert's weights are cut along, and of how many matrices they are; the module around them adds results up.
_OF_EXPERTS = {"packed_colwise": (0, 2), "colwise": (0, 1), "rowwise": (1, 1)}
# Styles that cut no weight: transformers' own do for packed modules.
UNCUT = ("replicate", "replicated_with_grad_allreduce", "mla_kv_a_proj", "all_reduce")
_KINDS = (PackedModule, QuantExperts, JoinedLinear)
_ATTENTION = ("q_proj", "k_proj", "v_proj", "qkv_proj", "query_key_value")


def parallelize(model: nn.Module, mesh: DeviceMesh, plan: Plan | None = None) -> nn.Module:
    """Spreads a model that every rank holds whole over the ranks of a mesh, in place, and frees what others hold.

    Packed layers and fused experts become parts (`lowbit.integrations.distributed`), dense ones what transformers
    makes of them. Modules that share a weight still do if they are cut alike, as an embedding by the vocabulary and a
    head by its outputs are; if not, each has its own part.

    Args:
        model: of transformers; or any, with a plan of styles of torch.
        mesh: of one dimension.
        plan: {name of modules or parameters, "*" for the number of a layer: name of a style of transformers, or a
            `ParallelStyle`}. None: the model's own (`tp_plan`).

    Returns:
        The model.

    Raises:
        TypeError: a style is neither.
        ValueError: there is no plan, a name matches nothing, attention heads do not divide, or as
            `lowbit.integrations.distributed.split`, naming the layer; the model is not to be used then.
        NotImplementedError: a packed layer cannot have such a style.

    Example:
        >>> model = lowbit.load_model("SmolLM2-135M-Instruct.Q4_1.gguf")  # doctest: +SKIP
        >>> parallelize(model, init_device_mesh("cpu", (2,)))  # doctest: +SKIP
    """
    own = getattr(model, "tp_plan", None)
    rules = dict(own or {}) if plan is None else dict(plan)
    if not rules:
        raise ValueError(
            f"plan must name layers: {type(model).__name__} has none of its own (tp_plan)"
        )
    for rule, style in rules.items():
        if not isinstance(style, str | ParallelStyle):
            raise TypeError(
                f"plan[{rule!r}] must be the name of a style or a ParallelStyle, got {style!r:.100}"
            )
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    names = {generic(name) for name in (*modules, *parameters)} | modules.keys() | parameters.keys()
    if plan is not None and (unknown := sorted(rules.keys() - names)):
        raise ValueError(f"plan names nothing in the model by {', '.join(map(cut, unknown))}")
    check_heads(model, rules, mesh.size())
    split_packed(model, mesh, rules)
    _split_dense(model, mesh, rules)
    if isinstance(model, PreTrainedModel):
        spread: Any = model
        spread._tp_size = mesh.size()  # what the cache of `generate` is sized by
    return model


def _split_dense(model: nn.Module, mesh: DeviceMesh, rules: Plan) -> None:
    named: dict[str, str] = {}
    for name, module in list(model.named_modules()):
        if isinstance(module, _KINDS):
            continue
        style = _style(name, rules)
        for key in [*module._parameters]:
            own = f"{name}.{key}".lstrip(".")
            of_parameter = _style(own, rules) or style
            if isinstance(of_parameter, str):
                named[own] = of_parameter
        if isinstance(style, ParallelStyle):
            style._apply(module, mesh)
        elif style is not None:
            named[name] = style
    if named:
        apply_tensor_parallelism(model, mesh, named)


def split_packed(model: nn.Module, mesh: DeviceMesh, rules: Plan) -> None:
    """Splits the packed layers and experts that rules name, and leaves all else.

    Raises:
        ValueError, NotImplementedError: as `parallelize`.
    """
    for name, module in list(model.named_modules()):
        style = _style(name, rules)
        if style is None or not isinstance(module, _KINDS):
            continue
        try:
            _split(model, name, module, style, mesh)
        except (NotImplementedError, ValueError) as error:
            raise type(error)(f"{cut(name)} on {mesh.size()} ranks: {error}") from error


def _split(
    model: nn.Module, name: str, module: nn.Module, style: str | ParallelStyle, mesh: DeviceMesh
) -> None:
    if isinstance(style, ParallelStyle):
        style._apply(module, mesh)
    elif style in UNCUT:
        apply_tensor_parallelism(model, mesh, {name: style})
    elif isinstance(module, QuantExperts) and style in _OF_EXPERTS:
        dim, packed = _OF_EXPERTS[style]
        split_experts(module, mesh, dim, packed=packed)
    elif isinstance(module, PackedModule) and style in _STYLES:
        _STYLES[style]()._apply(module, mesh)
    else:
        raise NotImplementedError(
            f"a {type(module).__name__} cannot be split by the style {style!r}: expected one of "
            f"{sorted(_OF_EXPERTS if isinstance(module, QuantExperts) else _STYLES)} or {', '.join(UNCUT)}"
        )


def check_heads(model: nn.Module, rules: Plan, world: int) -> None:
    """Raises ValueError if queries, keys or values shall be cut through an attention head."""
    if not isinstance(model, PreTrainedModel):
        return
    rule = next((r for r, s in rules.items() if s == "colwise" and r.endswith(_ATTENTION)), None)
    config: Any = model.config.get_text_config()
    for key in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(config, key, None)
        if rule is not None and isinstance(heads, int) and heads % world:
            raise ValueError(
                f"{rule}: 'colwise' cuts {key}={heads} into {world} parts, which does not divide: use "
                "'colwise_gather_output', and 'rowwise_split_input' for the projection of the output, or other ranks"
            )


def _style(name: str, rules: Plan) -> str | ParallelStyle | None:
    return rules.get(name, rules.get(generic(name)))


class Held:
    """Rules that transformers shall not apply while `from_pretrained` loads a model, as layers are not packed yet.

    Args:
        model: before it is distributed.
        layers: names of those that will be packed, and of the parameters that they are made of.
        quantizes: whether they are dense in the checkpoint.
    """

    def __init__(self, model: PreTrainedModel, layers: Collection[str], quantizes: bool) -> None:
        self._quantizes = quantizes
        plan: dict[str, str] = model.tp_plan
        named = {*layers, *map(generic, layers)}
        self.rules = {rule: style for rule, style in plan.items() if rule in named}
        # What is tied is no parameter of its own, and transformers would look for it.
        tied = {name.rpartition(".")[0] for name in model.all_tied_weights_keys}
        for rule in self.rules:
            if rule in tied:
                del plan[rule]
            else:
                plan[rule] = "replicate"

    def apply(self, model: PreTrainedModel) -> None:
        """Applies them to the loaded model, if it is spread over ranks.

        Raises:
            ValueError: as `parallelize`.
            NotImplementedError: as `parallelize`, or it is spread otherwise than by tensor parallelism.
        """
        model.tp_plan.update(self.rules)
        config: Any = getattr(model.config, "distributed_config", None)
        meshes: Any = getattr(model, "_mesh_manager", None)
        if config is None or meshes is None or config.tp_plan == {}:
            return
        for key in ("pp_size", "ep_size", "dp_size"):
            if (size := getattr(config, key, 1)) > 1:
                raise NotImplementedError(
                    f"{key} must be 1 in the distributed_config of a quantized model, got {size}"
                )
        given = config.tp_plan if isinstance(config.tp_plan, dict) else {}
        rules = {rule: style for rule, style in self.rules.items() if rule not in given}
        again = {rule: style for rule, style in given.items() if rule in self.rules}
        if again and self._quantizes:
            raise NotImplementedError(
                f"tp_plan must not have rules for layers that are quantized on load, got {sorted(again)}: save the "
                "quantized model and load that"
            )
        mesh = meshes.get_mesh("tp")
        check_heads(model, {**self.rules, **again}, mesh.size())
        split_packed(model, mesh, {**rules, **again})
        _split_dense(model, mesh, rules)
        model.tp_plan.update(again)
