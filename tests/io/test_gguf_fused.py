"""GGUF files of converters that were asked to join tensors: rows of them are the model's, packed as stored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("gguf")
pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from gguf import GGMLQuantizationType as GGMLType
from gguf_converted import CASES, FIELDS, KINDS, ROPE, SIZES, Case, make
from gguf_moe import MOE, MXFP4

from lowbit.integrations.transformers import load_gguf, load_gguf_decoded, packed_modules
from lowbit.io.readers.gguf import GGUFFile

QKV = dict.fromkeys(("attn_q", "attn_k", "attn_v"), GGMLType.Q5_0)
FUSED: dict[str, Case] = {
    "qwen2": Case("qwen2", "Qwen2ForCausalLM", {**SIZES, **ROPE}, FIELDS),  # biases
    # Heads of q and k are permuted, of biases too.
    "smollm3": CASES["smollm3 with biases"],
    "qwen3moe": MOE["qwen3moe"],
    "gpt-oss": MOE["gpt-oss"],
    "chatglm": CASES["chatglm"],  # of which ChatGLM's own checkpoints are
}


@pytest.mark.parametrize("case", FUSED)
def test_rows_are_those_of_the_model(tmp_path: Path, case: str) -> None:
    """As of the file with a tensor each, bit for bit, and of transformers' model."""
    kinds = {**(MXFP4 if case == "gpt-oss" else KINDS), **QKV}
    plain, oracle = make(FUSED[case], tmp_path, kinds)
    wanted = load_gguf(plain, dtype=torch.float32)
    path, _ = make(FUSED[case], tmp_path, kinds, fused=True)
    names = GGUFFile(path).tensors.keys()
    assert "blk.1.attn_qkv.weight" in names
    assert not [n for n in names if ".attn_q." in n or ".ffn_up_exps." in n]
    assert ("blk.1.ffn_gate_up_exps.weight" in names) == ("exps" in "".join(names))
    model = load_gguf(path, dtype=torch.float32)
    state = wanted.state_dict()
    assert model.config.to_dict() == wanted.config.to_dict()
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    assert dict(packed_modules(model))["model.layers.1.self_attn.k_proj"].format.name == "q5_0"
    dense = load_gguf_decoded(path, torch.float32)
    state = oracle.state_dict()
    assert all(torch.equal(t, state[name]) for name, t in dense.state_dict().items())


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            {"blk.0.attn_qkv.weight": (np.zeros((129, 64), np.float32), None)},
            r"'blk.0.attn_qkv.weight' must have shape \(128, 64\), got \(129, 64\)",
        ),
        (
            {"blk.0.attn_qkv.bias": (np.zeros(64, np.float32), None)},
            r"'blk.0.attn_qkv.bias' must have shape \(128,\), got \(64,\)",
        ),
        ({"blk.0.attn_qkv.weight": None}, "'blk.0.attn_q.weight' is missing"),
        # It is not known which of the two counts.
        (
            {"blk.0.attn_v.weight": (np.zeros((32, 64), np.float32), None)},
            "'blk.0.attn_q.weight' is missing",
        ),
    ],
)
def test_other_rows_are_named(tmp_path: Path, more: Any, message: str) -> None:
    path, _ = make(FUSED["qwen2"], tmp_path, {**KINDS, **QKV}, more=more, fused=True)
    with pytest.raises(ValueError, match=message):
        load_gguf(path)
