"""Models from GGUF files: the weights, logits and tokens of transformers' own dense model."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

gguf = pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from gguf import GGMLQuantizationType as GGMLType  # noqa: E402
from transformers import LlamaForCausalLM  # noqa: E402

import lowbit  # noqa: E402
from gguf_files import Llama, llama_fields, llama_tensors, write, write_llama  # noqa: E402
from lowbit.cli.run import default_model  # noqa: E402
from lowbit.decoder.runner import Runner  # noqa: E402
from lowbit.integrations.gguf_configs import config_of  # noqa: E402
from lowbit.integrations.transformers import load_gguf, load_tokenizer, packed_modules  # noqa: E402
from lowbit.io.readers.gguf import GGUFFile  # noqa: E402
from lowbit.nn import QuantEmbedding, QuantLinear  # noqa: E402

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PROMPTS = (
    "What is gravity?",
    "Write a short poem about the sea.",
    "List three uses of a paper clip.",
    "Explain why the sky is blue to a child.",
    "Translate 'good morning' into French.",
)


def dense_model(path, dtype=torch.float32) -> LlamaForCausalLM:
    """transformers' own loader; nothing but dense tensors of `dtype`."""
    model = LlamaForCausalLM.from_pretrained(str(path.parent), gguf_file=path.name, dtype=dtype)
    assert type(model.model.layers[0].mlp.up_proj) is torch.nn.Linear
    assert {p.dtype for p in model.parameters()} == {dtype}
    return model.eval()


def tolerance(model: LlamaForCausalLM, logits: torch.Tensor) -> float:
    """fp32 sums of K terms in another order differ by about sqrt(K) eps of their size.

    A logit lies behind four sums per layer and one in the head, and the factor 4 is for the tails
    of many logits.
    """
    config = model.config
    k = max(config.hidden_size, config.intermediate_size)
    depth = 4 * config.num_hidden_layers + 1
    return 4 * depth * math.sqrt(k) * torch.finfo(torch.float32).eps * float(logits.abs().max())


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """(path, packed model, transformers' dense model, tokens) of a tiny llama, fp32."""
    path = write_llama(tmp_path_factory.mktemp("tiny") / "tiny.gguf")
    tokens = load_tokenizer(path)("the cat sat on the mat. é", return_tensors="pt")["input_ids"][0]
    return path, load_gguf(path, dtype=torch.float32), dense_model(path), tokens


@pytest.mark.parametrize("tied", [True, False])
def test_weights_are_those_of_transformers(tmp_path, tied):
    path = write_llama(tmp_path / "a.gguf", Llama(tied=tied, heads=6, kv_heads=2, hidden=192))
    model, oracle = load_gguf(path, dtype=torch.float32), dense_model(path)
    packed = dict(packed_modules(model))
    assert not any(type(m) in (torch.nn.Linear, torch.nn.Embedding) for m in model.modules())
    assert len(packed) == 2 * len(LINEARS) + 2
    for name, module in packed.items():
        expected = oracle.get_submodule(name).weight
        assert torch.equal(module.quant_tensor().dequantize(), expected), name
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, oracle.get_parameter(name)), name
    assert torch.equal(model.model.rotary_emb.inv_freq, oracle.model.rotary_emb.inv_freq)


def test_blocks_stay_as_stored(tiny):
    path, model, _, _ = tiny
    file = GGUFFile(path)
    up = model.model.layers[1].mlp.up_proj.quant_tensor()
    stored = file["blk.1.ffn_up.weight"]
    assert up.format == stored.format
    assert all(torch.equal(up.tensors[name], t) for name, t in stored.tensors.items())
    embedding = model.model.embed_tokens.quant_tensor()
    assert embedding.format.name == "q8_0"


def test_tied_head_shares_the_embedding(tiny):
    model = tiny[1]
    storages = [
        {t.untyped_storage().data_ptr() for t in module.buffers() if t.numel() > 1000}
        for module in (model.lm_head, model.model.embed_tokens)
    ]
    assert storages[0]
    assert storages[0] == storages[1]


