"""GGUF files of architectures other than llama that say what no model here does, or that are damaged."""

from __future__ import annotations

import functools
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

from gguf import MODEL_ARCH_NAMES
from gguf import GGMLQuantizationType as GGMLType
from gguf_architectures import SPECS, Spec, fields_of, tensors_of, write_model
from test_fuzz_readers import edits, fuzz, outcome, overwrite
from transformers.modeling_gguf_pytorch_utils import GGUF_CONFIG_MAPPING

from gguf_files import random_blocks
from lowbit.integrations import gguf_models
from lowbit.integrations.gguf_configs import _ARCHITECTURES
from lowbit.integrations.transformers import load_gguf

# By llama.cpp's names: other entries are sections of the metadata, or names that transformers changes before.
ARCHITECTURES_OF_TRANSFORMERS = [
    name for name in GGUF_CONFIG_MAPPING if name in MODEL_ARCH_NAMES.values()
]
RNG = np.random.default_rng(0)

BIAS, FACTORS = (np.zeros(256, np.float32), None), (np.ones(64, np.float32), None)
Q8 = GGMLType.Q8_0
# What makes a file bad: tensors, metadata, and the error.
REFUSED = {
    "a tensor is missing": (
        "qwen2", {"blk.1.ffn_up.weight": None}, {}, ValueError, r"'blk\.1\.ffn_up\.weight' is missing",
    ),
    "an output is missing": (
        "qwen2", {"blk.1.attn_output.weight": None}, {}, ValueError, "'blk.1.attn_output.weight' is missing",
    ),
    "a bias is missing": (
        "qwen2", {"blk.0.attn_k.bias": None}, {}, ValueError, "'blk.0.attn_k.bias' is missing",
    ),
    "a norm is missing": (
        "gemma3", {"blk.5.attn_q_norm.weight": None}, {}, ValueError, "'blk.5.attn_q_norm.weight' is missing",
    ),
    "no embedding": (
        "qwen2", {"token_embd.weight": None}, {}, ValueError, "'token_embd.weight' is missing",
    ),
    "a layer too many": (
        "qwen2", {}, {"qwen2.block_count": 3}, ValueError, "'blk.2.attn_output.weight' is missing",
    ),
    "a layer too few": (
        "qwen2", {}, {"qwen2.block_count": 1}, NotImplementedError,
        "a Qwen2ForCausalLM has no tensors 'blk.1.attn_k.bias'",
    ),
    "another shape": (
        "qwen2", {"blk.0.ffn_up.weight": (random_blocks(Q8, 255, 8, RNG), Q8)}, {}, ValueError,
        r"'blk.0.ffn_up.weight' must have shape \(256, 256\), got \(255, 256\)",
    ),
    "a narrow embedding": (
        "qwen2", {"token_embd.weight": (random_blocks(Q8, 90, 4, RNG), Q8)}, {}, ValueError,
        r"'token_embd.weight' must have shape \(N, 256\), got \(90, 128\)",
    ),
    "a norm in blocks": (
        "qwen2", {"output_norm.weight": (random_blocks(Q8, 1, 8, RNG)[0], Q8)}, {}, NotImplementedError,
        "expected two dimensions",
    ),
    "a tensor that is unknown": (
        "qwen2", {"blk.0.attn_output.bias": BIAS}, {}, NotImplementedError,
        "a Qwen2ForCausalLM has no tensors 'blk.0.attn_output.bias'",
    ),
    "factors of the frequencies": (
        "qwen2", {"rope_freqs.weight": FACTORS}, {}, NotImplementedError, "no tensors 'rope_freqs.weight'",
    ),
    "factors for long texts": (
        "phi3", {"rope_factors_long.weight": FACTORS, "rope_factors_short.weight": FACTORS}, {},
        NotImplementedError, "no tensors 'rope_factors_long.weight', 'rope_factors_short.weight'",
    ),
    "norms of stablelm's heads": (
        "stablelm", {"blk.0.attn_q_norm.weight": (np.ones((2, 128), np.float32), None)}, {},
        NotImplementedError, "no tensors 'blk.0.attn_q_norm.weight'",
    ),
    "yarn": (
        "qwen2", {}, {"qwen2.rope.scaling.type": "yarn", "qwen2.rope.scaling.factor": 4.0},
        NotImplementedError, "rope scaling 'yarn'; expected 'none' or 'linear'",
    ),
    "phi3, linear scaling": (
        "phi3", {}, {"phi3.rope.scaling.factor": 4.0}, NotImplementedError, "rope scaling 'linear' of a phi3",
    ),
    "attention scaled": (
        "phi3", {}, {"phi3.rope.scaling.attn_factor": 1.2}, NotImplementedError, "attn_factor 1.2",
    ),
    "a part rotated": (
        "qwen2", {}, {"qwen2.rope.dimension_count": 64}, NotImplementedError, "64 of 128 dimensions",
    ),
    "an odd part rotated": (
        "phi3", {}, {"phi3.rope.dimension_count": 63}, NotImplementedError, "expected an even number",
    ),
    "more rotated than there are": (
        "phi3", {}, {"phi3.rope.dimension_count": 130}, NotImplementedError, "130 of 128 dimensions",
    ),
    "values of another size": (
        "qwen3", {}, {"qwen3.attention.value_length": 64}, NotImplementedError, "128 key and 64 value",
    ),
    "heads that do not divide": (
        "qwen2", {}, {"qwen2.attention.head_count_kv": 3}, ValueError, "2 heads cannot share 3 key heads",
    ),
    "another pattern of windows": (
        "gemma3", {}, {"gemma3.attention.sliding_window_pattern": 4}, NotImplementedError,
        "sliding_window_pattern 4; expected 6",
    ),
    "a pattern for each layer": (
        "gemma2", {}, {"gemma2.attention.sliding_window_pattern": [True, False, True]},
        NotImplementedError, "sliding_window_pattern",
    ),
    "a negative window": (
        "gemma3", {}, {"gemma3.attention.sliding_window": -5.0}, ValueError, "must be int",
    ),
    "experts": ("qwen3", {}, {"qwen3.expert_count": 8}, NotImplementedError,
        "qwen3.expert_count 8; expected 0: load a folder of transformers"),
    "an encoder": ("gemma3", {}, {"gemma3.attention.causal": False}, NotImplementedError, "causal False"),
    "no epsilon": (
        "starcoder2", {}, {"starcoder2.attention.layer_norm_epsilon": None}, ValueError,
        "'starcoder2.attention.layer_norm_epsilon' is missing",
    ),
    "no number of layers": ("qwen2", {}, {"qwen2.block_count": None}, ValueError, "block_count' is missing"),
    "a token that is none": (
        "qwen2", {}, {"tokenizer.ggml.eos_token_id": 90}, ValueError, r"must be in \[0, 90\), got 90",
    ),
    "an architecture that transformers reads": (
        "qwen2", {}, {"arch": "nemotron"}, NotImplementedError,
        r"'nemotron'; expected one of \['bert', .*from_pretrained\(folder, gguf_file=name\)",
    ),
    "one that it does not read": (
        "qwen2", {}, {"arch": "mpt"}, NotImplementedError, "'mpt'.*load a folder of transformers",
    ),
    "experts that transformers reads": (
        "qwen2", {}, {"arch": "minimax-m2", "minimax-m2.expert_count": 8}, NotImplementedError,
        r"'minimax-m2'; .*transformers reads it dense: AutoModel.*gguf_file=name",
    ),
    "experts that it does not read": (
        "qwen2", {"blk.0.ffn_up_exps.weight": BIAS}, {"arch": "deepseek2"}, NotImplementedError,
        "'deepseek2'; .*load a folder of transformers",
    ),
    "rotated by time, height and width": (
        "phi3", {}, {"arch": "glm4", **{f"glm4.{k[5:]}": v for k, v in fields_of(SPECS["phi3"]).items() if k[0] == "p"},
                     "glm4.rope.dimension_sections": [8, 12, 12, 0]},
        NotImplementedError, r"glm4.rope.dimension_sections .*; expected 0",
    ),
    "no architecture": ("qwen2", {}, {"arch": ""}, ValueError, "architecture' is missing"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_and_why(tmp_path, case):
    arch, tensors, fields, error, message = REFUSED[case]
    with pytest.raises(error, match=message) as e:
        load_gguf(write_model(tmp_path / "bad.gguf", SPECS[arch], tensors, **fields))
    assert "bad.gguf" in str(e.value)


@pytest.mark.parametrize("arch", sorted({*ARCHITECTURES_OF_TRANSFORMERS} - {*_ARCHITECTURES}))
def test_every_other_architecture_of_transformers_reader_is_refused(tmp_path, arch):
    """By its name, before anything is made, and with what can be done."""
    path = write_model(tmp_path / "a.gguf", SPECS["qwen2"], arch=arch)
    with pytest.raises(NotImplementedError, match=rf"'{arch}'; expected one of .*gguf_file=name"):
        load_gguf(path)


def test_heads_of_a_stablelm_are_as_wide_as_it_is(tmp_path):
    fields = {"attention.key_length": 64, "attention.value_length": 64, "rope.dimension_count": 64}
    spec = SPECS["stablelm"].with_(heads=8, kv_heads=4, dim=64, fields=fields)
    with pytest.raises(NotImplementedError, match="heads of a stablelm have 64 .* 256 / 8"):
        load_gguf(write_model(tmp_path / "a.gguf", spec))


def test_nothing_is_made_that_the_file_has_no_room_for(tmp_path, monkeypatch):
    """Frequencies of a head of 2**31 dimensions would take gigabytes."""
    monkeypatch.setattr(gguf_models, "without_weights", lambda *_: pytest.fail("was made"))
    huge = {f"qwen2.{n}": 2**31 - 2 for n in ("attention.key_length", "attention.value_length")}
    with pytest.raises(ValueError, match=r"'blk.0.attn_output.weight' must have shape \(N, \d+\)"):
        load_gguf(write_model(tmp_path / "a.gguf", SPECS["qwen2"], **huge))


@functools.cache
def small(case: str) -> Spec:
    kinds = dict.fromkeys(SPECS[case].kinds, Q8)
    sizes = {"attention.key_length": 32, "attention.value_length": 32, "rope.dimension_count": 32}
    fields = {**SPECS[case].fields, **sizes}
    return SPECS[case].with_(
        hidden=32,
        mlp=32,
        vocab=5,
        layers=1,
        heads=1,
        kv_heads=1,
        dim=32,
        kinds=kinds,
        fields=fields,
    )


@functools.cache
def valid(case: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        return write_model(Path(folder) / "a.gguf", small(case)).read_bytes()


def output_of(data: bytes) -> torch.Tensor | None:
    """What a model that is made of these bytes computes for two tokens; None if they are refused as `outcome` wants."""
    with tempfile.NamedTemporaryFile(suffix=".gguf") as f:
        f.write(data)
        f.flush()
        model = outcome(lambda: load_gguf(f.name), f.name)
    if model is None:
        return None
    with torch.inference_mode():
        return model(torch.zeros(1, 2, dtype=torch.int64))[0]


def load(data: bytes) -> bool:
    """Whether a model was made of these bytes; it then computes something."""
    output = output_of(data)
    assert output is None or output.shape == (1, 2, 5)
    return output is not None


@pytest.mark.parametrize("case", SPECS)
def test_the_undamaged_file_loads(case):
    assert load(valid(case))


@settings(fuzz, max_examples=100)
@given(case=st.sampled_from(sorted(SPECS)), edits=edits, reach=st.sampled_from([900, 10**9]))
def test_wrong_bytes(case, edits, reach):
    """The first 900 bytes are numbers of the model."""
    data = valid(case)
    load(overwrite(data, edits, min(reach, len(data))))


KEYS = sorted(
    {key.partition(".")[2] for c in SPECS for key in fields_of(small(c)) if key[0] != "t"}
)
KEYS += ["rope.scaling.type", "rope.scaling.factor", "attention.sliding_window_pattern"]
VALUES = (
    st.sampled_from([0, 1, 2, 3, 31, 32, 64, 2**31 - 1, 2**32 - 1, 0.0, -1.0, 1e38, float("nan")])
    | st.sampled_from(["", "none", "linear", "yarn", "x" * 300, True, False])
    | st.lists(st.integers(0, 3), min_size=1, max_size=3)
    | st.lists(st.text(max_size=2), min_size=1, max_size=3)
)


@settings(fuzz, max_examples=150)
@given(
    case=st.sampled_from(sorted(SPECS)),
    changes=st.dictionaries(st.sampled_from(KEYS), st.none() | VALUES, min_size=1, max_size=3),
)
def test_wrong_values_of_the_metadata(case, changes):
    fields = {f"{SPECS[case].arch}.{key}": value for key, value in changes.items()}
    with tempfile.TemporaryDirectory() as folder:
        data = write_model(Path(folder) / "a.gguf", small(case), **fields).read_bytes()
    load(data)


@settings(fuzz, max_examples=100)
@given(case=st.sampled_from(sorted(SPECS)), data=st.data())
def test_wrong_tensors(case, data):
    """One is missing, or has another shape, type or name: never a model."""
    tensors = tensors_of(small(case))
    name = data.draw(st.sampled_from(sorted(tensors)))
    shape = data.draw(st.sampled_from([(), (1,), (31,), (5, 31), (31, 32), (5, 32, 1), (2, 2, 2)]))
    new = data.draw(st.sampled_from([None, (np.ones(shape or (1, 32), np.float32), None)]))
    other = data.draw(st.sampled_from([name, name + "x", "blk.1." + name, "rope_freqs.weight"]))
    changes = {name: None, other: new} if new is not None or other != name else {name: None}
    with tempfile.TemporaryDirectory() as folder:
        path = write_model(Path(folder) / "a.gguf", small(case), changes)
        assert not load(path.read_bytes()) or (name == "output.weight" and new is None)
