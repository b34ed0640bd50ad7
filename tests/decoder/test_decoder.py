"""The compiled decoder against transformers' own forward on the same packed modules, for shapes that no GGUF has."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("transformers")

from transformers import LlamaConfig, LlamaForCausalLM

import lowbit
from lowbit import _C
from lowbit.decoder.compiled import CompiledDecoder
from lowbit.decoder.eager import EagerDecoder
from lowbit.decoder.runner import Runner
from lowbit.formats import parse
from lowbit.nn import BinaryLinear, LLMInt8Linear, QuantLinear

LENGTH = 150  # more than two blocks of 64 positions


def llama(
    heads,
    kv_heads,
    dim,
    hidden,
    dtype=torch.float32,
    format="int4_g32",
    bias=False,
    vocab=203,
    length=LENGTH,
):
    """A model of random weights with packed layers; its embedding and head are dense."""
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=hidden + 37,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=dim,
        max_position_embeddings=length + 10,
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
    runner = Runner(model, LENGTH)
    torch.set_num_threads(1)
    return runner


def bound(model, logits, length=LENGTH):
    """sqrt(K) eps for each of the sums behind a logit, of K terms in another order; 4 for the tails."""
    config = model.config
    k = max(config.hidden_size, config.intermediate_size, length)
    depth = 6 * config.num_hidden_layers + 1
    return 4 * depth * math.sqrt(k) * torch.finfo(torch.float32).eps * float(logits.abs().max())


# Of 18 numbers a head, the values of the last positions would lie in the next layer's if they were not padded.
SHAPES = [(9, 3, 64, 72), (4, 1, 80, 100), (5, 5, 96, 65), (7, 7, 128, 133), (3, 1, 18, 576)]


@pytest.mark.parametrize("shape", SHAPES)
def test_logits(shape):
    """Odd numbers of heads, padded heads and rows, blocks of positions that threads share."""
    model = llama(*shape, bias=shape[0] == 4)
    assert CompiledDecoder.obstacle(model) is None
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
    runner, fresh = Runner(model, LENGTH), Runner(model, LENGTH)
    embedding = model.model.embed_tokens.weight.data
    saved = embedding[202].clone()
    embedding[202] = math.nan
    assert runner.forward(torch.full((LENGTH,), 202)).isnan().all()
    embedding[202] = saved
    for piece in ids.split([33, 1, 36]):
        runner.position = fresh.position
        assert torch.equal(runner.forward(piece), fresh.forward(piece))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("rest", [1, 40])
def test_prompts_in_several_passes(rest, threads):
    """At most 512 tokens go through the layers together. Positions that were left out would give NaN."""
    length = 512 + rest
    model = llama(4, 2, 32, 64, length=length)
    ids = torch.randint(202, (length,), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = model(ids[None]).logits[0, -1]
    torch.set_num_threads(threads)
    decoder = CompiledDecoder(model, length)
    embedding = model.model.embed_tokens.weight.data
    saved = embedding[202].clone()
    embedding[202] = math.nan
    for position in range(length):
        decoder.forward(torch.tensor([202]), position)
    embedding[202] = saved
    error = (decoder.forward(ids, 0) - expected).abs().max()
    assert error < bound(model, expected, length)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(9, 3, 64, 72), (4, 1, 80, 100)])
def test_low_precision(dtype, shape):
    """As near to the fp32 model of the same weights as transformers' forward in that dtype."""
    model = llama(*shape, dtype=dtype)
    ids = torch.randint(203, (LENGTH,), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        own = model(ids[None]).logits[0].float()
        runner = Runner(model, LENGTH)
        ones = torch.stack([runner.forward(t[None]).float() for t in ids])
        runner.reset()
        runner.forward(ids[:-1])
        whole = runner.forward(ids[-1:]).float().clone()
        exact = model.to(torch.float32)(ids[None]).logits[0]
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
    assert "up_proj of layer 1 is a Linear" in CompiledDecoder.obstacle(model)
    runner = Runner(model, LENGTH)
    assert (runner.forward(ids) - expected).abs().max() < bound(model, expected)


def test_bad_tokens():
    runner = Runner(llama(4, 2, 32, 64), 8)
    with pytest.raises(IndexError, match=r"ids must be in \[0, 203\), got 203"):
        runner.forward(torch.tensor([0, 203]))
    with pytest.raises(IndexError, match="got -1"):
        runner.forward(torch.tensor([-1]))
    with pytest.raises(TypeError, match="ids must be int64 on the CPU, got torch.int32"):
        runner.forward(torch.tensor([1], dtype=torch.int32))
    assert runner.position == 0


@pytest.mark.parametrize("vocab", [203, 1100])
def test_likeliest_is_the_first_of_equals(vocab):
    model = llama(4, 2, 32, 64, dtype=torch.bfloat16, vocab=vocab)
    model.lm_head.weight.data[:] = model.lm_head.weight.data[5]
    decoder = CompiledDecoder(model, 8)
    decoder.forward(torch.tensor([3]), 0)
    assert decoder.likeliest() == 0


def test_likeliest_of_more_than_a_block():
    """Logits are searched 512 at a time."""
    decoder = CompiledDecoder(llama(4, 2, 32, 64, vocab=1100), 8)
    logits = decoder.forward(torch.tensor([3]), 0)
    for first, second in ((0, 1099), (511, 512), (513, 600), (600, 1024)):
        logits.fill_(-1)
        logits[[first, second]] = 2
        assert decoder.likeliest() == first
    logits.fill_(-torch.inf)
    assert decoder.likeliest() == 0


def logits_of(model, ids):
    """The logits after each piece of the tokens, by both decoders: prompts and single tokens."""
    found = []
    for kind in (CompiledDecoder, EagerDecoder):
        decoder, position, rows = kind(model, LENGTH), 0, []
        with torch.inference_mode():
            for piece in ids.split([30, 1, 1, 60, 1]):
                rows.append(decoder.forward(piece, position).float().clone())
                position += len(piece)
        found.append(torch.stack(rows))
    return found


def linears_of(model):
    return [m for m in model.model.layers.modules() if isinstance(m, QuantLinear)]


INT8 = {
    "int4_g32_a8": "int4_g32",
    "int8_row_a8": "int8_row",
    "uint4_g32_a8": "uint4_g32",
    "nf4_a8t": "nf4",
    "kmeans4_a8t": "kmeans4",
    "int4_g20_a8": "int4_g20",
    "int4_g32_a8b32": "int4_g32",
    "uint4_g32_a8b64": "uint4_g32",
    "int8_row_a8b16": "int8_row",
}


@pytest.mark.parametrize("format", INT8)
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_int8_activations(format, static):
    """Where a sum in another order rounds a code of x up or down, a result moves by a step of x: the decoders differ
    less than either does from the model without int8 activations, which is off by half such a step in every element.
    """
    model = llama(6, 2, 64, 96, format=format)
    if static:
        for linear in linears_of(model):
            linear.set_input_scale(0.05)
    ids = torch.randint(203, (93,), generator=torch.Generator().manual_seed(1))
    assert CompiledDecoder.obstacle(model) is None
    _C.take_kernels_run()
    compiled, eager = logits_of(model, ids)
    assert all("_i8_" in name for name in _C.take_kernels_run())
    plain = logits_of(llama(6, 2, 64, 96, format=INT8[format]), ids)[0]
    assert (compiled - eager).norm() < 0.5 * (compiled - plain).norm()


def coarse(part, format, dtype):
    """One layer of which every step before the last norm is exact or rounds as transformers' does, so that int8 codes
    are the same, and of which "mlp" or "attention" does nothing. One feature of x, which meets weights of zero, is far
    above the others: these have few steps left.

    Of the norms: x is +-2 in every element and eps is 0. Of silu: it is 20 of 20. Of attention: one token attends to
    itself.
    """
    torch.manual_seed(3)
    model = llama(4, 2, 32, 64, dtype=torch.float32, format="int8", bias=True)
    del model.model.layers[1:]
    model.config.num_hidden_layers = 1
    model.config.rms_norm_eps = 0.0
    layer = model.model.layers[0]
    model.model.embed_tokens.weight.data = torch.randint(2, (203, 64)).mul(4.0) - 2
    norms = (layer.input_layernorm, layer.post_attention_layernorm, model.model.norm)
    for norm in norms:
        norm.variance_epsilon = 0.0
        norm.weight.data.fill_(1)
    for block in (layer.self_attn, layer.mlp):
        for name, packed in list(block.named_children()):
            if not isinstance(packed, QuantLinear):
                continue
            dense = torch.nn.Linear(packed.in_features, packed.out_features).requires_grad_(False)
            if name == "gate_proj":
                dense.weight.zero_()
                dense.bias.fill_(20)
            if name in ("up_proj", "v_proj"):
                dense.bias[0] = 300
            if name == "o_proj":
                dense.weight[:, [0, 32]] = 0  # two heads share the keys and values of the first
            if name == "down_proj":
                dense.weight[:, 0] = 0
            if (name, part) in (("o_proj", "mlp"), ("down_proj", "attention")):
                dense.weight.zero_()
                dense.bias.zero_()
            block._modules[name] = QuantLinear.from_linear(dense, format)
    return model.to(dtype)


@pytest.mark.parametrize(
    ("format", "dtype"),
    [
        *((format, torch.float32) for format in INT8),
        *(
            (f, t)
            for f in ("uint4_g32_a8", "nf4_a8t", "uint4_g32_a8b64")
            for t in (torch.bfloat16, torch.float16)
        ),
    ],
)
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("part", ["mlp", "attention"])
def test_int8_products_are_those_of_the_modules(part, format, static, dtype):
    """Transformers' own forward of the modules is the oracle, for prompts and single tokens."""
    model, other = (coarse(part, f, dtype) for f in (format, INT8[format]))
    if static:
        # Linears of one input have scales of their own: 2 becomes 2.1 for v and up, and stays 2 for q, k and gate.
        scales = {"o_proj": 40.0, "down_proj": 40.0, "v_proj": 0.3, "up_proj": 0.3}
        for name, linear in model.model.layers.named_modules():
            if isinstance(linear, QuantLinear):
                linear.set_input_scale(scales.get(name.rpartition(".")[2], 0.5))
    ids = torch.arange(1 if part == "attention" else 5)
    decoder = CompiledDecoder(model, 8)
    with torch.inference_mode():
        expected = model(ids[None]).logits[0].float()
        without = CompiledDecoder(other, 8).forward(ids, 0).float().clone()
        whole = decoder.forward(ids, 0).float().clone()
        ones = [decoder.forward(ids[i : i + 1], i).float().clone() for i in range(len(ids))]
    eps, size = torch.finfo(dtype).eps, expected.abs().max()
    # Of blocks, only that of the large feature has few steps.
    least = 0.1 if parse(format).activation_group is None else 0.03
    assert (whole - without).norm() > least * without.norm()
    assert (whole - expected[-1]).abs().max() < 8 * eps * size
    assert (torch.stack(ones) - expected).abs().max() < 8 * eps * size


@pytest.mark.parametrize("kind", ["binary", "llm_int8", "outliers", "subclass"])
def test_what_the_compiled_decoder_cannot_do_runs_in_torch(kind, caplog):
    """Layers that do more than a packed product: torch decodes, says why, and gives what the modules give."""
    model = llama(6, 2, 64, 96, format="int4_g32_o2" if kind == "outliers" else "int8_row_a8")
    mlp = model.model.layers[1].mlp
    dense = torch.nn.Linear(96, 133, bias=False).requires_grad_(False)
    if kind == "binary":
        mlp.up_proj = BinaryLinear.from_linear(dense, "binary")
    elif kind == "llm_int8":
        mlp.up_proj = LLMInt8Linear.from_linear(dense, threshold=1.5)
    elif kind == "subclass":

        class Doubled(QuantLinear):
            def forward(self, x):
                return 2 * super().forward(x)

        mlp.up_proj = Doubled.from_linear(dense, "int8_row")
    ids = torch.arange(40)
    with caplog.at_level("INFO", logger="lowbit"):
        runner = Runner(model, LENGTH)
    why = "has outliers" if kind == "outliers" else "is a"
    assert "torch decodes the model" in caplog.text
    assert why in caplog.text
    with torch.inference_mode():
        expected = model(ids[None]).logits[0]
    runner.forward(ids[:39])
    error = (runner.forward(ids[39:]) - expected[-1]).norm()
    # int8 and signs of x may round another way, see above.
    assert error < 0.05 * expected[-1].norm()


@pytest.mark.parametrize("kind", ["compiled", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_logits_that_are_nan_are_no_token(kind, dtype):
    model = llama(4, 2, 32, 64, dtype=dtype)
    if kind == "eager":
        model.model.layers[0].mlp.up_proj = torch.nn.Linear(64, 101, bias=False).to(dtype)
    runner = Runner(model, 20)
    assert type(runner._decoder).__name__ == (
        "EagerDecoder" if kind == "eager" else "CompiledDecoder"
    )
    for token in runner.generate(torch.arange(5), 3):
        assert 0 <= token < 203
    model.lm_head.weight.data[7] = torch.nan  # one of them, then all
    runner.reset()
    with pytest.raises(ValueError, match="the logits are NaN"):
        next(runner.generate(torch.arange(5), 3))
    model.model.embed_tokens.weight.data.fill_(torch.nan)
    runner.reset()
    with pytest.raises(ValueError, match="the logits are NaN"):
        next(runner.generate(torch.arange(5), 3))


def test_infinite_logits_are_a_token():
    model = llama(4, 2, 32, 64)
    decoder = CompiledDecoder(model, 8)
    logits = decoder.forward(torch.tensor([3]), 0)
    logits[11] = torch.inf
    assert decoder.likeliest() == 11
    logits.fill_(-torch.inf)
    assert decoder.likeliest() == 0
