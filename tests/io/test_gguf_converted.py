"""GGUF files that llama.cpp's converter makes of models of transformers: the same comes back, packed as stored."""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("gguf")
pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from gguf import GGMLQuantizationType as GGMLType
from gguf_architectures import as_read
from gguf_converted import CASES, KINDS, make
from test_fuzz_readers import edits, fuzz, overwrite
from test_gguf_models import TOKENS, assert_same
from test_gguf_models_bad import output_of
from transformers.pytorch_utils import Conv1D

import lowbit
from lowbit.cli import baseline
from lowbit.cli.run import RunOptions, run
from lowbit.integrations.load import load_decoded, load_tokenizer
from lowbit.integrations.transformers import load_gguf, load_gguf_decoded, packed_modules
from lowbit.io.readers.gguf import GGUFFile
from lowbit.io.readers.gguf_blocks import BLOCK_TYPES


@pytest.mark.parametrize("case", CASES)
def test_the_model_comes_back(tmp_path: Path, case: str) -> None:
    path, oracle = make(CASES[case], tmp_path)
    model = load_gguf(path, dtype=torch.float32)
    assert type(model) is type(oracle)
    stored = [t.type for t in GGUFFile(path).tensors.values() if t.type in BLOCK_TYPES]
    tied = not CASES[case].encoder and oracle.config.tie_word_embeddings
    # Of a fused q/k/v transformers' encoder has three.
    thirds = 2 * oracle.config.num_hidden_layers if case == "nomic-bert" else 0
    packed = dict(packed_modules(model))
    assert len(packed) == len(stored) + tied + thirds
    assert {m.format.name for m in packed.values()} == {BLOCK_TYPES[t].format.name for t in stored}
    assert_same(model, oracle)
    if CASES[case].reads:
        assert_same(model, as_read(path))


@torch.inference_mode()
@pytest.mark.parametrize("case", CASES)
def test_the_dense_model_comes_back(tmp_path: Path, case: str) -> None:
    path, oracle = make(CASES[case], tmp_path)
    for model in (load_gguf_decoded(path, torch.float32), load_decoded(path, torch.float32)):
        assert not list(packed_modules(model))
        state = oracle.state_dict()
        assert model.state_dict().keys() == state.keys()
        assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
        assert torch.equal(model(TOKENS[None])[0], oracle(TOKENS[None])[0])


@torch.inference_mode()
@pytest.mark.parametrize("case", [c for c in CASES if not CASES[c].encoder])
def test_the_dense_side_of_a_comparison(tmp_path: Path, case: str) -> None:
    path, oracle = make(CASES[case], tmp_path)
    threads, out = torch.get_num_threads(), str(tmp_path)
    ids = TOKENS.tolist()
    baseline.run(
        baseline.Request(
            str(path), ids[:5], ids, max_new_tokens=3, window=24, threads=threads, out=out
        )
    )
    expected = oracle(TOKENS[None]).logits[0]
    got = torch.cat(torch.load(tmp_path / baseline.LOGITS)).float()
    assert (got - expected).norm() < 0.05 * expected.norm()
    result = json.loads((tmp_path / baseline.RESULT).read_text())
    loss = torch.nn.functional.cross_entropy(expected[:-1], TOKENS[1:])
    assert result["perplexity"] == pytest.approx(float(loss.exp()), rel=0.07)
    assert result["bits_per_weight"] == 16


def test_an_encoder_generates_no_text(tmp_path: Path) -> None:
    path, _ = make(CASES["bert"], tmp_path)
    with pytest.raises(ValueError, match=r"a\.gguf: a BertModel generates no text"):
        run(RunOptions(model=path, json=True))


def test_a_tokenizer_that_transformers_cannot_make_is_missed_when_it_is_asked_for(
    tmp_path: Path,
) -> None:
    path, _ = make(CASES["bert"], tmp_path, **{"tokenizer.ggml.model": "bert"})
    assert lowbit.load_model(path).config.model_type == "bert"
    with pytest.raises(ValueError, match=r"a\.gguf: transformers cannot make its tokenizer"):
        load_tokenizer(path)


@pytest.mark.parametrize("case", ["gpt2", "falcon 40b", "bert", "nomic-bert", "smollm3"])
def test_requantized(tmp_path: Path, case: str) -> None:
    """The linears of the layers alone, whatever transformers calls them and however it holds them."""
    path, oracle = make(CASES[case], tmp_path)
    model = load_gguf(path, dtype=torch.float32, format="nf4")
    for name, module in packed_modules(model):
        expected = oracle.get_submodule(name)
        weight = expected.weight.detach()
        weight = weight.t() if isinstance(expected, Conv1D) else weight
        if "layer" in name or ".h." in name:
            assert module.format.name == "nf4"
            weight = lowbit.quantize(weight.contiguous(), "nf4").dequantize()
        assert torch.equal(module.quant_tensor().dequantize(), weight), name