def test_logits(tiny):
    _, model, oracle, tokens = tiny
    with torch.inference_mode():
        got, expected = model(tokens[None]).logits, oracle(tokens[None]).logits
    assert (got - expected).abs().max() < tolerance(oracle, expected)


def test_generate(tiny):
    _, model, oracle, tokens = tiny
    arguments = {"attention_mask": torch.ones_like(tokens[None]), "max_new_tokens": 16}
    got, expected = (
        m.generate(tokens[None], do_sample=False, **arguments) for m in (model, oracle)
    )
    assert torch.equal(got, expected)


def test_tokenizer_is_that_of_transformers(tiny):
    path = tiny[0]
    oracle = transformers.AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    tokenizer = load_tokenizer(path)
    text = "<|im_start|>the other\nthing<|im_end|>"
    assert tokenizer(text)["input_ids"] == oracle(text)["input_ids"]
    assert tokenizer.chat_template == oracle.chat_template
    assert tokenizer.eos_token_id == oracle.eos_token_id == 2


@pytest.mark.parametrize("name", ["nf4", "int3_g64"])
def test_requantize(tiny, name):
    path, stored, _, _ = tiny
    model = load_gguf(path, dtype=torch.float32, format=name)
    for module_name, module in packed_modules(model):
        original = stored.get_submodule(module_name).quant_tensor()
        if module_name.endswith(LINEARS):
            original = lowbit.quantize(original.dequantize(), name)
        got = module.quant_tensor()
        assert got.format == original.format
        assert all(torch.equal(got.tensors[k], t) for k, t in original.tensors.items())


def test_dense_file(tmp_path):
    """What a file holds dense stays dense, tied head included, and can be quantized."""
    spec = Llama(kind=GGMLType.F16, embedding_kind=GGMLType.F32)
    path = write_llama(tmp_path / "a.gguf", spec)
    model, oracle = load_gguf(path, dtype=torch.float32), dense_model(path)
    assert not list(packed_modules(model))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, oracle.get_parameter(name)), name
    packed = dict(packed_modules(load_gguf(path, format="int8")))
    assert len(packed) == 2 * len(LINEARS)
    assert not any(isinstance(m, QuantEmbedding) for m in packed.values())


