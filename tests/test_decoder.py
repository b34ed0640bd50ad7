"""The compiled decoder against transformers' own forward on the same packed modules, for shapes that no GGUF has."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("transformers")

from transformers import LlamaConfig, LlamaForCausalLM

import lowbit
from lowbit.integrations.compiled import CompiledDecoder
from lowbit.integrations.eager import EagerDecoder
from lowbit.integrations.runner import LlamaRunner
from lowbit.nn import QuantLinear

LENGTH = 150  # more than two blocks of 64 positions


def llama(heads, kv_heads, dim, hidden, dtype=torch.float32, format="int4_g32", bias=False):
    """A model of random weights with packed layers; its embedding and head are dense."""
    config = LlamaConfig(
        vocab_size=203,
        hidden_size=hidden,
        intermediate_size=hidden + 37,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=dim,
        max_position_embeddings=LENGTH + 10,
        attention_bias=bias,
        mlp_bias=bias,
        tie_word_embeddings=False,
    )
    generator = torch.Generator().manual_seed(heads * 1000 + dim)
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        # Norms about 1; linears that keep the size of what they are given.
        scale = 0.1 if parameter.dim() == 1 else parameter.shape[1] ** -0.5
        parameter.data = (noise * scale + (parameter.dim() == 1)).to(dtype)
    lowbit.quantize_model(model, format, skip=("lm_head",))
    return model


@pytest.fixture(autouse=True)
def one_thread():
    """torch's own threads cost more than they save on models this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def runner_with(threads, model):
    """A runner keeps the number of threads that it was made with."""
    torch.set_num_threads(threads)
    runner = LlamaRunner(model, LENGTH)
    torch.set_num_threads(1)
    return runner


def bound(model, logits):
    """sqrt(K) eps for each of the sums behind a logit, of K terms in another order; 4 for the tails."""
    config = model.config
    k = max(config.hidden_size, config.intermediate_size, LENGTH)
    depth = 6 * config.num_hidden_layers + 1
    return 4 * depth * math.sqrt(k) * torch.finfo(torch.float32).eps * float(logits.abs().max())


SHAPES = [(9, 3, 64, 72), (4, 1, 80, 100), (5, 5, 96, 65), (7, 7, 128, 133), (3, 1, 26, 576)]


@pytest.mark.parametrize("shape", SHAPES)
def test_logits(shape):
    """Odd numbers of heads, padded heads and rows, blocks of positions that threads share."""
    model = llama(*shape, bias=shape[0] == 4)
    assert CompiledDecoder.serves(model)
    ids = torch.randint(203, (LENGTH,), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = model(ids[None]).logits[0]
    for threads in (1, 2, 3):
        runner = runner_with(threads, model)
        # Every sequence but the first meets the stale values of the one before.
        for pieces in ((LENGTH,), (63, 1, 1, 64, 1, 20), (1,) * LENGTH):
            runner.reset()
            for piece in ids.split(pieces):
                got = runner.forward(piece)
                error = (got - expected[runner.position - 1]).abs().max()
                assert error < bound(model, expected), (threads, pieces, runner.position)


def test_stale_values_do_not_return():
    """A sequence after one whose keys and values were all NaN gives what a new runner gives."""
    model = llama(9, 3, 64, 72)
    ids = torch.arange(70)
    runner, fresh = LlamaRunner(model, LENGTH), LlamaRunner(model, LENGTH)
    embedding = model.model.embed_tokens.weight.data
    saved = embedding[202].clone()
    embedding[202] = math.nan
    assert runner.forward(torch.full((LENGTH,), 202)).isnan().all()
    embedding[202] = saved
    for piece in ids.split([33, 1, 36]):
        runner.position = fresh.position
        assert torch.equal(runner.forward(piece), fresh.forward(piece))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(9, 3, 64, 72), (4, 1, 80, 100)])
def test_low_precision(dtype, shape):
    """As near to the fp32 model of the same weights as transformers' forward in that dtype."""
    model = llama(*shape, dtype=dtype)
    ids = torch.randint(203, (LENGTH,), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        own = model(ids[None]).logits[0].float()
        runner = LlamaRunner(model, LENGTH)
        ones = torch.stack([runner.forward(t[None]).float() for t in ids])
        runner.reset()
        runner.forward(ids[:-1])
        whole = runner.forward(ids[-1:]).float().clone()
        exact = model.float()(ids[None]).logits[0]
    error = (own - exact).norm()
    assert (ones - exact).norm() < 1.25 * error
    assert (whole - exact[-1]).norm() < 2 * (own[-1] - exact[-1]).norm()


@pytest.mark.parametrize("format", ["int8", "nf4", "int3_g64", "kmeans4"])
def test_formats_and_what_stays_in_torch(format):
    """The same logits as the torch calls, which serve a model as soon as one linear is dense."""
    model = llama(6, 2, 64, 96, format=format)
    ids = torch.arange(40)
    compiled, eager = CompiledDecoder(model, LENGTH), EagerDecoder(model, LENGTH)
    with torch.inference_mode():
        for start, stop in ((0, 30), (30, 31), (31, 40)):
            got = compiled.forward(ids[start:stop], start)
            expected = eager.forward(ids[start:stop], start)
            assert (got - expected).abs().max() < bound(model, expected)
    assert compiled.likeliest() == int(compiled.forward(ids[31:40], 31).argmax())
    up = model.model.layers[1].mlp.up_proj
    assert isinstance(up, QuantLinear)
    dense = torch.nn.Linear(up.in_features, up.out_features, bias=False)
    dense.weight.data = up.quant_tensor().dequantize()
    model.model.layers[1].mlp.up_proj = dense
    assert not CompiledDecoder.serves(model)
    runner = LlamaRunner(model, LENGTH)
    assert (runner.forward(ids) - expected).abs().max() < bound(model, expected)


def test_bad_tokens():
    runner = LlamaRunner(llama(4, 2, 32, 64), 8)
    with pytest.raises(IndexError, match=r"ids must be in \[0, 203\), got 203"):
        runner.forward(torch.tensor([0, 203]))
    with pytest.raises(IndexError, match="got -1"):
        runner.forward(torch.tensor([-1]))
    with pytest.raises(TypeError, match="ids must be int64 on the CPU, got torch.int32"):
        runner.forward(torch.tensor([1], dtype=torch.int32))
    assert runner.position == 0


def test_likeliest_is_the_first_of_equals():
    model = llama(4, 2, 32, 64, dtype=torch.bfloat16)
    model.lm_head.weight.data[:] = model.lm_head.weight.data[5]
    decoder = CompiledDecoder(model, 8)
    decoder.forward(torch.tensor([3]), 0)
    assert decoder.likeliest() == 0
