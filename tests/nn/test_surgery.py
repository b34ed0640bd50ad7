"""Replacing modules: everything that is attached to the old one is on the new one, or it is refused."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import lowbit
from lowbit.nn import LLMInt8Linear, QuantConv2d, QuantEmbedding, QuantLinear
from lowbit.nn.surgery import obstacle, replace

KINDS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], nn.Module]]] = {
    "linear": (lambda: nn.Linear(32, 32), lambda d: QuantLinear.from_linear(d, "int8")),
    "LLM.int8()": (lambda: nn.Linear(32, 32), LLMInt8Linear.from_linear),
    "embedding": (
        lambda: nn.Embedding(32, 32),
        lambda d: QuantEmbedding.from_embedding(d, "int8"),
    ),
    "convolution": (
        lambda: nn.Conv2d(2, 4, 3),
        lambda d: QuantConv2d.from_conv(d, "int8"),
    ),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


class Net(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


def input_of(kind: str) -> torch.Tensor:
    if kind == "embedding":
        return torch.tensor([[3, 0], [31, 7]])
    return torch.randn(2, 2, 5, 5) if kind == "convolution" else torch.randn(4, 32)


def nets(kind: str, attach: Callable[[nn.Module], object]) -> tuple[nn.Module, nn.Module]:
    """A model with a replaced layer, and the dense one with its values; `attach` was done to the layer of both."""
    make, pack = KINDS[kind]
    model = Net(make()).eval()
    dense = copy.deepcopy(model)
    attach(model.inner)
    attach(dense.inner)
    made = pack(model.inner)
    replace(model, "inner", made)
    assert model.inner is made
    with torch.no_grad():
        dense.inner.weight.copy_(made.weight.detach())
    return model, dense


def double(module: nn.Module, args: object, output: torch.Tensor) -> torch.Tensor:
    return output * 2


def reverse(module: nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    return (args[0].flip(0),)


def with_kwargs(module, args, kwargs, output):
    return output - 1


def accelerated(module: nn.Module) -> None:
    hooks = pytest.importorskip("accelerate").hooks

    class Triple(hooks.ModelHook):
        def post_forward(self, module, output):
            return output * 3

    hooks.add_hook_to_module(module, Triple())


def accelerated_twice(module: nn.Module) -> None:
    accelerated(module)
    hooks = pytest.importorskip("accelerate").hooks
    align = hooks.AlignDevicesHook(execution_device=torch.device("cpu"))
    hooks.add_hook_to_module(module, align, append=True)


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "nothing": lambda m: None,
    "hook": lambda m: m.register_forward_hook(double),
    "hook with keywords": lambda m: m.register_forward_hook(with_kwargs, with_kwargs=True),
    "two hooks, the later first": lambda m: (
        m.register_forward_hook(with_kwargs, with_kwargs=True),
        m.register_forward_hook(double, prepend=True),
    ),
    "pre-hook": lambda m: m.register_forward_pre_hook(reverse),
    "hook of accelerate": accelerated,
    "hooks of accelerate": accelerated_twice,
}


@pytest.mark.parametrize("attach", CHANGES.values(), ids=CHANGES)
@every_kind
def test_hooks_that_change_results(kind: str, attach) -> None:
    model, dense = nets(kind, attach)
    x = input_of(kind)
    for each in (model, copy.deepcopy(model)):
        torch.testing.assert_close(each(x), dense(x), rtol=0.02, atol=0.05 * 6)
    if attach not in (accelerated, accelerated_twice):
        bare = copy.deepcopy(model.inner)
        bare._forward_hooks.clear()
        bare._forward_pre_hooks.clear()
        assert torch.equal(bare(x), model(x)) == (attach is CHANGES["nothing"])


@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_hooks_of_backward(kind: str) -> None:
    seen: list[str] = []

    def attach(module: nn.Module) -> None:
        module.register_full_backward_pre_hook(lambda *_: seen.append("pre"))
        module.register_full_backward_hook(lambda m, i, o: (i[0] * 3,))

    model, dense = nets(kind, attach)
    grads = []
    for each in (model, dense):
        torch.manual_seed(3)
        x = input_of(kind).requires_grad_()
        each(x).sum().backward()
        grads.append(x.grad)
    assert seen == ["pre", "pre"]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


@every_kind
def test_handles_remove_hooks_from_the_new_module(kind: str) -> None:
    handles = []
    model, _ = nets(kind, lambda m: handles.append(m.register_forward_hook(double)))
    x = input_of(kind)
    doubled = model(x)
    handles[0].remove()
    assert not model.inner._forward_hooks
    assert torch.equal(model(x) * 2, doubled)


@every_kind
def test_hooks_of_state_dicts(kind: str) -> None:
    seen: list[object] = []

    def attach(module: nn.Module) -> None:
        module.register_state_dict_pre_hook(lambda m, *_: seen.append(("save", m)))
        module.register_state_dict_post_hook(lambda m, *_: seen.append(("saved", m)))
        module.register_load_state_dict_pre_hook(lambda m, *_: seen.append(("load", m)))
        module.register_load_state_dict_post_hook(lambda m, _: seen.append(("loaded", m)))

    make, pack = KINDS[kind]
    model = Net(make())
    attach(model.inner)
    replace(model, "inner", pack(model.inner))
    gc.collect()
    model.load_state_dict(model.state_dict())
    assert [name for name, _ in seen] == ["save", "saved", "load", "loaded"]
    assert all(module is model.inner for _, module in seen)
    pickle.loads(pickle.dumps(Net(pack(make()))))


@every_kind
def test_buffers_parameters_children_and_attributes(kind: str) -> None:
    make, pack = KINDS[kind]
    model = Net(make())
    old = model.inner
    old.register_buffer("mask", torch.arange(3.0))
    old.register_buffer("scratch", torch.ones(2), persistent=False)
    old.register_parameter("gain", nn.Parameter(torch.ones(2)))
    old.adapter = nn.Linear(2, 2).eval()
    old.note, old.extra = "kept", {"a": 1}
    old._is_hf_initialized = True
    attached = (old.mask, old.scratch, old.gain, old.adapter, old.extra)
    own = {key: value for key, value in vars(old).items() if not key.startswith("_")}
    replace(model, "inner", pack(old))
    new = model.inner
    assert new.training
    assert not new.adapter.training
    for one, other in zip(
        attached, (new.mask, new.scratch, new.gain, new.adapter, new.extra), strict=True
    ):
        assert one is other
    assert (new.note, new._is_hf_initialized) == ("kept", True)
    for key, value in own.items():
        assert key == "padding" or getattr(new, key) == value, key
    state = model.state_dict()
    assert {"inner.mask", "inner.gain", "inner.adapter.weight"} <= state.keys()
    assert "inner.scratch" not in state
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.inner.mask.zero_()
        other.inner.gain.zero_()
    other.load_state_dict(state)
    assert torch.equal(other.inner.mask, new.mask)
    assert torch.equal(other.inner.gain, new.gain)
    assert other.half().inner.mask.dtype == torch.float16


@pytest.mark.parametrize("training", [False, True])
@every_kind
def test_training_mode_and_dtype(kind: str, training: bool) -> None:
    make, pack = KINDS[kind]
    model = Net(make().bfloat16()).train(training)
    made = pack(model.inner).train(not training)
    replace(model, "inner", made)
    assert {m.training for m in made.modules()} == {training}
    assert made.weight.dtype == torch.bfloat16


def test_the_dense_module_is_free() -> None:
    model = Net(nn.Linear(32, 32))
    model.inner.register_forward_hook(double)
    gone = weakref.ref(model.inner)
    replace(model, "inner", QuantLinear.from_linear(model.inner, "int8"))
    assert gone() is None


def test_every_name_of_a_module() -> None:
    shared = nn.Linear(32, 32)
    shared.register_forward_hook(double)
    for together in (False, True):
        model = nn.ModuleDict({"a": shared, "b": nn.ModuleList([shared]), "c": nn.Linear(2, 2)})
        made = QuantLinear.from_linear(shared, "int8")
        if together:
            replace(model, ["a", "b.0"], made)
        else:
            replace(model, "a", made)
            replace(model, "b.0", made)
        assert model["a"] is model["b"][0] is made
        assert len(made._forward_hooks) == 1
    with pytest.raises(ValueError, match="names must be those of one module"):
        replace(model, ["a", "c"], made)
    for names in ("", [], ["a", ""]):
        with pytest.raises(ValueError, match="names must be those of a module in the model"):
            replace(model, names, made)


class OwnCall(nn.Linear):
    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return super().__call__(x) * 2


def offloaded(module: nn.Module) -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerate.cpu_offload(module, execution_device=torch.device("cpu"))


def patched_and_hooked(module: nn.Module) -> None:
    module.forward = lambda x: x
    accelerated(module)


OBSTACLES: dict[str, tuple[Callable[[nn.Module], object], str]] = {
    "patched forward": (lambda m: setattr(m, "forward", lambda x: x), "its forward is patched"),
    "patched and hooked": (patched_and_hooked, "its forward is patched"),
    "patched method": (lambda m: setattr(m, "extra_repr", str), "its extra_repr is patched"),
    "parametrized": (parametrizations.weight_norm, "weight of this ParametrizedLinear is param"),
    "orthogonal": (parametrizations.orthogonal, "weight of this ParametrizedLinear is param"),
    "pruned": (lambda m: prune.l1_unstructured(m, "weight", 0.5), "weight is computed anew"),
    "pruned bias": (lambda m: prune.l1_unstructured(m, "bias", 0.5), "bias is computed anew"),
    "spectral norm": (nn.utils.spectral_norm, "weight is computed anew"),
    "compiled": (lambda m: m.compile(), "compiled in place"),
    "refers to itself": (lambda m: setattr(m, "again", m.forward), "its attribute again refers"),
    "own hook": (lambda m: m.register_forward_hook(m.register_buffer), "refers to the module"),
    "offloaded": (offloaded, "accelerate offloads its weight"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method:DeprecationWarning")
@pytest.mark.parametrize("name", OBSTACLES)
def test_what_cannot_be_kept_is_refused(name: str) -> None:
    change, reason = OBSTACLES[name]
    model = Net(nn.Linear(8, 8))
    assert obstacle(model.inner) is None
    made = QuantLinear.from_linear(model.inner, "int8")
    before = dict(vars(made))
    change(model.inner)
    old = model.inner
    assert reason in obstacle(old)
    with pytest.raises(NotImplementedError, match=f"inner cannot be replaced: .*{reason}"):
        replace(model, "inner", made)
    assert model.inner is old
    assert vars(made) == before


def test_a_call_of_its_own_is_an_obstacle() -> None:
    assert obstacle(OwnCall(2, 2)) == "OwnCall has a __call__ of its own"


def test_hooks_of_accelerate_that_were_removed_are_no_obstacle() -> None:
    hooks = pytest.importorskip("accelerate").hooks
    layer = nn.Linear(2, 2)
    accelerated(layer)
    hooks.remove_hook_from_module(layer)
    assert obstacle(layer) is None


@pytest.mark.parametrize("name", ["codes", "format", "kernel_weight", "scales"])
@pytest.mark.parametrize(
    "attach",
    [
        lambda m, name: setattr(m, name, "x"),
        lambda m, name: m.register_buffer(name, torch.ones(2)),
        lambda m, name: m.register_parameter(name, nn.Parameter(torch.ones(2))),
    ],
)
def test_a_name_that_the_new_module_needs(name: str, attach) -> None:
    model = Net(nn.Linear(8, 8))
    attach(model.inner, name)
    old, made = model.inner, QuantLinear.from_linear(model.inner, "int8")
    with pytest.raises(NotImplementedError, match=f"its {name} would take the place"):
        replace(model, "inner", made)
    assert model.inner is old
    made(torch.randn(2, 8))


def test_buffers_of_modules_that_share_a_weight() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(8, 8), "head": nn.Linear(8, 8)})
    model["head"].register_buffer("mask", torch.ones(2))
    packed = QuantEmbedding.from_embedding(model["embed"], "int8")
    with pytest.raises(NotImplementedError, match="its mask would be that of every module"):
        replace(model, "head", QuantLinear.tied_to(packed))
    assert "mask" not in packed._buffers


def test_loading_keeps_what_is_attached(tmp_path: Path) -> None:
    saved = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    for layer in saved:
        layer.register_buffer("mask", torch.randn(3))
    lowbit.quantize_model(saved, "int8", progress=False, fuse=False)
    for layer in saved:
        if "mask" not in layer._buffers:
            layer.register_buffer("mask", torch.randn(3))
    path = lowbit.save(saved, tmp_path)
    for device in ("cpu", "meta"):
        with torch.device(device):
            model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32)).eval()
            model[1].register_buffer("mask", torch.zeros(3))
            model[0].register_buffer("mask", torch.zeros(3))
        model[1].register_forward_hook(double)
        lowbit.load(model, path)
        x = torch.randn(2, 32)
        assert torch.equal(model(x), saved(x) * 2)
        assert torch.equal(model[1].mask, saved[1].mask)
        assert not model[1].training
    model[1] = nn.Linear(32, 32)
    model[1].register_buffer("mask", torch.zeros(3))
    model[1].forward = lambda x: x
    with pytest.raises(ValueError, match="layer '1' cannot be replaced: its forward is patched"):
        lowbit.load(model, path)