def test_biases(tmp_path):
    """transformers' loader drops biases, so the oracle is llama.cpp's permutation, written out."""
    spec = Llama(bias=True)
    path = write_llama(tmp_path / "a.gguf", spec)
    model = load_gguf(path, dtype=torch.float32)
    stored = llama_tensors(spec)
    attention = model.model.layers[1].self_attn
    for name, key in (("q_proj", "attn_q"), ("k_proj", "attn_k")):
        bias = stored[f"blk.1.{key}.bias"][0]
        half = spec.head_dim // 2
        expected = [
            bias[head * spec.head_dim + 2 * j + side]
            for head in range(len(bias) // spec.head_dim)
            for side in range(2)
            for j in range(half)
        ]
        assert getattr(attention, name).bias.tolist() == [float(b) for b in expected]
    assert attention.o_proj.bias.tolist() == stored["blk.1.attn_output.bias"][0].tolist()


def test_keys_that_files_may_leave_out(tmp_path):
    """llama.cpp's defaults: as many key heads as heads, rope theta 10000."""
    spec = Llama(heads=4, kv_heads=4)
    whole = write_llama(tmp_path / "whole.gguf", spec)
    optional = {"llama.attention.head_count_kv": None, "llama.rope.freq_base": None}
    optional["llama.rope.dimension_count"] = None
    bare = write_llama(tmp_path / "bare.gguf", spec, **optional)
    stated, defaults = (config_of(GGUFFile(path)) for path in (whole, bare))
    assert defaults.num_key_value_heads == stated.num_key_value_heads == 4
    assert defaults.rope_parameters["rope_theta"] == stated.rope_parameters["rope_theta"] == 1e4
    assert defaults.head_dim == stated.head_dim
    tokens = torch.arange(12)[None]
    with torch.inference_mode():
        a, b = (load_gguf(path, dtype=torch.float32)(tokens).logits for path in (whole, bare))
    assert torch.equal(a, b)


def broken_files():
    fields, tensors = llama_fields(Llama()), llama_tensors(Llama())
    f32 = np.ones((2, 96), np.float32)

    def tensor(name, value):
        changed = {k: v for k, v in tensors.items() if k != name}
        return changed if value is None else {**changed, name: value}

    def field(**changes):
        new = {**fields, **{k.replace("__", "."): v for k, v in changes.items()}}
        return {k: v for k, v in new.items() if v is not None}

    missing = "'blk.1.ffn_up.weight' is missing"
    return {
        "arch": (tensors, field(arch="mamba"), NotImplementedError, "architecture 'mamba'"),
        "no_key": (tensors, field(llama__context_length=None), ValueError, "context_length"),
        "zero": (tensors, field(llama__attention__head_count=0), ValueError, r"in \(0, .* got 0"),
        "type": (tensors, field(llama__block_count="2"), ValueError, "must be int, got '2'"),
        "layers": (tensors, field(llama__block_count=2**31), ValueError, "got 2147483648"),
        "uneven": (tensors, field(llama__attention__head_count_kv=2), ValueError, "3 heads cannot"),
        "eos": (tensors, field(tokenizer__ggml__eos_token_id=2**31), ValueError, r"\[0, 320\)"),
        "scaling": (
            tensors, field(llama__rope__scaling__type="yarn"), NotImplementedError, "'yarn'"
        ),
        "partial": (
            tensors, field(llama__rope__dimension_count=16), NotImplementedError, "16 of 32"
        ),
        "no_tensor": (tensor("blk.1.ffn_up.weight", None), fields, ValueError, missing),
        "no_embedding": (tensor("token_embd.weight", None), fields, ValueError, "token_embd"),
        "shape": (
            tensor("blk.0.attn_k.weight", (f32, None)), fields, ValueError,
            r"\(32, 96\), got \(2, 96\)",
        ),
        "unknown": (
            tensor("blk.0.attn_rot_embd.weight", (f32[0], None)), fields, NotImplementedError,
            r"no tensors 'blk\.0\.attn_rot_embd\.weight'",
        ),
        "packed_norm": (
            tensor("output_norm.weight", (np.zeros(102, np.uint8), GGMLType.Q8_0)), fields,
            NotImplementedError, "two dimensions",
        ),
    }  # fmt: skip


@pytest.mark.parametrize("case", broken_files())
def test_broken_files(tmp_path, case):
    tensors, fields, error, message = broken_files()[case]
    path = write(tmp_path / "bad.gguf", tensors, **fields)
    with pytest.raises(error, match=message) as e:
        load_gguf(path)
    assert "bad.gguf" in str(e.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer.ggml.tokens": None}, r"'tokenizer\.ggml\.tokens' is missing"),
        ({"tokenizer.ggml.model": None}, r"'tokenizer\.ggml\.model' is missing"),
        ({"tokenizer.ggml.tokens": [1, 2]}, "must be list, got array"),
        ({"tokenizer.ggml.eos_token_id": 320}, r"eos_token_id must be in \[0, 320\), got 320"),
    ],
)
def test_broken_tokenizers(tmp_path, changes, message):
    path = write_llama(tmp_path / "bad.gguf", **changes)
    with pytest.raises(ValueError, match=message):
        load_tokenizer(path)


def test_bad_arguments(tiny):
    path, model, _, tokens = tiny
    with pytest.raises(ValueError, match=r"dtype must be.*torch\.int8"):
        load_gguf(path, dtype=torch.int8)
    with pytest.raises(ValueError, match="unknown format 'nf5'"):
        load_gguf(path, format="nf5")
    with pytest.raises(
        TypeError, match="model must be a causal language model of transformers, got Linear"
    ):
        Runner(torch.nn.Linear(1, 1), 8)
    with pytest.raises(ValueError, match=r"max_length must be in \[1, 128\], got 129"):
        Runner(model, 129)
    runner = Runner(model, 8)
    with pytest.raises(ValueError, match=r"1 to 8 tokens.*got shape \(9,\)"):
        runner.forward(tokens[:9])
    with pytest.raises(ValueError, match=r"got shape \(1, 2\)"):
        runner.forward(tokens[None, :2])


