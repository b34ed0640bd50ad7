"""Keys and values kept in fewer bits, against transformers' forward with a cache that rounds the same numbers."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers")

from test_architectures import IDS, PIECES, compiled, forward, logits_after, one_thread  # noqa: F401
from tiny import LENGTH, bound, tiny
from transformers import DynamicCache

from lowbit.decoder.balance import key_balance
from lowbit.decoder.compiled import CompiledDecoder
from lowbit.decoder.runner import Runner

E4M3 = torch.float8_e4m3fn
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int8, E4M3]
SCALED = [torch.int8, E4M3]


def rounded(x, dtype, group):
    """x (batch, heads, tokens, dim) as the cache gives it back."""
    if dtype not in SCALED:
        return x.to(dtype).float()
    if dtype == E4M3:
        scale = x.abs().amax(dim=-1, keepdim=True) / 448
        return (x / scale).to(E4M3).float() * scale
    parts = []
    for part in x.split(group, dim=-1):
        scale = part.abs().amax(dim=-1, keepdim=True) / 127
        parts.append((part / scale).round() * scale)
    return torch.cat(parts, dim=-1)


def balance_of(bias, dim):
    """The balance of a key projection's bias, dimension by dimension: (1, heads, 1, dim)."""
    made = []
    for i, value in enumerate(bias.tolist()):
        partner = i + dim // 2 if i % dim < dim // 2 else i - dim // 2
        radius = math.hypot(value, float(bias[partner]))
        made.append(2.0 ** round(math.log2(max(radius, 1)) / 2))
    return torch.tensor(made).view(1, -1, 1, dim)


def balances_of(model):
    """By layer; 1 where keys have no bias."""
    attentions = [layer.self_attn for layer in model.model.layers]
    biases = [getattr(getattr(a, "k_proj", None), "bias", None) for a in attentions]
    return [
        1 if b is None else balance_of(b, a.head_dim)
        for a, b in zip(attentions, biases, strict=True)
    ]


class RoundingCache(DynamicCache):
    def __init__(self, dtype, balances):
        super().__init__()
        self.dtype, self.balances = dtype, balances

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        balance = self.balances[layer_idx] if self.dtype == torch.int8 else 1
        key = rounded(key_states / balance, self.dtype, 32) * balance
        value = rounded(value_states, self.dtype, value_states.shape[-1])
        return super().update(key, value, layer_idx, *args, **kwargs)


def forward_rounding(model, dtype, balances=None):
    with torch.inference_mode():
        cache = RoundingCache(dtype, balances or balances_of(model))
        return model(IDS[None], past_key_values=cache, use_cache=True).logits[0]


def decoder_with(packed, cache_dtype, threads=1):
    torch.set_num_threads(threads)
    decoder = CompiledDecoder(packed, LENGTH, cache_dtype)
    torch.set_num_threads(1)
    return decoder


