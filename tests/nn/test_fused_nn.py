"""Siblings: one call for q/k/v and gate/up, with the results, names, hooks and gradients of separate calls."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import lowbit
from lowbit.formats import parse
from lowbit.nn import QuantLinear, fuse, siblings, unfuse
from weights import random_weight

K = 96


def layer_of(format: str, n: int, bias: bool = False, seed: int = 0) -> QuantLinear:
    vector = torch.randn(n) if bias else None
    return QuantLinear.from_quant_tensor(random_weight(parse(format), n, K, seed), vector)


class Attention(nn.Module):
    """Calls its projections as transformers does; `between` runs after the first."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = layer_of("int4_g32", 130, bias=True)
        self.k_proj = layer_of("nf4", 33, seed=1)
        self.v_proj = layer_of("uint4_zfloat", 64, seed=2)
        self.between: Callable[[torch.Tensor], object] = len

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        q = self.q_proj(x)
        self.between(x)
        return [q, self.k_proj(x), self.v_proj(x)]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many products each call for siblings computed."""
    made: list[int] = []
    real = siblings.linear_siblings

    def counted(x: torch.Tensor, group: int) -> list[torch.Tensor]:
        ys = real(x, group)
        made.append(len(ys))
        return ys

    monkeypatch.setattr(siblings, "linear_siblings", counted)
    return made


@pytest.fixture
def attention() -> Attention:
    module = Attention()
    assert fuse(module) == 1
    return module


def separate(module: Attention, x: torch.Tensor) -> list[torch.Tensor]:
    return [
        lowbit.linear(x, layer.kernel_weight(), layer.bias)
        for layer in (module.q_proj, module.k_proj, module.v_proj)
    ]


def assert_same(a: list[torch.Tensor], b: list[torch.Tensor]) -> None:
    assert all(torch.equal(s, t) for s, t in zip(a, b, strict=True))


def is_fused(module: Attention) -> bool:
    return all(layer._siblings is not None for layer in (module.q_proj, module.k_proj))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("shape", ((1, K), (2, 3, K), (100, K), (0, K)))
def test_one_call_and_the_same_bits(
    attention: Attention, calls: list[int], shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    x = torch.randn(shape).to(dtype)
    for _ in range(2):
        assert_same(attention(x), separate(attention, x))
    assert calls == [3, 3]
    assert is_fused(attention)


def test_the_state_dict_is_that_of_the_layers(attention: Attention) -> None:
    plain = copy.deepcopy(attention)
    unfuse(plain)
    fused_state, state = attention.state_dict(), plain.state_dict()
    assert list(fused_state) == list(state)
    assert all(
        torch.equal(t, state[name]) if isinstance(t, torch.Tensor) else t == state[name]
        for name, t in fused_state.items()
    )
    assert [n for n, _ in attention.named_modules()] == ["", "q_proj", "k_proj", "v_proj"]
    other = Attention()
    fuse(other)
    x = torch.randn(2, K)
    other(x)
    other.load_state_dict(fused_state)
    assert_same(other(x), attention(x))


def test_fuse_and_unfuse_can_be_repeated(attention: Attention, calls: list[int]) -> None:
    assert fuse(attention) == 0
    unfuse(attention)
    assert not is_fused(attention)
    attention(torch.randn(2, K))
    assert calls == []
    assert fuse(attention) == 1
    attention(torch.randn(2, K))
    assert calls == [3]


@pytest.mark.parametrize("how", ("deepcopy", "pickle", "torch.save"))
def test_copies_stay_fused_among_themselves(
    attention: Attention, calls: list[int], how: str
) -> None:
    attention.between = len
    x = torch.randn(2, K)
    attention.q_proj(x)
    if how == "deepcopy":
        copied = copy.deepcopy(attention)
    elif how == "pickle":
        copied = pickle.loads(pickle.dumps(attention))
    else:
        file = io.BytesIO()
        torch.save(attention, file)
        file.seek(0)
        copied = torch.load(file, weights_only=False)
    assert copied.q_proj._siblings is copied.k_proj._siblings is not attention.q_proj._siblings
    assert copied.q_proj._siblings.layers[0] is copied.q_proj
    calls.clear()
    assert_same(copied(x), separate(attention, x))
    assert calls == [3]
    alone = copy.deepcopy(attention.q_proj)
    assert alone._siblings is None
    assert torch.equal(alone(x), separate(attention, x)[0])


def test_gradients(attention: Attention, calls: list[int]) -> None:
    x = torch.randn(2, K, requires_grad=True)
    (grad,) = torch.autograd.grad(sum(y.sum() for y in attention(x)), x)
    weights = (attention.q_proj, attention.k_proj, attention.v_proj)
    expected = sum(lowbit.dequantize(w.quant_tensor()).sum(0) for w in weights)
    torch.testing.assert_close(grad, expected.expand(2, K), rtol=1e-5, atol=1e-3)
    assert calls == []
    attention.v_proj.train_parameters(["scales"])
    x = x.detach()
    q, k, v = attention(x)
    assert v.requires_grad
    assert [q.requires_grad, k.requires_grad] == [False, False]
    assert calls == []


def test_a_gradient_that_is_wanted_later_is_not_lost(attention: Attention) -> None:
    x = torch.randn(2, K, requires_grad=True)
    with torch.no_grad():
        attention.q_proj(x)
    assert attention.k_proj(x).requires_grad
    attention = Attention()
    fuse(attention)
    x = torch.randn(2, K)
    attention.q_proj(x)
    x.requires_grad_()
    assert attention.k_proj(x).requires_grad


def from_numpy_alias(x: torch.Tensor) -> None:
    x.numpy()[...] *= 2


# Ways to write to a tensor, most of which its version counter does not see.
WRITES: dict[str, Callable[[torch.Tensor], object]] = {
    "in place": lambda x: x.mul_(2),
    "view": lambda x: x[:1].fill_(1),
    "data": lambda x: x.data.mul_(2),
    "new data": lambda x: setattr(x, "data", torch.ones_like(x)),
    "numpy": from_numpy_alias,
    "detached": lambda x: x.detach().mul_(2),
    "dlpack": lambda x: torch.from_dlpack(x.detach()).mul_(2),
    "storage": lambda x: x.untyped_storage().fill_(0),
}


@pytest.mark.parametrize("inference", (False, True), ids=("normal", "inference mode"))
@pytest.mark.parametrize("change", WRITES)
def test_x_that_changes_between_calls(attention: Attention, change: str, inference: bool) -> None:
    attention.between = WRITES[change]
    with torch.inference_mode(inference):
        x = torch.randn(2, K)
        q = separate(attention, x)[0]
        y = attention(x)
        assert_same(y, [q, *separate(attention, x)[1:]])


def test_x_that_shares_memory_with_numpy(attention: Attention) -> None:
    array = np.random.default_rng(0).standard_normal((2, K)).astype(np.float32)
    x = torch.from_numpy(array)
    q = separate(attention, x)[0]
    attention.between = lambda _: array.__imul__(2)
    assert_same(attention(x), [q, *separate(attention, x)[1:]])


def test_nan_in_x_is_no_change(attention: Attention, calls: list[int]) -> None:
    x = torch.randn(2, K)
    x[0, 3] = torch.nan
    for _ in range(2):
        for y, expected in zip(attention(x), separate(attention, x), strict=True):
            torch.testing.assert_close(y, expected, equal_nan=True, rtol=0, atol=0)
    assert calls == [3, 3]


@pytest.mark.parametrize("change", WRITES)
@pytest.mark.parametrize("name", ("scales", "bias"))
def test_weights_that_are_written_to_between_calls(
    attention: Attention, name: str, change: str
) -> None:
    layer, x = attention.k_proj, torch.randn(2, K)
    layer.register_parameter("bias", nn.Parameter(torch.full((33,), 3.0), requires_grad=False))
    attention.between = lambda _: WRITES[change](getattr(layer, name))
    before = separate(attention, x)[1]
    k = attention(x)[1]
    assert torch.equal(k, separate(attention, x)[1])
    assert not torch.equal(k, before)


def test_codes_that_are_written_to_between_calls(attention: Attention) -> None:
    attention.between = lambda _: attention.k_proj.codes.bitwise_xor_(1)
    x = torch.randn(2, K)
    before = separate(attention, x)[1]
    k = attention(x)[1]
    assert torch.equal(k, separate(attention, x)[1])
    assert not torch.equal(k, before)


@pytest.mark.parametrize("name", ("scales", "table", "bias"))
def test_weights_that_are_replaced(attention: Attention, calls: list[int], name: str) -> None:
    """By a tensor of the same shape, before a call and between calls."""
    x, layer = torch.randn(2, K), attention.k_proj
    layer.register_parameter("bias", nn.Parameter(torch.ones(33), requires_grad=False))
    attention(x)
    for _ in range(2):
        new = getattr(layer, name).detach() * 2
        setattr(layer, name, nn.Parameter(new, requires_grad=False) if name == "bias" else new)
        assert_same(attention(x), separate(attention, x))
        attention.between = lambda _: setattr(layer, name, getattr(layer, name))
    assert calls == [3, 3, 3]


def test_what_is_kept_is_bounded(attention: Attention, calls: list[int]) -> None:
    x = torch.randn(100_000, K)
    y = attention.q_proj(x)
    assert torch.equal(y, separate(attention, x)[0])
    assert calls == []
    assert getattr(attention.q_proj._siblings._pending, "value", None) is None
    attention.q_proj(x[:2])
    kept = attention.q_proj._siblings._pending.value
    sizes = [y.numel() for _, y in kept.results.values()]
    assert sum(sizes) + kept.x.numel() == 2 * (33 + 64 + K)


@pytest.mark.parametrize("what", ("bias", "load", "assign"))
def test_weights_that_change_between_calls(attention: Attention, what: str) -> None:
    x = torch.randn(2, K)
    before = separate(attention, x)[1]
    layer = attention.k_proj
    layer.register_parameter("bias", nn.Parameter(torch.zeros(33), requires_grad=False))
    attention.q_proj(x)
    if what == "bias":
        layer.bias.add_(1)
    else:
        other = layer_of("nf4", 33, bias=True, seed=7)
        layer.load_state_dict(other.state_dict(), assign=what == "assign")
    after = layer(x)
    assert torch.equal(after, separate(attention, x)[1])
    assert not torch.equal(after, before)


def test_hooks_see_their_own_layer(attention: Attention) -> None:
    seen = []
    attention.k_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    attention.k_proj.register_forward_hook(lambda _, args, y: y + 1)
    x = torch.randn(2, K)
    q, k, v = separate(attention, x)
    assert_same(attention(x), [q, k + 1, v])
    assert seen[0] is x
    # A hook that hands on another x.
    attention.v_proj.register_forward_pre_hook(lambda _, args: (args[0] * 2,))
    assert_same(attention(x), [q, k + 1, lowbit.linear(x * 2, attention.v_proj.kernel_weight())])


class LoRA(nn.Module):
    def __init__(self, base: QuantLinear) -> None:
        super().__init__()
        self.base_layer = base
        self.a, self.b = nn.Linear(K, 4), nn.Linear(4, base.out_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) + self.b(self.a(x))


def test_a_wrapped_layer_stays_fused(attention: Attention, calls: list[int]) -> None:
    attention.k_proj = LoRA(attention.k_proj)
    x = torch.randn(2, K)
    base = lowbit.linear(x, attention.k_proj.base_layer.kernel_weight())
    with torch.no_grad():
        y = attention(x)
        assert torch.equal(y[1], base + attention.k_proj.b(attention.k_proj.a(x)))
    assert calls == [3]


def test_a_replaced_layer_dissolves_the_group(attention: Attention, calls: list[int]) -> None:
    attention.k_proj = dense = nn.Linear(K, 33).requires_grad_(False)
    for x in (torch.randn(2, K), torch.randn(3, K), torch.randn(4, K)):
        q, k, v = attention(x)
        assert torch.equal(k, dense(x))
        assert torch.equal(
            q, lowbit.linear(x, attention.q_proj.kernel_weight(), attention.q_proj.bias)
        )
        assert torch.equal(v, lowbit.linear(x, attention.v_proj.kernel_weight()))
    assert calls == [3]
    assert attention.q_proj._siblings is None


def test_layers_called_apart(attention: Attention) -> None:
    x, other = torch.randn(2, K), torch.randn(2, K)
    q, k, v = separate(attention, x)
    assert torch.equal(attention.q_proj(x), q)
    assert torch.equal(attention.q_proj(x), q)
    assert torch.equal(attention.k_proj(x), k)
    assert torch.equal(attention.k_proj(other), separate(attention, other)[1])
    assert torch.equal(attention.v_proj(x), v)


def test_inference_tensors_and_autocast(attention: Attention, calls: list[int]) -> None:
    with torch.inference_mode():
        x = torch.randn(2, K)
        assert_same(attention(x), separate(attention, x))
        assert calls == [3]
        attention.q_proj(x)
    assert not attention.k_proj(x.clone()).is_inference()
    fuse(attention)
    with torch.inference_mode():
        attention.between = lambda x: x.mul_(2)
        x = torch.randn(2, K)
        q = separate(attention, x)[0]
        assert_same(attention(x), [q, *separate(attention, x)[1:]])
    x = torch.randn(2, K)
    with torch.autocast("cpu", torch.bfloat16):
        q = attention.q_proj(x)
    k = attention.k_proj(x)
    assert (q.dtype, k.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(k, separate(attention, x)[1])


def test_threads_do_not_meet(attention: Attention) -> None:
    """Each thread has products of its own, whatever the others do in between."""
    inputs = [torch.randn(2, K) for _ in range(4)]
    expected = [separate(attention, x) for x in inputs]
    barrier = threading.Barrier(4, timeout=60)
    attention.between = lambda _: barrier.wait()
    wrong: list[object] = []

    def work(i: int) -> None:
        try:
            for _ in range(20):
                assert_same(attention(inputs[i]), expected[i])
        except BaseException as e:
            wrong.append(e)
            barrier.abort()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert wrong == []
    assert is_fused(attention)


def test_compile_takes_separate_calls(attention: Attention, calls: list[int]) -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)], -1)

    torch._dynamo.reset()
    x = torch.randn(2, K)
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), torch.cat(separate(attention, x), -1))
    assert calls == []


def test_the_op(attention: Attention) -> None:
    group = attention.q_proj._siblings
    x = torch.randn(2, 3, K)
    torch.library.opcheck(torch.ops.lowbit.linear_siblings.default, (x, id(group)))
    number = id(group)
    with pytest.raises(ValueError, match="lowbit::linear_many has no gradients"):
        torch.ops.lowbit.linear_siblings(x.requires_grad_(), number)
    unfuse(attention)
    del group
    gc.collect()
    with pytest.raises(ValueError, match=f"group must be that of fused layers .*, got {number}"):
        torch.ops.lowbit.linear_siblings(x, number)


def test_only_plain_layers_of_one_width_are_fused() -> None:
    module = Attention()
    module.v_proj = QuantLinear.from_quant_tensor(random_weight(parse("nf4"), 64, 64))
    assert fuse(module) == 0
    module.v_proj = module.k_proj
    assert fuse(module) == 0
    module.v_proj = nn.Linear(K, 64)
    assert fuse(module) == 0


def llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=130, hidden_size=96, intermediate_size=200, num_hidden_layers=2,
        num_attention_heads=6, num_key_value_heads=2, head_dim=16, attention_bias=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_llama_has_the_same_logits(calls: list[int], dtype: torch.dtype) -> None:
    model = llama().to(dtype)
    lowbit.quantize_model(model, "int4_g32", progress=False, fuse=True)
    assert fuse(model) == 0  # done already: q/k/v and gate/up of two layers
    plain = copy.deepcopy(model)
    unfuse(plain)
    ids = torch.randint(0, 130, (2, 7))
    with torch.no_grad():
        expected = plain(ids).logits
        assert calls == []
        assert torch.equal(model(ids).logits, expected)
        assert calls == [3, 2] * 2
        calls.clear()
        tokens = model.generate(ids, max_new_tokens=4, do_sample=False)
        assert calls == [3, 2] * 8
        assert torch.equal(tokens, plain.generate(ids, max_new_tokens=4, do_sample=False))
    model.train()
    logits = model(ids).logits
    F.cross_entropy(logits.flatten(0, 1).float(), ids.flatten()).backward()
    assert model.model.embed_tokens.weight.grad is not None
