"""Models of GGUF files against llama.cpp itself (package llama-cpp-python), which defines what the files mean.

The files are dense, as llama.cpp rounds the activations of quantized products; keys and values are fp32.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("gguf")
pytest.importorskip("transformers")
pytest.importorskip("accelerate")
llama_cpp = pytest.importorskip("llama_cpp")

from gguf import GGMLQuantizationType as GGMLType  # noqa: E402
from gguf_architectures import SPECS, write_model  # noqa: E402
from gguf_converted import CASES, make  # noqa: E402
from test_gguf_models import TOKENS, bound  # noqa: E402

from gguf_files import Llama, write_llama  # noqa: E402
from lowbit.integrations.transformers import load_gguf  # noqa: E402

# Without a vocabulary.
NONE = {"tokenizer.ggml.model": "no_vocab", "tokenizer.ggml.tokens": None}
# ggml looks GELU up in a table of fp16.
TABLE = ("bert", "falcon", "gemma2", "gemma3", "gpt2", "starcoder2")
# Biases of an MLP that llama.cpp does not know.
OTHERS = [name for name in CASES if name != "smollm3 with biases"]


@pytest.fixture(autouse=True, scope="module")
def backend():
    log = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(log, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    yield
    llama_cpp.llama_log_set(llama_cpp.llama_log_callback(), ctypes.c_void_p(0))


def outputs(path: Path, encoder: bool, width: int) -> torch.Tensor:  # (tokens, width) fp32
    """The logits of every token, or an encoder's last hidden states."""
    options = llama_cpp.llama_model_default_params()
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), options)
    assert model, "llama.cpp does not load the file"
    options = llama_cpp.llama_context_default_params()
    options.n_ctx = options.n_batch = options.n_ubatch = 64
    options.n_threads = options.n_threads_batch = 1
    options.type_k = options.type_v = llama_cpp.GGML_TYPE_F32
    options.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    options.embeddings = encoder
    if encoder:
        options.pooling_type = llama_cpp.LLAMA_POOLING_TYPE_NONE
    context = llama_cpp.llama_init_from_model(model, options)
    batch = llama_cpp.llama_batch_init(len(TOKENS), 0, 1)
    batch.n_tokens = len(TOKENS)
    for i, token in enumerate(TOKENS.tolist()):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, i, 1, 1
        batch.seq_id[i][0] = 0
    run = llama_cpp.llama_encode if encoder else llama_cpp.llama_decode
    assert run(context, batch) == 0
    row = llama_cpp.llama_get_embeddings_ith if encoder else llama_cpp.llama_get_logits_ith
    rows = [np.ctypeslib.as_array(row(context, i), (width,)).copy() for i in range(len(TOKENS))]
    llama_cpp.llama_batch_free(batch)
    llama_cpp.llama_free(context)
    llama_cpp.llama_model_free(model)
    return torch.from_numpy(np.stack(rows))


@torch.inference_mode()
def check(path: Path, arch: str) -> None:
    model = load_gguf(path, dtype=torch.float32)
    got = model(TOKENS[None])[0][0]
    expected = outputs(path, not model.can_generate(), got.shape[1])
    limit = 2e-3 * float(expected.abs().max()) if arch in TABLE else bound(model.config, expected)
    difference = float((got - expected).abs().max())
    print(f"{arch}: largest difference {difference:.2g} of {float(expected.abs().max()):.3g}")
    assert difference < limit


@pytest.mark.parametrize("case", OTHERS)
def test_what_the_converter_makes(tmp_path: Path, case: str) -> None:
    arch = CASES[case].arch
    fields = {f"{arch}.vocab_size": 90, "tokenizer.ggml.token_type_count": 2, **NONE}
    path, _ = make(CASES[case], tmp_path, {}, **fields)
    check(path, arch)


@pytest.mark.parametrize("case", SPECS)
def test_other_architectures(tmp_path: Path, case: str) -> None:
    spec = SPECS[case]
    dense = spec.with_(kinds=dict.fromkeys(spec.kinds))
    fields = {f"{spec.arch}.vocab_size": spec.vocab, **NONE}
    check(write_model(tmp_path / "a.gguf", dense, **fields), spec.arch)


@pytest.mark.parametrize("tied", [False, True])
def test_llama(tmp_path: Path, tied: bool) -> None:
    dense = {"kind": GGMLType.F32, "embedding_kind": GGMLType.F32}
    spec = Llama(tied=tied, heads=6, kv_heads=2, hidden=192, **dense)
    check(write_llama(tmp_path / "a.gguf", spec, **NONE), "llama")
