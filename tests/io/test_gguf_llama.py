"""What a llama's GGUF file says beside its weights: rotary embeddings, biases, head counts, odd
vocabularies, parts. Expected are transformers' own model of the same weights, and llama.cpp's
definitions written out.
"""

from __future__ import annotations

import resource
import struct

import numpy as np
import pytest
import torch

gguf = pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from gguf import GGMLQuantizationType as GGMLType  # noqa: E402
from test_transformers import dense_model, tolerance  # noqa: E402

import lowbit  # noqa: E402
from gguf_files import (  # noqa: E402
    Llama,
    llama_fields,
    llama_tensors,
    random_blocks,
    raw_file,
    string,
    tensor_entry,
    write,
    write_llama,
)
from lowbit.cli import baseline  # noqa: E402
from lowbit.decoder.runner import Runner  # noqa: E402
from lowbit.integrations import gguf_models  # noqa: E402
from lowbit.integrations.transformers import load_gguf, load_tokenizer, packed_modules  # noqa: E402
from lowbit.io.readers.gguf import GGUFFile  # noqa: E402

SPEC = Llama()
TOKENS = torch.arange(40) * 7 % SPEC.vocab
FREQUENCIES = 10000.0 ** (-2 * torch.arange(SPEC.head_dim // 2).double() / SPEC.head_dim)


def changed(path, tensors=None, spec=SPEC, **fields):
    """The file of `spec` with more or other tensors; a field of None is left out."""
    kept = {k: v for k, v in {**llama_fields(spec), **fields}.items() if v is not None}
    return write(path, {**llama_tensors(spec), **(tensors or {})}, **kept)


def assert_same_logits(model, oracle, tokens=TOKENS):
    """Of the module and of the runner, token by token."""
    with torch.inference_mode():
        expected = oracle(tokens[None]).logits[0]
        got = model(tokens[None]).logits[0]
    bound = tolerance(oracle, expected)
    assert (got - expected).abs().max() < bound
    runner = Runner(model, len(tokens))
    rows = torch.stack([runner.forward(t[None]).clone() for t in tokens])
    assert (rows - expected).abs().max() < bound


def with_frequencies(oracle, frequencies):
    oracle.model.rotary_emb.inv_freq = frequencies.float()
    return oracle


FACTORS = {
    "growing": np.linspace(1, 8, SPEC.head_dim // 2, dtype=np.float32),
    "llama 3": np.array([1] * 10 + [2.5, 5] + [8] * 4, np.float32),
    "ones": np.ones(SPEC.head_dim // 2, np.float32),
}


@pytest.mark.parametrize("factors", FACTORS.values(), ids=FACTORS)
@pytest.mark.parametrize("kind", [GGMLType.Q4_1, GGMLType.F16], ids=["compiled", "eager"])
def test_frequencies_are_divided_by_the_files_factors(tmp_path, factors, kind):
    """llama.cpp: theta_i / freq_factors[i]. transformers' reader drops the factors."""
    spec = Llama(kind=kind)
    path = changed(tmp_path / "a.gguf", {"rope_freqs.weight": (factors, None)}, spec)
    model = load_gguf(path, dtype=torch.float32)
    expected = FREQUENCIES / torch.from_numpy(factors).double()
    torch.testing.assert_close(
        model.model.rotary_emb.inv_freq.double(), expected, rtol=1e-6, atol=0
    )
    oracle = dense_model(path)
    if factors.max() > 1:
        with torch.inference_mode():
            without = oracle(TOKENS[None]).logits[0]
            difference = (model(TOKENS[None]).logits[0] - without).abs().max()
        assert difference > 100 * tolerance(oracle, without)
    assert_same_logits(model, with_frequencies(oracle, expected))
    # The configuration says it all.
    rebuilt = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(model.config)
    assert torch.equal(rebuilt.inv_freq, model.model.rotary_emb.inv_freq)
    assert rebuilt.attention_scaling == 1
    lowbit.load_model(path, dtype=torch.float32).save_pretrained(tmp_path / "saved")
    loaded = lowbit.load_model(tmp_path / "saved", dtype=torch.float32)
    with torch.inference_mode():
        assert torch.equal(loaded(TOKENS[None]).logits, model(TOKENS[None]).logits)


ROPES = {
    "linear": ({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0}, 2.0),
    "linear, not said": ({"llama.rope.scaling.factor": 4.0}, 4.0),
    "an old file": ({"llama.rope.scale_linear": 2.0}, 2.0),
    "none": ({"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 2.0}, 1.0),
    "no factor": ({"llama.rope.scaling.type": "linear"}, 1.0),
    "a factor of zero": ({"llama.rope.scaling.factor": 0.0}, 1.0),
    "attention as it is": ({"llama.rope.scaling.attn_factor": 1.0}, 1.0),
}


@pytest.mark.parametrize(("fields", "factor"), ROPES.values(), ids=ROPES)
def test_linear_scaling(tmp_path, fields, factor):
    path = changed(tmp_path / "a.gguf", **fields)
    model = load_gguf(path, dtype=torch.float32)
    oracle = dense_model(changed(tmp_path / "plain.gguf"))
    assert_same_logits(model, with_frequencies(oracle, FREQUENCIES / factor))
    rebuilt = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(model.config)
    assert torch.equal(rebuilt.inv_freq, model.model.rotary_emb.inv_freq)


def test_scaling_and_factors_together(tmp_path):
    factors = FACTORS["growing"]
    path = changed(
        tmp_path / "a.gguf", {"rope_freqs.weight": (factors, None)},
        **{"llama.rope.scaling.factor": 2.0},
    )  # fmt: skip
    got = load_gguf(path).model.rotary_emb.inv_freq.double()
    torch.testing.assert_close(
        got, FREQUENCIES / 2 / torch.from_numpy(factors).double(), rtol=1e-6, atol=0
    )


def compared(path, ids):
    """Runs the dense side, which writes into the folder of the file."""
    threads, out = torch.get_num_threads(), str(path.parent)
    baseline.run(
        baseline.Request(
            str(path), [1, 2], ids, max_new_tokens=2, window=64, threads=threads, out=out
        )
    )


def test_the_dense_side_of_a_comparison_has_the_files_frequencies(tmp_path):
    path = changed(
        tmp_path / "a.gguf", {"rope_freqs.weight": (FACTORS["growing"], None)},
        **{"llama.rope.scaling.factor": 2.0},
    )  # fmt: skip
    compared(path, TOKENS.tolist())
    got = torch.cat(torch.load(tmp_path / baseline.LOGITS)).float()
    oracle = dense_model(path)
    with torch.inference_mode():
        without = oracle(TOKENS[None]).logits[0]
        expected = load_gguf(path, dtype=torch.float32)(TOKENS[None]).logits[0]
    assert (got - expected[: len(got)]).norm() < 0.1 * (got - without[: len(got)]).norm()


@torch.inference_mode()
def test_the_dense_side_has_the_files_biases(tmp_path):
    """transformers' own reader drops them."""
    bias = {f"blk.{i}.attn_q.bias": (np.ones(SPEC.hidden, np.float32), None) for i in range(2)}
    path = changed(tmp_path / "a.gguf", bias)
    compared(path, TOKENS.tolist())
    got = torch.cat(torch.load(tmp_path / baseline.LOGITS)).float()
    expected = load_gguf(path, dtype=torch.float32)(TOKENS[None]).logits[0]
    without = dense_model(path)(TOKENS[None]).logits[0]
    assert (got - expected).norm() < 0.1 * (got - without).norm()


def test_the_base_of_a_file_that_names_none(tmp_path):
    """10,000 in llama.cpp."""
    model = load_gguf(changed(tmp_path / "a.gguf", **{"llama.rope.freq_base": None}))
    torch.testing.assert_close(
        model.model.rotary_emb.inv_freq.double(), FREQUENCIES, rtol=1e-6, atol=0
    )


@pytest.mark.parametrize(
    "names",
    [("attn_q", "attn_k", "attn_v"), ("attn_q",), ("attn_output",), ("ffn_down",), ("ffn_gate", "attn_v")],
    ids=" ".join,
)  # fmt: skip
def test_some_biases(tmp_path, names):
    """Each stands alone in a file; transformers has those of attention or MLP together."""
    rng = np.random.default_rng(0)
    rows = {
        "attn_q": SPEC.hidden, "attn_output": SPEC.hidden, "ffn_down": SPEC.hidden,
        "ffn_gate": SPEC.mlp, "attn_k": SPEC.head_dim, "attn_v": SPEC.head_dim,
    }  # fmt: skip
    biases = {
        f"blk.{i}.{name}.bias": (rng.standard_normal(rows[name]).astype(np.float32), None)
        for i in range(SPEC.layers)
        for name in names
    }
    oracle = dense_model(changed(tmp_path / "plain.gguf"))
    modules = {
        "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_down": "mlp.down_proj",
    }  # fmt: skip
    for stored, (bias, _) in biases.items():
        _, block, name, _ = stored.split(".")
        if name in ("attn_q", "attn_k"):  # halves of a head next to each other
            bias = bias.reshape(-1, SPEC.head_dim // 2, 2).swapaxes(1, 2).flatten()
        linear = oracle.get_submodule(f"model.layers.{block}.{modules[name]}")
        linear.bias = torch.nn.Parameter(torch.from_numpy(bias.copy()))
    model = load_gguf(changed(tmp_path / "a.gguf", biases), dtype=torch.float32)
    assert_same_logits(model, oracle)
    again = transformers.LlamaForCausalLM(model.config)
    assert {n for n, _ in again.named_parameters() if n.endswith("bias")} == {
        n for n, _ in model.named_parameters() if n.endswith("bias")
    }, "the model has what its configuration says"


@pytest.mark.parametrize(
    "key", ["attention.head_count", "attention.head_count_kv", "feed_forward_length"]
)
def test_numbers_for_each_layer(tmp_path, key):
    fields = llama_fields(SPEC)
    number = fields[f"llama.{key}"]
    model = load_gguf(changed(tmp_path / "a.gguf", **{f"llama.{key}": [number] * SPEC.layers}))
    assert model.config.to_dict() == load_gguf(changed(tmp_path / "b.gguf")).config.to_dict()
    for numbers, error, message in (
        ([number, number + 1], NotImplementedError, "differs between layers"),
        ([number] * 3, ValueError, "a number for each of 2 layers, got 3"),
        ([0.5] * 2, ValueError, "must be int, got 0.5"),
        ([0, 0], ValueError, r"must be in \(0"),
    ):
        path = changed(tmp_path / "c.gguf", **{f"llama.{key}": numbers})
        with pytest.raises(error, match=message):
            load_gguf(path)
        path.unlink()


HALF = SPEC.head_dim // 2
REFUSED = {
    "experts": (
        {}, {"llama.expert_count": 8, "llama.expert_used_count": 2}, ValueError,
        "'blk.0.ffn_down_exps.weight' is missing",
    ),
    "an encoder": (
        {}, {"llama.attention.causal": False}, NotImplementedError, "causal False; expected True"
    ),
    "an adapter": ({}, {"general.type": "adapter"}, NotImplementedError, "'adapter'; expected 'model'"),
    "a list of types": ({}, {"general.type": ["a", "b"]}, NotImplementedError, "expected 'model'"),
    "attention scaled": (
        {}, {"llama.rope.scaling.attn_factor": 1.5}, NotImplementedError, "attn_factor 1.5"
    ),
    "values differ": (
        {}, {"llama.attention.value_length": 64}, NotImplementedError, "32 key and 64 value dimensions"
    ),
    "yarn": ({}, {"llama.rope.scaling.type": "yarn"}, NotImplementedError, "rope scaling 'yarn'"),
    "a list of scalings": ({}, {"llama.rope.scaling.type": ["none", "b"]}, ValueError, "must be str"),
    "a negative factor": ({}, {"llama.rope.scaling.factor": -2.0}, ValueError, r"factor' must be in \(0"),
    "factors in a list": ({}, {"llama.rope.scaling.factor": [1.0, 2.0]}, ValueError, "must be float"),
    "too many factors": (
        {"rope_freqs.weight": (np.ones(HALF + 1, np.float32), None)}, {}, ValueError,
        rf"'rope_freqs.weight' must have shape \({HALF},\), got \({HALF + 1},\)",
    ),
    "a factor of zero": (
        {"rope_freqs.weight": (np.zeros(HALF, np.float32), None)}, {}, ValueError,
        "must hold positive numbers",
    ),
    "a factor that is NaN": (
        {"rope_freqs.weight": (np.full(HALF, np.nan, np.float32), None)}, {}, ValueError, "NaN"
    ),
    "a bias of one layer": (
        {"blk.0.attn_q.bias": (np.zeros(96, np.float32), None)}, {}, ValueError,
        "'blk.1.attn_q.bias' is missing",
    ),
    "a bias of another layer": (
        {"blk.1.attn_q.bias": (np.zeros(96, np.float32), None)}, {}, NotImplementedError,
        "no tensors 'blk.1.attn_q.bias'",
    ),
    "heads that do not divide": (
        {}, {"llama.attention.head_count": 5, "llama.attention.head_count_kv": 5,
             "llama.attention.key_length": 32}, ValueError, r"must have shape \(N, 160\)",
    ),
    "enormous": (
        {}, {"llama.attention.key_length": 2**31 - 2, "llama.rope.dimension_count": 2**31 - 2,
             "llama.attention.value_length": 2**31 - 2}, ValueError,
        "must have shape",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_and_why(tmp_path, case):
    tensors, fields, error, message = REFUSED[case]
    with pytest.raises(error, match=message) as e:
        load_gguf(changed(tmp_path / "bad.gguf", tensors, **fields))
    assert "bad.gguf" in str(e.value)


@pytest.mark.parametrize(
    "fields",
    [{"llama.expert_count": 0}, {"general.type": "model"}, {"llama.attention.causal": True}],
)
def test_what_changes_nothing_is_accepted(tmp_path, fields):
    assert len(list(packed_modules(load_gguf(changed(tmp_path / "a.gguf", **fields))))) == 16


def test_no_module_is_made_for_layers_without_tensors(tmp_path, monkeypatch):
    """A table of 100,000 small tensors allows for as many layers."""
    monkeypatch.setattr(gguf_models, "without_weights", lambda *_: pytest.fail("was built"))
    layers = 100_000
    entries = [tensor_entry(b"x%d" % i, (1,), 0) for i in range(layers)]
    entries.append(tensor_entry(b"token_embd.weight", (32, 4), 2))
    entries.append(tensor_entry(b"output_norm.weight", (32,), 0))
    numbers = {
        "block_count": layers, "context_length": 8, "embedding_length": 32,
        "feed_forward_length": 32, "attention.head_count": 1,
    }  # fmt: skip
    fields = [string(b"general.architecture") + struct.pack("<I", 8) + string(b"llama")]
    fields += [string(f"llama.{k}".encode()) + struct.pack("<II", 4, v) for k, v in numbers.items()]
    eps = string(b"llama.attention.layer_norm_rms_epsilon") + struct.pack("<If", 6, 1e-5)
    path = tmp_path / "many.gguf"
    path.write_bytes(
        raw_file(entries, fields=b"".join([*fields, eps]), num_fields=7, data=bytes(128))
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=r"'blk\.0\.attn_output\.weight' is missing"):
        load_gguf(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10


def test_parts_are_one_model(tmp_path):
    whole = changed(tmp_path / "whole.gguf")
    tensors, fields = llama_tensors(SPEC), llama_fields(SPEC)
    names = list(tensors)
    paths = [tmp_path / f"m-{i + 1:05}-of-00002.gguf" for i in range(2)]
    for i, (path, part) in enumerate(zip(paths, (names[:7], names[7:]), strict=True)):
        own = fields if i == 0 else {}
        split = {"split.no": i, "split.count": 2, "split.tensors.count": len(names)}
        write(path, {n: tensors[n] for n in part}, **own, **split)
    oracle = load_gguf(whole, dtype=torch.float32).state_dict()
    for path in paths:
        state = load_gguf(path, dtype=torch.float32).state_dict()
        assert all(
            torch.equal(state[k], t) for k, t in oracle.items() if isinstance(t, torch.Tensor)
        )
        assert (
            load_tokenizer(path)("the cat")["input_ids"]
            == load_tokenizer(whole)("the cat")["input_ids"]
        )
    paths[1].unlink()
    for load in (load_gguf, load_tokenizer):
        with pytest.raises(ValueError, match=r"m-00002-of-00002\.gguf must lie beside it"):
            load(paths[0])


ODD = {
    "a token": lambda data: data.replace(string(b"<unused7>"), string(b"\xf0\x9f\xffused7>")),
    "the name": lambda data: data.replace(string(b"a name"), string(b"a nam\xe9")),
}


@pytest.mark.parametrize("case", ODD)
def test_a_vocabulary_with_bytes_that_are_not_utf8(tmp_path, case):
    whole = changed(tmp_path / "whole.gguf", **{"general.name": "a name"})
    path = tmp_path / "odd.gguf"
    path.write_bytes(ODD[case](whole.read_bytes()))
    assert path.read_bytes() != whole.read_bytes()
    expected, got = (
        (m(whole) for m in (load_gguf, load_tokenizer)),
        (m(path) for m in (load_gguf, load_tokenizer)),
    )
    (model, tokenizer), (odd_model, odd) = expected, got
    assert torch.equal(odd_model.model.norm.weight, model.model.norm.weight)
    assert len(odd) == len(tokenizer)
    text = "<|im_start|>the other\nthing<|im_end|> é"
    assert odd(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert odd.decode(odd(text)["input_ids"]) == text
    assert odd.chat_template == tokenizer.chat_template
    assert odd.eos_token_id == tokenizer.eos_token_id
    if case == "a token":
        number = GGUFFile(path).metadata["tokenizer.ggml.tokens"].index(r"\xf0\x9f\xffused7>")
        assert odd.convert_ids_to_tokens(number) == r"\xf0\x9f\xffused7>"


def test_a_tokenizer_beside_an_array_of_arrays(tmp_path):
    plain = load_tokenizer(changed(tmp_path / "plain.gguf"))
    tokenizer = load_tokenizer(changed(tmp_path / "a.gguf", **{"general.nested": [[1, 2], [3]]}))
    assert tokenizer("the other")["input_ids"] == plain("the other")["input_ids"]
    assert tokenizer.get_vocab() == plain.get_vocab()


@pytest.mark.parametrize(
    "changes",
    [
        {"tokenizer.ggml.model": "nothing"},
        {"tokenizer.ggml.merges": ["t"]},
        {"tokenizer.ggml.merges": [1, 2]},
        {"tokenizer.ggml.token_type": "x"},
        {"tokenizer.ggml.merges": 3},
        {"tokenizer.ggml.tokens": ["a", "b", "c"]},
    ],
    ids=str,
)
def test_tokenizers_that_transformers_cannot_make(tmp_path, changes):
    """Whatever transformers and tokenizers raise, or nothing."""
    path = write_llama(tmp_path / "bad.gguf", **changes)
    try:
        load_tokenizer(path)
    except ValueError as e:
        message = str(e)
    else:
        return
    assert "bad.gguf" in message


K_QUANTS = {
    "Q4_0, head in Q6_K": lambda name: GGMLType.Q6_K if name == "token_embd" else GGMLType.Q4_0,
    "Q4_K_M": lambda name: GGMLType.Q6_K if name in ("token_embd", "ffn_down", "attn_v") else GGMLType.Q4_K,
    "Q5_K": lambda name: GGMLType.Q5_K,
    "Q3_K and Q2_K": lambda name: GGMLType.Q2_K if name.startswith("ffn") else GGMLType.Q3_K,
    "IQ4_XS": lambda name: GGMLType.IQ4_XS,
    "TQ1_0": lambda name: GGMLType.TQ1_0 if name != "token_embd" else GGMLType.Q6_K,
    "IQ3_M": lambda name: GGMLType.IQ3_S if name.startswith("ffn") else GGMLType.IQ3_XXS,
    "IQ2_M": lambda name: GGMLType.IQ2_S if name != "attn_q" else GGMLType.IQ2_XXS,
    "IQ1_M": lambda name: {"attn_v": GGMLType.IQ2_XS, "ffn_up": GGMLType.IQ1_S}.get(name, GGMLType.IQ1_M),
}  # fmt: skip


@pytest.mark.parametrize("case", K_QUANTS)
def test_files_as_llama_quantize_makes_them(tmp_path, case):
    """Logits of transformers' model of the dequantized file."""
    spec = Llama(hidden=256, mlp=256, heads=4, kv_heads=2, vocab=300, layers=1)
    rng = np.random.default_rng(0)
    tensors = {}
    for name, (data, kind) in llama_tensors(spec).items():
        if kind is not None:
            kind = K_QUANTS[case](name.split(".")[-2])
            size = gguf.GGML_QUANT_SIZES[kind][0]
            n, k = gguf.dequantize(data, llama_tensors(spec)[name][1]).shape
            data = random_blocks(kind, n, k // size, rng, scale=1e-3)
        tensors[name] = (data, kind)
    path = changed(tmp_path / "a.gguf", tensors, spec)
    model, oracle = load_gguf(path, dtype=torch.float32), dense_model(path)
    for name, module in packed_modules(model):
        expected = oracle.get_submodule(name).weight
        assert torch.equal(module.quant_tensor().dequantize(), expected), name
    assert_same_logits(model, oracle, TOKENS % 300)


def test_any_type_can_be_requantized(tmp_path):
    spec = Llama(hidden=256, mlp=256, heads=4, kv_heads=2, vocab=300, layers=1)
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (256, 66), dtype=np.uint8)
    blocks[:, :2] = np.full(256, 1e-3, np.float16).view(np.uint8).reshape(-1, 2)
    up = {"blk.0.ffn_up.weight": (blocks, GGMLType.IQ2_XXS)}
    path = changed(tmp_path / "a.gguf", up, spec)
    expected = torch.from_numpy(gguf.dequantize(blocks, GGMLType.IQ2_XXS))
    stored = load_gguf(path).model.layers[0].mlp.up_proj.quant_tensor()
    assert stored.format.name == "iq2_xxs"
    assert torch.equal(stored.dequantize(), expected)
    got = load_gguf(path, format="int8").model.layers[0].mlp.up_proj.quant_tensor()
    assert (got.dequantize() - expected).abs().max() <= expected.abs().max() / 127


SCALED = {"rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {**SCALED, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def scaled_llama(kind: str):
    rope = {"rope_type": kind, **(LLAMA3 if kind == "llama3" else SCALED)}
    config = transformers.LlamaConfig(
        vocab_size=320, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=64, rope_parameters=rope,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("kind", ["linear", "llama3", "yarn"])
def test_the_runner_takes_any_fixed_rotary_embedding(kind):
    oracle = scaled_llama(kind)
    assert_same_logits(oracle, oracle)


def test_one_that_follows_the_length_runs_in_transformers(caplog):
    model = scaled_llama("dynamic")
    runner = Runner(model, 60)
    assert "its rotary embedding is 'dynamic'" in caplog.text
    ids = torch.arange(40)  # beyond the 16 of the original
    with torch.inference_mode():
        expected = model(ids[None]).logits[0, -1]
    assert (runner.forward(ids) - expected).abs().max() < tolerance(model, expected)