@pytest.mark.parametrize("case", ["llama3", "phi3", "gemma3", "wide"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rounded_caches(dtype, case):
    """A number within the error of fp32 of the middle between two rounds another way: some hundredth of them in fp16,
    fewer in the others. Logits differ by less than half of what rounding itself makes of them.
    """
    # Of 72 dimensions: several scales for a key, the last of a part of 8.
    packed, oracle = tiny("qwen3", head_dim=72) if case == "wide" else tiny(case)
    plain, expected = forward(oracle), forward_rounding(oracle, dtype)
    effect = (expected - plain).norm() / math.sqrt(LENGTH)
    assert (effect > 0) == (dtype != torch.float32)
    limit = bound(oracle, plain)
    for threads in (1, 3):
        decoder = decoder_with(packed, dtype, threads)
        for pieces in PIECES:
            for got, last in logits_after(decoder, pieces):
                error = got - expected[last]
                assert error.norm() < 0.4 * effect + limit, (threads, pieces, last)


@pytest.mark.parametrize("cache", [torch.float16, *SCALED], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_models(dtype, cache):
    """Activations of 16 bits: a cache of more bits than they have changes nothing, int8 little."""
    packed, oracle = tiny("gemma2", dtype)
    exact = forward(oracle)
    error = (forward(packed).float() - exact).norm()
    decoder = decoder_with(packed, cache)
    ones = torch.stack([logits.float() for logits, _ in logits_after(decoder, (1,) * LENGTH)])
    rounding = (forward_rounding(oracle, cache) - exact).norm()
    assert (ones - exact).norm() < 1.25 * torch.hypot(error, rounding)


def enlarge_biases(model):
    """Some dimensions of keys become 100 times the others, and the queries' as much smaller, as in Qwen2.5."""
    for layer in model.model.layers:
        attention = layer.self_attn
        half = attention.head_dim // 2  # dimensions that far apart turn together
        for linear, factor in ((attention.k_proj, 100), (attention.q_proj, 1 / 100)):
            large = torch.arange(len(linear.bias)) % half % 7 == 0
            linear.bias.data[large] *= factor
            if factor < 1:
                linear.weight.data[large] *= factor


def test_balanced_keys():
    """Keys are divided by the balance before they are rounded, which costs the logits far less."""
    packed, oracle = tiny("qwen2", prepare=enlarge_biases, num_hidden_layers=2)
    assert max(float(b.max()) for b in balances_of(oracle)) >= 8
    plain, expected = forward(oracle), forward_rounding(oracle, torch.int8)
    effect = (expected - plain).norm() / math.sqrt(LENGTH)
    without = (forward_rounding(oracle, torch.int8, [1, 1]) - plain).norm() / math.sqrt(LENGTH)
    assert 0 < 3 * effect < without
    for threads in (1, 3):
        decoder = decoder_with(packed, torch.int8, threads)
        for pieces in PIECES:
            for got, last in logits_after(decoder, pieces):
                error = got - expected[last]
                assert error.norm() < 0.4 * effect + bound(oracle, plain), (threads, pieces, last)


def test_balance_of_a_part_that_turns():
    """Dimensions 0 and 2, 1 and 3 turn together, 4 and 5 do not; a power of two near the square root of the radius."""
    bias = torch.tensor([3.0, 0.5, -4.0, 0.5, 16.0, -200.0, *[0.9] * 6])
    found = key_balance(bias, 6, 4)
    assert found.tolist() == [[2.0, 1.0, 2.0, 1.0, 4.0, 16.0], [1.0] * 6]
    assert key_balance(bias[6:], 6, 4) is None
    assert key_balance(bias, 6, 0).tolist()[0] == [2.0, 1.0, 2.0, 1.0, 4.0, 16.0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_stale_values_do_not_return(dtype, poison):
    packed, _ = tiny("mistral")
    stale, fresh = decoder_with(packed, dtype), decoder_with(packed, dtype)
    embedding = packed.model.embed_tokens.weight.data
    saved = embedding[202].clone()
    embedding[202] = poison
    assert stale.forward(torch.full((LENGTH,), 202), 0).isnan().all()
    embedding[202] = saved
    for pieces in PIECES[1:]:
        for (got, _), (expected, _) in zip(
            logits_after(stale, pieces), logits_after(fresh, pieces), strict=True
        ):
            assert torch.equal(got, expected)


@pytest.mark.parametrize(
    ("cache", "base", "limit"),
    [(torch.int8, torch.float32, 0.002), (E4M3, torch.bfloat16, 0.004)],
    ids=str,
)
@pytest.mark.parametrize("case", ["llama3", "qwen3", "gemma3"])
def test_divergence(case, cache, base, limit, capsys):
    """Mean KL divergence of the next token from that of a cache of more bits."""
    packed, _ = tiny(case)
    found = []
    for dtype in (base, cache):
        decoder = decoder_with(packed, dtype)
        found.append(torch.stack([logits for logits, _ in logits_after(decoder, (1,) * LENGTH)]))
    p, q = (F.log_softmax(logits, dim=1) for logits in found)
    divergence = float(F.kl_div(q, p, reduction="batchmean", log_target=True))
    with capsys.disabled():
        print(f"\nKL divergence of a cache of {cache}, {case}: {divergence:.1e} nats")
    assert 0 < divergence < limit


@pytest.mark.parametrize("cache", SCALED, ids=str)
def test_zeros_are_kept(cache):
    """absmax of 0: there is no scale to divide by."""
    packed, oracle = tiny("llama3")
    for layer in (*packed.model.layers, *oracle.model.layers):
        attention = layer.self_attn
        attention.v_proj.bias.zero_()
    for name in ("scales", "weight"):
        model = packed if name == "scales" else oracle
        for layer in model.model.layers:
            getattr(layer.self_attn.v_proj, name).data.zero_()
    expected = forward(oracle)
    for got, last in logits_after(decoder_with(packed, cache), PIECES[1]):
        assert (got - expected[last]).abs().max() < bound(oracle, expected)


def test_arguments():
    packed, _ = tiny("llama3")
    with pytest.raises(ValueError, match=r"cache_dtype must be one of .* got torch\.int16"):
        Runner(packed, LENGTH, torch.int16)
    packed.model.layers[0].mlp.up_proj = torch.nn.Linear(72, 101)
    with pytest.raises(NotImplementedError, match=r"cache_dtype=torch\.int8 needs the compiled"):
        Runner(packed, LENGTH, torch.int8)