@torch.inference_mode()
@pytest.mark.parametrize("case", ["gpt2", "nomic-bert", "falcon 11b"])
def test_saved_and_loaded(tmp_path: Path, case: str) -> None:
    path, _ = make(CASES[case], tmp_path)
    model = load_gguf(path, dtype=torch.float32)
    model.config.save_pretrained(tmp_path / "own")
    lowbit.save(model, tmp_path / "own" / "model.safetensors")
    again = lowbit.load_model(tmp_path / "own")
    assert torch.equal(again(TOKENS[None])[0], model(TOKENS[None])[0])


@torch.inference_mode()
def test_a_bert_without_kinds_of_tokens(tmp_path: Path) -> None:
    """As a DistilBERT: llama.cpp adds nothing."""
    path, oracle = make(CASES["bert"], tmp_path, more={"token_types.weight": None})
    model = load_gguf(path, dtype=torch.float32)
    assert model.config.type_vocab_size == 1
    oracle.embeddings.token_type_embeddings.weight.zero_()
    got, expected = (m(TOKENS[None]).last_hidden_state for m in (model, oracle))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


@torch.inference_mode()
@pytest.mark.parametrize("case", ["bert", "nomic-bert"])
def test_an_encoder_pads_and_embeds_batches(tmp_path: Path, case: str) -> None:
    path, oracle = make(CASES[case], tmp_path)
    model = lowbit.load_model(path, dtype=torch.float32)
    ids = torch.stack([TOKENS, TOKENS.flip(0)])
    mask = torch.ones_like(ids)
    mask[1, 15:] = 0
    got, expected = (m(ids, attention_mask=mask).last_hidden_state for m in (model, oracle))
    torch.testing.assert_close(got[mask == 1], expected[mask == 1], rtol=0, atol=1e-4)


# What makes a file refused: tensors, metadata, and the error.
BIAS, Q8 = (np.zeros(64, np.float32), None), GGMLType.Q8_0
REFUSED = {
    "an olmo 3": (
        "olmo2", {}, {"olmo2.attention.sliding_window": 32}, "sliding_window 32, as an Olmo 3 has",
    ),
    "another layout": (
        "falcon 40b", {}, {"falcon.tensor_data_layout": "hf"}, "layout 'hf'; expected 'jploski'",
    ),
    "nothing rotated": (
        "granite", {}, {"granite.rope.scaling.finetuned": False}, "finetuned False; expected True",
    ),
    "wide heads": (
        "falcon 7b", {"blk.0.attn_output.weight": (np.zeros((64, 96), np.float32), None),
                      "blk.1.attn_output.weight": (np.zeros((64, 96), np.float32), None)},
        {"falcon.attention.key_length": 24, "falcon.attention.value_length": 24},
        "heads of a falcon have 24 dimensions; expected 64 / 4",
    ),
    "shared keys": ("gpt2", {}, {"gpt2.attention.head_count_kv": 2}, "a gpt2 has 2 key heads; expected 4"),
    "a causal encoder": ("bert", {}, {"bert.attention.causal": None}, "causal True; expected False"),
    "a classifier": ("bert", {"cls.weight": BIAS}, {}, "a BertModel has no tensors 'cls.weight'"),
    "experts": (
        "nomic-bert", {}, {"nomic-bert.expert_count": 8}, "expert_count 8; expected 0: load a folder",
    ),
    "factors": ("smollm3", {"rope_freqs.weight": (np.ones(8, np.float32), None)}, {}, "no tensors 'rope_freqs"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_and_why(tmp_path: Path, case: str) -> None:
    name, tensors, fields, message = REFUSED[case]
    path, _ = make(CASES[name], tmp_path, more=tensors, **fields)
    with pytest.raises(NotImplementedError, match=message) as e:
        load_gguf(path)
    assert "a.gguf" in str(e.value)


MISSING = {
    "granite": ("granite.logit_scale", "'granite.logit_scale' is missing"),
    "gpt2": ("gpt2.attention.layer_norm_epsilon", "layer_norm_epsilon' is missing"),
    "nomic-bert": ("nomic-bert.attention.head_count", "head_count' is missing"),
}


@pytest.mark.parametrize("case", MISSING)
def test_what_is_missing_is_named(tmp_path: Path, case: str) -> None:
    field, message = MISSING[case]
    path, _ = make(CASES[case], tmp_path, **{field: None})
    with pytest.raises(ValueError, match=message):
        load_gguf(path)


@functools.cache
def valid(case: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        return make(CASES[case], Path(folder), dict.fromkeys(KINDS, Q8))[0].read_bytes()


@settings(fuzz, max_examples=100)
@given(case=st.sampled_from(sorted(CASES)), edits=edits, reach=st.sampled_from([900, 10**9]))
def test_wrong_bytes(case, edits, reach):
    """The first 900 bytes are numbers of the model. What was made computes something."""
    data = valid(case)
    output = output_of(overwrite(data, edits, min(reach, len(data))))
    assert output is None or output.shape[:2] == (1, 2)
