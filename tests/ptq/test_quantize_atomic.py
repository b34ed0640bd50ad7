"""Whatever is raised while a model is changed, it is as it was before: modules, tensors, hooks and modes."""

from __future__ import annotations

import functools
import weakref

import pytest
import torch
from torch import nn

from lowbit import nn as qnn
from lowbit import qat
from lowbit.nn import siblings
from lowbit.ptq import calibration, quantize_llm_int8, quantize_model, smooth
from lowbit.ptq import model as model_module
from lowbit.ptq import swap as swap_module


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name in ("q_proj", "k_proj", "v_proj"):
            self.add_module(name, nn.Linear(32, 32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.q_proj(x) + self.k_proj(x) * self.v_proj(x)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 32)
        self.attention = Attention()
        self.again = self.attention.q_proj
        self.norm = nn.LayerNorm(32)
        self.up = nn.Linear(32, 64)
        self.down = nn.Linear(64, 32)
        self.head = nn.Linear(32, 20, bias=False)
        self.head.weight = self.embed.weight
        self.up.register_buffer("mask", torch.ones(3))
        self.up.register_forward_hook(lambda *_: None)
        self.up.register_load_state_dict_pre_hook(lambda *_: None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.attention(self.embed(x)))
        return self.head(self.down(torch.relu(self.up(x))))


BATCHES = [torch.arange(20).view(2, 10)]


def snapshot(model: nn.Module) -> list[object]:
    """Identities of all modules and tensors, their values, hooks and modes."""
    found: list[object] = []
    for name, module in model.named_modules(remove_duplicate=False):
        own = vars(module)
        hooks = {key: list(value.items()) for key, value in own.items() if key.endswith("_hooks")}
        rest = sorted(key for key in own if not key.startswith("__"))
        found.append((name, id(module), module.training, hooks, rest, "forward" in own))
        for hook in module._load_state_dict_pre_hooks.values():
            found.append(getattr(hook, "module", None) is None or hook.module() is module)
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
    found += [(n, id(t), t.requires_grad, t.tolist()) for n, t in tensors]
    return found


def stopping(at: int, error: BaseException):
    """A function that raises when it is called the n-th time."""
    count = 0

    def call(*args: object) -> None:
        nonlocal count
        count += 1
        if count == at:
            raise error

    return call


ERRORS = [
    KeyboardInterrupt(),
    MemoryError("no memory"),
    RuntimeError("out of memory"),
    ValueError("bad"),
]
HOW = {
    "plain": {"format": "int4"},
    "recipe": {"format": {".*": "int8"}, "skip": ()},
    "gptq": {"format": "int3_g32", "method": "gptq", "calibration": BATCHES},
    "kmeans": {"format": "kmeans3", "method": "kmeans", "calibration": BATCHES},
    "observer": {"format": "int8_row_a8", "observer": "ema", "calibration": BATCHES},
}


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("how", HOW)
def test_on_layer_raises(how: str, error: BaseException):
    model = Net().train()
    before = snapshot(model)
    with pytest.raises(type(error)):
        quantize_model(model, progress=False, on_layer=stopping(4, error), **HOW[how])
    assert snapshot(model) == before
    # And it can be quantized then.
    assert quantize_model(model, progress=False, **HOW[how]).layers


@pytest.mark.parametrize(
    "what", ["quantize", "measure", "fuse_siblings", "calibrate", "check_notes"]
)
def test_any_part_raises(what: str, monkeypatch: pytest.MonkeyPatch):
    model = Net().eval()
    before = snapshot(model)
    inner, step = getattr(model_module, what), stopping(3, RuntimeError("stop"))

    def failing(*args: object, **kwargs: object) -> object:
        step()
        if what in ("fuse_siblings", "check_notes"):
            raise RuntimeError("stop")
        return inner(*args, **kwargs)

    monkeypatch.setattr(model_module, what, failing)
    monkeypatch.setattr(calibration, "_HESSIAN_BYTES", 1)
    with pytest.raises(RuntimeError, match="stop"):
        quantize_model(model, progress=False, fuse=True, **HOW["gptq"])
    assert snapshot(model) == before


def test_fuse_is_undone(monkeypatch: pytest.MonkeyPatch):
    model = nn.ModuleList([Attention(), Attention()])
    made: list[int] = []

    class Failing(siblings.Siblings):
        def __init__(self, layers: list[qnn.QuantLinear]) -> None:
            super().__init__(layers)
            made.append(1)
            if len(made) == 2:
                raise KeyboardInterrupt

    monkeypatch.setattr(siblings, "Siblings", Failing)
    before = snapshot(model)
    with pytest.raises(KeyboardInterrupt):
        quantize_model(model, "int4", progress=False, fuse=True)
    assert len(made) == 2
    assert snapshot(model) == before


def test_a_warning_that_is_an_error():
    """Nothing is left half done where warnings raise: pytest makes them."""
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    x = torch.randn(4, 32)
    model[0].weight.data.zero_()
    model[0].bias.data.zero_()
    before = snapshot(model)
    with pytest.raises(UserWarning, match="calibration says nothing of 1:"):
        quantize_model(model, "int4", method="gptq", calibration=[x], progress=False)
    assert snapshot(model) == before


BAD = {
    "nan": (lambda w: w.index_fill(0, torch.tensor([1]), torch.nan), "is not finite"),
    "inf": (lambda w: w.index_fill(0, torch.tensor([1]), -torch.inf), "is not finite"),
    "meta": (lambda w: w.to("meta"), "weight must hold values, got a meta tensor"),
    "empty": (lambda w: w[:0], r"non-empty \(N, K\) matrix"),
    "dtype": (lambda w: w.to(torch.complex64), "weight must be one of"),
}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("call", [quantize_model, quantize_llm_int8])
@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("atomic", [False, True])
def test_bad_weights_are_found_first(bad: str, call, calibrated: bool, atomic: bool):
    """Before the model runs, and before anything is replaced: also where errors need not be undone."""
    model = Net().eval()
    make, message = BAD[bad]
    model.down.weight = nn.Parameter(make(model.down.weight.detach()), requires_grad=False)
    modules = dict(model.named_modules())
    given = {"calibration": [(lambda: pytest.fail("ran"))]} if calibrated else {}
    if calibrated and call is quantize_model:
        given["observer"] = "minmax"
    with pytest.raises((TypeError, ValueError), match=rf"^down: .*{message}"):
        call(model, "int8_row_a8", progress=False, atomic=atomic, **given)
    assert dict(model.named_modules()) == modules


@pytest.mark.parametrize("how", ["gptq", "observer", "kmeans"])
def test_bad_calibration(how: str):
    model = Net().eval()
    before = snapshot(model)
    hook = model.down.register_forward_hook(lambda m, x, y: y * torch.nan)
    during = snapshot(model)
    with pytest.raises(ValueError, match="head: calibration input holds NaN or inf"):
        quantize_model(model, progress=False, skip=[], **HOW[how])
    assert snapshot(model) == during
    hook.remove()
    assert snapshot(model) == before


def test_without_undoing_the_error_says_how_far_it_came():
    model = Net()
    with pytest.raises(RuntimeError, match="stop") as caught:
        quantize_model(
            model, "int4", progress=False, atomic=False, on_layer=stopping(3, RuntimeError("stop"))
        )
    assert isinstance(model.attention.k_proj, qnn.QuantLinear)
    if hasattr(caught.value, "__notes__"):
        assert caught.value.__notes__ == ["2 layers are replaced, up to 'attention.k_proj'"]


def test_dense_layers_are_free_at_the_end():
    model = Net()
    weights = [weakref.ref(model.up.weight), weakref.ref(model.attention.q_proj.weight)]
    quantize_model(model, "int4", progress=False)
    assert [r() for r in weights] == [None, None]


def failing_swap(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    step, inner = stopping(at, KeyboardInterrupt()), swap_module.replace

    def replace(*args: object, **kwargs: object) -> None:
        inner(*args, **kwargs)  # type: ignore[arg-type]
        step()

    monkeypatch.setattr(swap_module, "replace", replace)


@pytest.mark.parametrize("calibration", [None, BATCHES])
def test_llm_int8(calibration, monkeypatch: pytest.MonkeyPatch):
    model = Net()
    before = snapshot(model)
    failing_swap(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        quantize_llm_int8(model, progress=False, calibration=calibration)
    assert snapshot(model) == before


def test_prepare_and_convert(monkeypatch: pytest.MonkeyPatch):
    model = Net()
    before = snapshot(model)

    def spec(at: int) -> qat.Spec:
        step = stopping(at, RuntimeError("stop"))
        return qat.Spec(lambda weight: (step(), qat.STE(weight, "int4"))[1])

    with pytest.raises(RuntimeError, match="stop"):
        qat.prepare(model, spec(3))
    assert snapshot(model) == before
    with monkeypatch.context() as patched:
        failing_swap(patched, 3)
        with pytest.raises(KeyboardInterrupt):
            qat.prepare(model, spec(0))
    assert snapshot(model) == before
    names = qat.prepare(model, spec(0), skip=["head"])
    assert names == [
        "attention.q_proj",
        "attention.k_proj",
        "attention.v_proj",
        "again",
        "up",
        "down",
    ]
    assert len(model.up._forward_hooks) == 1
    assert model.up.mask.tolist() == [1, 1, 1]
    before = snapshot(model)
    with monkeypatch.context() as patched:
        failing_swap(patched, 3)
        with pytest.raises(KeyboardInterrupt):
            qat.convert(model)
    assert snapshot(model) == before
    assert qat.convert(model) == names
    assert isinstance(model.up, qnn.QuantLinear)
    assert model.again is model.attention.q_proj
    assert len(model.up._forward_hooks) == 1
    assert not list(model.up.children())


@pytest.mark.parametrize("previous", [nn.LayerNorm(8), nn.Linear(3, 8)], ids=["norm", "linear"])
def test_fold(previous: nn.Module):
    linears = [nn.Linear(8, 4), nn.Linear(8, 4).half()]
    model = nn.ModuleList([previous, *linears])
    before = snapshot(model)
    # 1e6 is no fp16 number: the second linear would hold inf.
    with pytest.raises(ValueError, match="NaN or inf"):
        smooth.fold(previous, linears, torch.full((8,), 1e6))
    assert snapshot(model) == before
    with torch.inference_mode():
        linears[1] = nn.Linear(8, 4)
    model = nn.ModuleList([previous, *linears])
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="nference"):
        smooth.fold(previous, linears, torch.full((8,), 2.0))
    assert snapshot(model) == before


def test_fold_puts_a_norm_back_that_fails():
    class Failing(nn.LayerNorm):
        step = staticmethod(stopping(2, KeyboardInterrupt()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.step()
            return super().forward(x)

    norm, linear = Failing(8), nn.Linear(8, 4)
    with pytest.raises(KeyboardInterrupt):
        smooth.fold(norm, [linear], torch.full((8,), 2.0))
    assert norm.weight.tolist() == [1.0] * 8


@pytest.mark.parametrize("born", [False, True], ids=["model", "inference"])
@pytest.mark.parametrize(
    "call",
    [
        functools.partial(quantize_model, format="int4"),
        functools.partial(quantize_model, **HOW["gptq"]),
        functools.partial(quantize_model, **HOW["observer"]),
        quantize_llm_int8,
        functools.partial(quantize_llm_int8, calibration=BATCHES),
    ],
)  # fmt: skip
def test_inference_mode(call, born: bool):
    """A model that is quantized in inference mode is what it is outside of it: no inference tensors."""
    torch.manual_seed(3)
    with torch.inference_mode(born):
        models = [Net(), Net()]
    models[1].load_state_dict(models[0].state_dict()) if not born else None
    with torch.inference_mode():
        if born:
            models[1].load_state_dict(models[0].state_dict())
        call(models[0], progress=False)
    call(models[1], progress=False)
    assert not any(t.is_inference() for n, t in models[0].up.named_buffers() if n != "mask")
    with torch.no_grad():
        y = [model(BATCHES[0]) for model in models]
    assert torch.equal(*y)


def test_a_weight_without_a_shape():
    model = nn.Sequential(nn.Linear(8, 8), nn.LazyLinear(8))
    with pytest.raises(ValueError, match="1.weight has no shape yet: run the model once"):
        quantize_model(model, "int4", progress=False)
    assert type(model[0]) is nn.Linear