RUNNER_MODELS = {
    "packed": (Llama(), {}),
    "biases": (Llama(bias=True), {}),
    "one_head_per_key": (Llama(heads=3, kv_heads=3), {}),
    "dense": (Llama(kind=GGMLType.F16, embedding_kind=GGMLType.F32, bias=True), {}),
    "requantized": (Llama(tied=False), {"format": "nf4"}),
}


@pytest.mark.parametrize("case", RUNNER_MODELS)
@pytest.mark.parametrize(
    "pieces", [(24,), (1,) * 24, (7, 1, 1, 10, 5)], ids=["whole", "ones", "mixed"]
)
def test_runner_equals_the_models_forward(tmp_path, case, pieces):
    """However a sequence is cut into calls, the logits are those of the model on all of it."""
    spec, arguments = RUNNER_MODELS[case]
    path = write_llama(tmp_path / "a.gguf", spec)
    model = load_gguf(path, dtype=torch.float32, **arguments)
    tokens = torch.randint(spec.vocab, (24,), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = model(tokens[None]).logits[0]
    runner = Runner(model, 24)
    for _ in range(2):
        runner.reset()
        for piece in tokens.split(pieces):
            got = runner.forward(piece)
            bound = tolerance(model, expected)
            assert (got - expected[runner.position - 1]).abs().max() < bound
    assert runner.position == 24


def test_runner_generates_the_models_tokens(tiny):
    _, model, oracle, tokens = tiny
    expected = oracle.generate(
        tokens[None],
        attention_mask=torch.ones_like(tokens[None]),
        max_new_tokens=40,
        do_sample=False,
    )[0, len(tokens) :].tolist()
    runner = Runner(model, 64)
    assert list(runner.generate(tokens, 40, frozenset([2]))) == expected
    runner.reset()
    stop = expected[3]
    assert (
        list(runner.generate(tokens, 40, frozenset([stop]))) == expected[: expected.index(stop) + 1]
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_activations(tiny, dtype):
    """Packed linears round no more often than dense ones of that dtype: no farther from fp32."""
    path, _, oracle, tokens = tiny
    model, dense = load_gguf(path, dtype=dtype), dense_model(path, dtype)
    with torch.inference_mode():
        exact = oracle(tokens[None]).logits[0]
        error = (dense(tokens[None]).logits[0] - exact).norm()
        assert (model(tokens[None]).logits[0] - exact).norm() < 1.25 * error
        runner = Runner(model, len(tokens))
        rows = torch.stack([runner.forward(t[None]).clone() for t in tokens])
    assert (rows - exact).norm() < 1.25 * error


@pytest.fixture
def one_thread():
    """Two threads on cores that others use wait for each other at every operator."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
def test_the_real_model_gives_transformers_tokens(capsys):
    """SmolLM2-135M-Instruct, fp32: greedy tokens of five prompts; prints the largest difference."""
    try:
        path = default_model()
    except FileNotFoundError as e:
        pytest.skip(str(e))
    tokenizer, model, oracle = (
        load_tokenizer(path),
        load_gguf(path, dtype=torch.float32),
        dense_model(path),
    )
    assert sum(isinstance(m, QuantLinear) for _, m in packed_modules(model)) == 211
    runner = Runner(model, 256)
    worst = 0.0
    for prompt in PROMPTS:
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            add_generation_prompt=True, return_tensors="pt", return_dict=True,
        )["input_ids"]  # fmt: skip
        out = oracle.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=64, do_sample=False,
            output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
        expected = out.sequences[0, ids.shape[1] :].tolist()
        runner.reset()
        feed = ids[0]
        got = []
        for reference in out.logits:
            logits = runner.forward(feed)
            worst = max(worst, float((logits - reference[0]).abs().max()))
            feed = logits.argmax(keepdim=True)
            got.append(int(feed))
        assert got == expected, prompt
    with capsys.disabled():
        print(f"\nlargest logit difference over {len(PROMPTS)} prompts: {worst:.2e}")
    assert worst < tolerance(oracle, torch.stack(out.logits))
