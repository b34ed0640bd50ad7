"""Packed weights on 2 and 4 processes (gloo): tensor parallelism, FSDP2, checkpoints, pipelines.

Four processes start once and run every `check_*`; each is a test here. They fork from a server that has imported all.
What is exact is compared bit for bit: with x = identity a product has one summand other than 0. Other bounds are
1e-5 of the largest: sums of at most 192 products in fp32, in another order, through two layers.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import parallelize_module

from weights import random_weight

transformers = pytest.importorskip("transformers")
pytest.importorskip("transformers.distributed.tensor_parallel")

from ranks import (  # noqa: E402
    FORMATS,
    MIXED,
    RULES,
    WORLD,
    Context,
    K,
    N,
    failures_of,
    greedy,
    linear,
    logits,
    model,
    nbytes,
    near,
    packed_bytes,
    raises,
)

import lowbit  # noqa: E402
from lowbit.decoder.description import _packed_obstacle  # noqa: E402
from lowbit.formats import parse  # noqa: E402
from lowbit.integrations.distributed import (  # noqa: E402
    ColwiseParallel,
    PackedColwiseParallel,
    RowwiseParallel,
    part_of,
)
from lowbit.integrations.fsdp import shardable  # noqa: E402
from lowbit.integrations.plans import parallelize  # noqa: E402
from lowbit.nn import QuantEmbedding, QuantExperts, QuantLinear, ReorderedLinear  # noqa: E402
from lowbit.nn.states import same_bits  # noqa: E402


def check_products_of_the_identity(c: Context) -> None:
    """Every format, whose parts also are those of the dequantized weight."""
    eye = torch.eye(K)
    for mesh in c.meshes:
        world, rank = mesh.size(), mesh.get_local_rank()
        for name in FORMATS:
            whole = linear(name)
            want = whole.quant_tensor().dequantize()
            # A low-rank term is a sum of products itself.
            equal = near if whole.format.rank else torch.equal
            assert equal(whole(eye).t(), want), name
            for dim, style in enumerate(
                (
                    ColwiseParallel(output_layouts=Replicate()),
                    RowwiseParallel(input_layouts=Replicate()),
                )
            ):
                layer = copy.deepcopy(whole)
                assert parallelize_module(layer, mesh, style) is layer
                assert equal(layer(eye).t(), want), (name, dim)
                assert same_bits(
                    layer.own_part().dequantize(), want.chunk(world, dim)[rank].contiguous()
                )
                assert layer.weight.shape == layer.own_part().shape
                assert (layer.out_features, layer.in_features) == layer.own_part().shape


def check_columns_then_rows(c: Context) -> None:
    """With biases, gradients for x, and layers of torch in the same plan, against the whole layers."""
    for mesh in c.meshes:
        torch.manual_seed(1)
        whole = nn.Sequential(
            linear("nf4_g32", 128, 64, True), nn.ReLU(), linear("int4_g32", 40, 128, True)
        )
        whole.append(nn.Linear(40, 12))
        x = torch.randn(3, 64, requires_grad=True)
        want = whole(x)
        (grad,) = torch.autograd.grad(want.square().sum(), x)
        parts = copy.deepcopy(whole)
        plan = {
            "0": ColwiseParallel(),
            "2": RowwiseParallel(),
            "3": ColwiseParallel(output_layouts=Replicate()),
        }
        parallelize_module(parts, mesh, plan)
        found = parts(x)
        assert near(found, want)
        (own,) = torch.autograd.grad(found.square().sum(), x)
        assert near(own, grad)
        with torch.no_grad():
            assert near(parts(x), want)
        assert copy.deepcopy(parts)(x).equal(found)


def check_layouts(c: Context) -> None:
    """DTensors in and out, and rows of unequal number put together."""
    whole = linear("nf4_g32", bias=True)
    x = torch.randn(4, K, generator=torch.Generator().manual_seed(3))
    for grad in (False, True):
        given = x.clone().requires_grad_(grad)
        layer = copy.deepcopy(whole)
        parallelize_module(layer, c.mesh, ColwiseParallel(use_local_output=False))
        y = layer(DTensor.from_local(given, c.mesh, [Replicate()]))
        assert y.placements == (Shard(1),)
        assert torch.equal(y.full_tensor(), whole(x))
        layer = copy.deepcopy(whole)
        parallelize_module(
            layer, c.mesh, ColwiseParallel(input_layouts=Shard(0), output_layouts=Shard(0))
        )
        rank = c.mesh.get_local_rank()
        assert torch.equal(layer(given[rank : rank + 1]), whole(x)[rank : rank + 1])


def check_embeddings(c: Context) -> None:
    indices = torch.tensor([[0, 41, 10, 11], [33, 32, 1, 22]])
    for mesh in c.meshes:
        for name in ("int8_g32", "int4_g32_o3"):
            weight = random_weight(parse(name), N, K)
            for style in (
                RowwiseParallel(input_layouts=Replicate()),
                ColwiseParallel(output_layouts=Replicate()),
            ):
                layer = QuantEmbedding.from_quant_tensor(weight)
                want = layer(indices)
                parallelize_module(layer, mesh, style)
                assert torch.equal(layer(indices), want)
                raises(IndexError, "42", lambda layer=layer: layer(torch.tensor([3, N])))
                raises(IndexError, "42", lambda layer=layer: layer(torch.tensor([-1])))


def check_experts(c: Context) -> None:
    """Of their own, their results put together; and two projections in one, of which each rank has rows of both."""
    torch.manual_seed(2)
    whole = QuantExperts.from_weights(torch.randn(3, 16, 64), "nf4_g32", bias=torch.randn(3, 16))
    x, ids = torch.randn(5, 64), torch.tensor([2, 0, 0, 2, 1])
    want = whole(x, ids)
    for mesh in c.meshes:
        parts = copy.deepcopy(whole)
        parallelize_module(parts, mesh, ColwiseParallel(output_layouts=Replicate()))
        assert torch.equal(parts(x, ids), want)
        parts = copy.deepcopy(whole)
        parallelize_module(parts, mesh, RowwiseParallel(input_layouts=Replicate()))
        assert near(parts(x, ids), want)
        parts = copy.deepcopy(whole)
        parallelize_module(parts, mesh, PackedColwiseParallel())
        rank, world = mesh.get_local_rank(), mesh.size()
        halves = [half.chunk(world, 1)[rank] for half in want.chunk(2, 1)]
        assert torch.equal(parts(x, ids), torch.cat(halves, 1))


def check_tied_weights(c: Context) -> None:
    """Cut alike they stay one; cut otherwise, or one of them alone, each is right."""
    plans = {
        "both": ("embedding_rowwise", "colwise_gather_output"),
        "unlike": ("embedding_colwise", "colwise_gather_output"),
        "one": ("embedding_rowwise", None),
    }
    whole = model(tie_word_embeddings=True)
    want = logits(whole)
    for what, (embedding, head) in plans.items():
        parts = model(tie_word_embeddings=True)
        assert parts.lm_head.shares_weight(parts.model.embed_tokens)
        plan = {"model.embed_tokens": embedding} | ({"lm_head": head} if head else {})
        parallelize(parts, c.mesh, plan)
        assert parts.lm_head.shares_weight(parts.model.embed_tokens) == (what == "both")
        assert near(logits(parts), want)


def check_models(c: Context) -> None:
    """Logits, tokens and bytes of a llama and a mixture of experts, by their own plans."""
    for kind, more in (("Llama", {}), ("Mixtral", {"num_local_experts": 4})):
        whole = model(kind, **more)
        want, tokens = logits(whole), greedy(whole)
        for mesh in c.meshes:
            parts = parallelize(model(kind, **more), mesh)
            assert near(logits(parts), want)
            assert greedy(parts) == tokens
            # The largest part of 50 rows of a vocabulary is 26 % and not 25 %.
            assert packed_bytes(parts) <= 1.04 * packed_bytes(whole) / mesh.size()
            raises(
                NotImplementedError,
                "the whole weight is not in this process: part",
                lambda p=parts: p.save_pretrained(c.folder),
            )


def check_from_pretrained(c: Context) -> None:
    """A quantized folder and a dense one that is quantized on load, spread by `distributed_config`."""
    config = transformers.distributed.DistributedConfig(tp_size=WORLD)
    load = transformers.AutoModelForCausalLM.from_pretrained
    qwen, mixtral = ("Qwen2", {"tie_word_embeddings": True}), ("Mixtral", {"num_local_experts": 4})
    cases = ((*qwen, True), (*mixtral, False))
    for i, (kind, more, stored) in enumerate(cases):
        whole, folder = model(kind, **more), f"{c.folder}/{i}"
        if dist.get_rank() == 0:
            (whole if stored else model(kind, None, **more)).save_pretrained(folder)
        dist.barrier()
        how = {} if stored else {"quantization_config": lowbit.LowbitConfig(RULES, skip=())}
        parts = load(folder, dtype=torch.float32, distributed_config=config, **how)
        assert near(logits(parts), logits(whole))
        assert greedy(parts) == greedy(whole)
        assert parts.tp_plan["model.layers.*.self_attn.o_proj"] == "rowwise"
        assert packed_bytes(parts) <= 1.04 * packed_bytes(whole) / WORLD
    given = transformers.distributed.DistributedConfig(
        tp_size=WORLD, tp_plan={"model.layers.*.self_attn.o_proj": "rowwise"}
    )
    parts = load(f"{c.folder}/0", dtype=torch.float32, distributed_config=given)
    assert near(logits(parts), logits(model(qwen[0], **qwen[1])))
    raises(
        NotImplementedError, "tp_plan must not have rules for layers that are quantized on load",
        lambda: load(folder, distributed_config=given, quantization_config=lowbit.LowbitConfig("int4_g32")),
    )  # fmt: skip


def check_checkpoints(c: Context) -> None:
    """torch.distributed.checkpoint: whole, in 4 parts and in 2, written by any and read by any."""

    def other(mesh: Any = None) -> Any:
        made = model()
        for layer in made.modules():
            if isinstance(layer, QuantLinear):
                layer.scale_weight(2.0)
        return made if mesh is None else parallelize(made, mesh)

    want = logits(model())
    readers = {0: (c.mesh,), 1: (c.mesh,), 2: (None,)}
    for i, mesh in enumerate((None, *c.meshes)):
        source = model() if mesh is None else parallelize(model(), mesh)
        path = f"{c.folder}/dcp{i}"
        # Pairs hold the same twice; a checkpoint has one of each.
        dcp.save(source.state_dict(), checkpoint_id=path)
        for target in map(other, readers[i]):
            assert not near(logits(target), want)
            state = target.state_dict()
            dcp.load(state, checkpoint_id=path)
            target.load_state_dict(state)
            assert near(logits(target), want)
    parts = other(c.mesh)
    parts.load_state_dict(model().state_dict())  # of the whole model
    assert near(logits(parts), want)
    layer = linear("nf4", 64, 96)  # groups of 64 become groups of 16
    state = layer.state_dict()
    y = layer(torch.ones(2, 96))
    parallelize_module(layer, c.pairs, RowwiseParallel(input_layouts=Replicate()))
    layer.load_state_dict(state)
    assert near(layer(torch.ones(2, 96)), y)
    assert layer.format.group == 16
    raises(
        RuntimeError,
        "format must be 'nf4'",
        lambda: layer.load_state_dict(linear("nf3", 64, 96).state_dict()),
    )
    layer = linear("int4_g32_o3", 64, 64)
    parallelize_module(layer, c.pairs, RowwiseParallel())
    raises(
        NotImplementedError,
        "cannot be put together in a state dict: each has as many outliers",
        layer.state_dict,
    )


def check_fsdp(c: Context) -> None:
    """Codes are sharded by `fully_shard`; results and gradients are those of the whole model, bit for bit."""
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
    from torch.distributed.fsdp import fully_shard

    def sharded(m: Any) -> Any:
        shardable(m)
        for layer in m.model.layers:
            fully_shard(layer)
        return fully_shard(m)

    def norm(m: Any) -> nn.Parameter:
        return m.model.layers[0].input_layernorm.weight

    whole, parts = (
        model(rules=MIXED, tie_word_embeddings=True),
        model(rules=MIXED, tie_word_embeddings=True),
    )
    for m in (whole, parts):
        norm(m).requires_grad_(True)
    sharded(parts)
    assert (
        nbytes(parts) <= nbytes(whole) / WORLD * 1.1 + 64 * 20
    )  # parts of 64 bytes of each tensor
    for m in (whole, parts):
        logits(m).square().mean().backward()
    assert torch.equal(logits(parts), logits(whole))
    assert near(norm(parts).grad.full_tensor(), norm(whole).grad)
    state = get_model_state_dict(parts)
    assert isinstance(state["model.layers.0.mlp.up_proj.codes"], DTensor)
    assert not any(key.endswith(".packed") for key in state)
    dcp.save(state, checkpoint_id=f"{c.folder}/fsdp")
    targets = [model(rules=MIXED, tie_word_embeddings=True) for _ in range(2)]
    for target in targets:
        target.model.layers[0].mlp.up_proj.scale_weight(2.0)
    sharded(targets[1])
    for target in targets:
        state = get_model_state_dict(target)
        dcp.load(state, checkpoint_id=f"{c.folder}/fsdp")
        set_model_state_dict(target, state)
        assert torch.equal(logits(target), logits(whole))
    raises(ValueError, "is spread over ranks already", lambda p=parts: shardable(p))
    raises(NotImplementedError, "bytes of a parameter", lambda p=parts: p.lm_head.quant_tensor())


def check_pipeline(c: Context) -> None:
    """A stage a rank, of packed layers."""
    from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

    layers = [linear("nf4_g32", 64, 64, True, seed) for seed in range(WORLD)]
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(5))
    rank = dist.get_rank()
    with torch.no_grad():
        stage = PipelineStage(layers[rank], rank, WORLD, torch.device("cpu"))
        schedule = ScheduleGPipe(stage, 2)
        y = schedule.step(x) if rank == 0 else schedule.step()
        if rank == WORLD - 1:
            assert torch.equal(y, torch.cat([nn.Sequential(*layers)(half) for half in x.chunk(2)]))


def check_refusals(c: Context) -> None:
    """What cannot be split says what, where and why."""

    def apply(layer: nn.Module, style: Any, mesh: Any = c.mesh) -> Callable[[], Any]:
        return lambda: parallelize_module(layer, mesh, style)

    row, column = RowwiseParallel(), ColwiseParallel()
    raises(
        ValueError,
        re.escape(
            "a 8 x 96 weight in format 'int4_g32' (groups of 32) cannot be cut along K for 4 ranks, every 24"
        ),
        apply(linear("int4_g32", 8, 96), row),
    )
    raises(
        ValueError,
        "5 rows in parts of 2 leave nothing for the last of 4 ranks",
        apply(linear("nf4", 5, 64), column),
    )
    raises(
        ValueError,
        "int8 activations have a scale for whole rows",
        apply(linear("int4_g32_a8", 8, 64), row),
    )
    raises(ValueError, "functions of the codes that follow", apply(linear("trellis2", 16, 64), row))
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    reordered = ReorderedLinear.from_ordered(random_weight(parse("int4_g32"), 8, 64), order)
    raises(NotImplementedError, "a ReorderedLinear cannot be split along K", apply(reordered, row))
    raises(
        NotImplementedError, "not put together again", apply(linear("nf4", 8, 64), _gathered_pair())
    )
    layer = linear("nf4", 8, 64)
    apply(layer, column)()
    raises(ValueError, "the QuantLinear is split already: part", apply(layer, column))
    raises(NotImplementedError, "the whole weight is not in this process", layer.quant_tensor)
    raises(
        NotImplementedError,
        "a weight in parts does not learn: part",
        lambda: layer.train_parameters(["scales"]),
    )
    raises(
        NotImplementedError,
        "activations of a layer must be set before it is split",
        lambda: layer.set_activations("int8"),
    )
    learnable = linear("nf4_g32", 8, 64)
    learnable.train_parameters(["scales"])
    raises(ValueError, r"\['scales'\] of the layer are learnable", apply(learnable, column))
    raises(
        ValueError,
        "mesh must have one dimension, got 2",
        apply(linear("nf4", 8, 64), column, init_device_mesh("cpu", (2, 2))),
    )
    plan = {"model.layers.*.mlp.down_proj": "rowwise"}
    raises(
        ValueError,
        re.escape(
            "model.layers.0.mlp.down_proj on 4 ranks: a 128 x 96 weight in format 'int4_g32' (groups of 32)"
        ),
        lambda: parallelize(model(intermediate_size=96), c.mesh, plan),
    )
    raises(
        ValueError,
        "plan names nothing in the model by model.layer.0",
        lambda: parallelize(model(), c.mesh, {"model.layer.0": "rowwise"}),
    )
    raises(
        ValueError,
        "num_key_value_heads=2 into 4 parts",
        lambda: parallelize(model(num_key_value_heads=2), c.mesh),
    )
    raises(
        TypeError,
        r"plan\['lm_head'\] must be the name of a style",
        lambda: parallelize(model(), c.mesh, {"lm_head": 1}),
    )
    raises(
        NotImplementedError,
        "lm_head on 4 ranks: .*by the style 'packed_rowwise'",
        lambda: parallelize(model(), c.mesh, {"lm_head": "packed_rowwise"}),
    )
    raises(
        ValueError,
        "plan must name layers: Linear has none",
        lambda: parallelize(nn.Linear(2, 2), c.mesh),
    )


def _gathered_pair() -> PackedColwiseParallel:
    style = PackedColwiseParallel()
    style.output_layouts = (Replicate(),)
    return style


CHECKS = {name: check for name, check in globals().items() if name.startswith("check_")}


@pytest.fixture(scope="module")
def failures(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    return failures_of(tmp_path_factory.mktemp("ranks"), CHECKS)


@pytest.mark.parametrize("name", CHECKS)
def test_on_ranks(name: str, failures: list[dict[str, str]]):
    found = [
        f"rank {rank}: {failed[name]}" for rank, failed in enumerate(failures) if name in failed
    ]
    assert not found, "\n".join(found)
    reached = all(not failed for failed in failures)
    assert reached or name in str(failures), f"not reached: {[list(f) for f in failures]}"


@pytest.mark.parametrize(
    ("dim", "rank", "world", "packed", "message"),
    [
        (0, 4, 4, 1, r"rank must be in \[0, 4\), got 4"),
        (0, 0, 2, 5, "rows must be those of 5 matrices of equal size, got 8 rows"),
        (
            1,
            0,
            3,
            1,
            "cannot be cut along K for 3 ranks, every 22 columns: groups of 32 would become groups of 2",
        ),
        (0, 0, 7, 1, "8 rows in parts of 2 leave nothing for the last of 7 ranks"),
    ],
)
def test_parts_that_there_are_not(dim: int, rank: int, world: int, packed: int, message: str):
    weight = random_weight(parse("int4_g32"), 8, 64)
    with pytest.raises(ValueError, match=message):
        part_of(weight, dim, rank, world, packed=packed)


def test_adapters_refuse_parts():
    peft = pytest.importorskip("peft")
    layer = nn.Sequential(linear("nf4_g32", 8, 64, True))
    layer[0].split = "part 0 of 2"
    with pytest.raises(NotImplementedError, match=r"adapters multiply whole weights.*part 0 of 2"):
        peft.get_peft_model(layer, peft.LoraConfig(target_modules=["0"]))


def test_native_decoder_refuses_parts():
    layer = linear("nf4_g32", 8, 64)
    assert _packed_obstacle(layer, QuantLinear) is None
    layer.split = "part 0 of 2"
    assert _packed_obstacle(layer, QuantLinear) == "is not whole: part 0 of 2"
