"""GGUF files of architectures other than llama. Expected are transformers' own models of the same files and, where its
reader drops what a file says, its models of configurations written here, after llama.cpp.
"""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch

pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from gguf import GGMLQuantizationType as GGMLType  # noqa: E402
from gguf_architectures import (  # noqa: E402
    SPECS,
    as_read,
    fields_of,
    of_config,
    tensors_of,
    write_model,
)
from gguf_converted import CASES  # noqa: E402
from gguf_moe import MOE  # noqa: E402
from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES  # noqa: E402
from transformers.pytorch_utils import Conv1D  # noqa: E402

import lowbit  # noqa: E402
from lowbit.decoder.compiled import CompiledDecoder  # noqa: E402
from lowbit.decoder.runner import Runner  # noqa: E402
from lowbit.integrations.gguf_configs import _ARCHITECTURES, config_of  # noqa: E402
from lowbit.integrations.transformers import load_gguf, packed_modules  # noqa: E402
from lowbit.io.readers.gguf import GGUFFile  # noqa: E402
from lowbit.io.readers.gguf_blocks import BLOCK_TYPES  # noqa: E402

TOKENS = torch.arange(24) * 7 % 90
NATIVE = ("qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "smollm3", "granite")


def bound(config, outputs: torch.Tensor) -> float:
    """sqrt(K) eps for each of the sums behind an output, of K terms in another order; 4 for the tails."""
    mlp = max(
        getattr(config, n, None) or 0 for n in ("intermediate_size", "ffn_hidden_size", "n_inner")
    )
    k = max(config.hidden_size, mlp, config.num_attention_heads * 256)
    depth = 10 * config.num_hidden_layers + 1
    return 4 * depth * math.sqrt(k) * torch.finfo(torch.float32).eps * float(outputs.abs().max())


@torch.inference_mode()
def assert_same(model, oracle) -> None:
    """The same weights bit for bit, outputs within rounding, and greedy tokens; so does the native decoder."""
    for name, module in packed_modules(model):
        expected = oracle.get_submodule(name)
        weight = expected.weight.t() if isinstance(expected, Conv1D) else expected.weight
        assert torch.equal(module.quant_tensor().dequantize(), weight), name
    dense = {n for n, _ in oracle.named_parameters()} - {
        f"{n}.weight" for n, _ in packed_modules(model)
    }
    for name in dense:
        assert torch.equal(model.get_parameter(name), oracle.get_parameter(name)), name
    if not oracle.can_generate():
        expected = oracle(TOKENS[None]).last_hidden_state
        got = model(TOKENS[None]).last_hidden_state
        assert (got - expected).abs().max() < bound(model.config, expected)
        return
    expected = oracle(TOKENS[None]).logits[0]
    limit = bound(model.config, expected)
    assert (model(TOKENS[None]).logits[0] - expected).abs().max() < limit
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(
        model.generate(TOKENS[None, :9], **options), oracle.generate(TOKENS[None, :9], **options)
    )
    assert (CompiledDecoder.obstacle(model) is None) == (model.config.model_type in NATIVE)
    runner = Runner(model, len(TOKENS))
    rows = [runner.forward(part).clone() for part in (TOKENS[:9], *TOKENS[9:, None])]
    assert (torch.stack(rows) - expected[8:]).abs().max() < limit


def test_every_architecture_is_tested():
    here = {spec.arch for spec in SPECS.values()}
    converted = {case.arch for case in (*CASES.values(), *MOE.values())}
    assert here | converted | {"llama"} == set(_ARCHITECTURES)
    assert here <= set(GGUF_SUPPORTED_ARCHITECTURES)


@pytest.mark.parametrize("case", SPECS)
def test_the_model_is_that_of_transformers_reader(tmp_path, case):
    path = write_model(tmp_path / "a.gguf", SPECS[case])
    model, oracle = load_gguf(path, dtype=torch.float32), as_read(path)
    stored = sum(kind in BLOCK_TYPES for _, kind in tensors_of(SPECS[case]).values())
    tied = oracle.config.tie_word_embeddings
    assert len(list(packed_modules(model))) == stored + tied
    assert tied == SPECS[case].tied
    for name in ("eos_token_id", "pad_token_id"):
        expected = getattr(oracle.config, name)
        assert getattr(model.config, name) == getattr(model.generation_config, name) == expected
    assert_same(model, oracle)


SIZES = {
    "vocab_size": 90, "hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 128,
}  # fmt: skip
RMS, LAYER = {"rms_norm_eps": 1e-5}, {"norm_epsilon": 1e-5, "layer_norm_eps": 1e-5}
SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]


def rope(theta: float = 10000.0, factor: float = 1.0, **more) -> dict:
    kind = {"rope_type": "default"} if factor == 1 else {"rope_type": "linear", "factor": factor}
    return {**kind, "rope_theta": theta, **more}


GEMMA2 = {
    **RMS, "num_hidden_layers": 3, "layer_types": SLIDING, "sliding_window": 5, "rope_parameters": rope()
}  # fmt: skip
GEMMA3 = {
    **RMS, "num_hidden_layers": 6, "head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 5,
}  # fmt: skip
# What transformers' reader drops or takes for something else: of a file, how it differs from that of
# SPECS, and the configuration.
DROPPED = {
    "qwen2, heads of another size": (
        "qwen2", {"heads": 4, "kv_heads": 2, "fields": {"attention.key_length": 128, "attention.value_length": 128}},
        {**RMS, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 128,
         "rope_parameters": rope()},
    ),
    "qwen2, linear scaling": (
        "qwen2", {"fields": {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}},
        {**RMS, "num_hidden_layers": 2, "rope_parameters": rope(factor=4.0)},
    ),
    "qwen2, what llama.cpp takes for granted": (
        "qwen2", {"kv_heads": 2, "fields": {"attention.head_count_kv": None, "rope.freq_base": None}},
        {**RMS, "num_hidden_layers": 2, "num_key_value_heads": 2, "rope_parameters": rope()},
    ),
    "qwen3, heads of 64": (
        "qwen3", {"dim": 64, "fields": {"attention.key_length": 64, "attention.value_length": 64}},
        {**RMS, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
         "rope_parameters": rope()},
    ),
    "gemma2, caps and the scale of scores": (
        "gemma2",
        {"dim": 128, "fields": {
            "attention.key_length": 128, "attention.value_length": 128, "attention.sliding_window": 5,
            "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}},
        {**GEMMA2, "head_dim": 128, "query_pre_attn_scalar": 128, "attn_logit_softcapping": 2.0,
         "final_logit_softcapping": 3.0},
    ),
    "gemma3, linear scaling": (
        "gemma3",
        {"fields": {
            "attention.key_length": 256, "attention.value_length": 256, "attention.sliding_window": 5,
            "rope.freq_base": 1e6, "rope.freq_base_swa": 500.0, "rope.scaling.type": "linear",
            "rope.scaling.factor": 8.0, "final_logit_softcapping": 3.0}},
        {**GEMMA3, "final_logit_softcapping": 3.0, "rope_parameters": {
            "full_attention": rope(1e6, 8.0), "sliding_attention": rope(500.0)}},
    ),
    "gemma3, no window": (
        "gemma3", {"layers": 2, "fields": {"attention.key_length": 256, "attention.value_length": 256}},
        {**GEMMA3, "num_hidden_layers": 2, "layer_types": ["full_attention"] * 2, "rope_parameters": {
            "full_attention": rope(), "sliding_attention": rope()}},
    ),
    "phi3, a window and a part rotated": (
        "phi3", {"tied": True, "fields": {"attention.sliding_window": 5, "rope.dimension_count": 96}},
        {**RMS, "num_hidden_layers": 2, "sliding_window": 5, "rope_parameters": rope(partial_rotary_factor=0.75)},
    ),
    "starcoder2, another base and no biases": (
        "starcoder2", {"biases": (), "fields": {"rope.freq_base": 1e5}},
        {**LAYER, "num_hidden_layers": 2, "use_bias": False, "rope_parameters": rope(1e5)},
    ),
    "stablelm, another part rotated": (
        "stablelm", {"fields": {"rope.dimension_count": 64, "rope.freq_base": 500.0}},
        {**LAYER, "num_hidden_layers": 2, "rope_parameters": rope(500.0, partial_rotary_factor=0.5)},
    ),
    "stablelm, all rotated": (
        "stablelm", {"fields": {}},
        {**LAYER, "num_hidden_layers": 2, "rope_parameters": rope(partial_rotary_factor=1.0)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", DROPPED)
def test_what_transformers_reader_drops(tmp_path, case):
    arch, changes, arguments = DROPPED[case]
    path = write_model(tmp_path / "a.gguf", SPECS[arch].with_(**changes))
    kind = _ARCHITECTURES[arch].config
    names = {*vars(kind()), "head_dim", "pad_token_id"}
    arguments = {
        "pad_token_id": None,
        "eos_token_id": None,
        "bos_token_id": None,
        **SIZES,
        **arguments,
    }
    config = kind(**{k: v for k, v in arguments.items() if k in names})
    model = load_gguf(path, dtype=torch.float32)
    assert_same(model, of_config(path, config))


@pytest.mark.parametrize(("arch", "layers"), [("gemma2", 46), ("gemma3", 62)])
def test_the_largest_gemma_scales_scores_by_its_width(tmp_path, arch, layers):
    """As llama.cpp, which knows the model by the number of its layers."""
    kinds = dict.fromkeys(SPECS[arch].kinds)
    small = {
        "hidden": 32,
        "mlp": 4,
        "vocab": 3,
        "heads": 2,
        "kv_heads": 1,
        "dim": 4,
        "kinds": kinds,
    }
    lengths = {"attention.key_length": 4, "attention.value_length": 4}
    for count, expected in ((layers, 16), (layers - 1, 4)):
        spec = SPECS[arch].with_(layers=count, fields=lengths, **small)
        config = config_of(GGUFFile(write_model(tmp_path / "a.gguf", spec)))
        assert config.query_pre_attn_scalar == expected


@pytest.mark.parametrize("case", ["qwen2", "gemma2", "phi3", "stablelm"])
def test_blocks_of_vectors_stay_packed(tmp_path, case):
    """Of two bits and less, as stored, whatever the architecture does to rows; with no warning."""
    kinds = {**SPECS[case].kinds, "ffn_up": GGMLType.IQ2_XXS, "token_embd": GGMLType.IQ1_M}
    path = write_model(tmp_path / "a.gguf", SPECS[case].with_(kinds=kinds))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = load_gguf(path, dtype=torch.float32)
    oracle, found = as_read(path), []
    for name, module in packed_modules(model):
        assert torch.equal(module.quant_tensor().dequantize(), oracle.get_submodule(name).weight)
        found.append(module.format.name)
    assert found.count("iq2_xxs") == SPECS[case].layers
    assert found.count("iq1_m") == 1 + SPECS[case].tied
    with torch.inference_mode():
        got, expected = (m(TOKENS[None]).logits for m in (model, oracle))
    assert (got - expected).abs().max() < bound(model.config, expected)


@pytest.mark.parametrize("case", ["gemma2", "qwen2 untied"])
def test_requantized_linears(tmp_path, case):
    """Of the layers alone."""
    kinds = {**SPECS[case].kinds, "ffn_up": GGMLType.IQ2_XXS}
    path = write_model(tmp_path / "a.gguf", SPECS[case].with_(kinds=kinds))
    model, oracle = load_gguf(path, dtype=torch.float32, format="nf4"), as_read(path)
    for name, module in packed_modules(model):
        expected = oracle.get_submodule(name).weight.detach()
        if "layers" in name:
            expected = lowbit.quantize(expected, "nf4").dequantize()
        assert torch.equal(module.quant_tensor().dequantize(), expected), name


@pytest.mark.parametrize("case", ["qwen2", "starcoder2", "gemma3"])
def test_a_dense_file(tmp_path, case):
    kinds = dict.fromkeys(SPECS[case].kinds)
    path = write_model(tmp_path / "a.gguf", SPECS[case].with_(kinds=kinds))
    model, oracle = load_gguf(path, dtype=torch.float32), as_read(path)
    assert not list(packed_modules(model))
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    state = oracle.state_dict()
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    with torch.inference_mode():
        assert torch.equal(model(TOKENS[None]).logits, oracle(TOKENS[None]).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", SPECS)
def test_dtypes(tmp_path, case, dtype):
    """What is dense is the fp32 value rounded once, and logits lie about those of fp32."""
    path = write_model(tmp_path / "a.gguf", SPECS[case])
    model, wide = load_gguf(path, dtype=dtype), load_gguf(path, dtype=torch.float32)
    assert model.config.dtype == dtype
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, wide.get_parameter(name).to(dtype)), name
    assert {m.dtype for _, m in packed_modules(model)} == {dtype}
    with torch.inference_mode():
        got, expected = (m(TOKENS[None]).logits for m in (model, wide))
    assert got.dtype == dtype
    assert (got.float() - expected).norm() < 0.1 * expected.norm()


def test_parts_are_one_model(tmp_path):
    spec = SPECS["gemma2"]
    oracle = load_gguf(write_model(tmp_path / "whole.gguf", spec), dtype=torch.float32).state_dict()
    names = list(tensors_of(spec))
    paths = [tmp_path / f"m-{i + 1:05}-of-00002.gguf" for i in range(2)]
    for i, path in enumerate(paths):
        absent = dict.fromkeys(names[9:] if i == 0 else names[:9])
        only = fields_of(spec) if i else {}
        split = {"split.no": i, "split.count": 2, "split.tensors.count": len(names)}
        write_model(path, spec, absent, **{**dict.fromkeys(only), **split})
    for path in paths:
        state = load_gguf(path, dtype=torch.float32).state_dict()
        assert state.keys() == oracle.keys()
        for name, t in oracle.items():
            assert not isinstance(t, torch.Tensor) or torch.equal(state[name], t), name
    paths[1].unlink()
    with pytest.raises(ValueError, match=r"m-00002-of-00002\.gguf must lie beside it"):
        load_gguf(paths[0])


def test_load_model_takes_them(tmp_path, caplog):
    path = write_model(tmp_path / "a.gguf", SPECS["qwen2"])
    with caplog.at_level("INFO", logger="lowbit"):
        model = lowbit.load_model(path)
    assert model.dtype == torch.bfloat16
    assert "gguf; 16 layers packed as stored" in caplog.text


@torch.inference_mode()
@pytest.mark.parametrize("case", ["gemma2", "gemma3"])
def test_a_gemma_survives_what_is_done_to_models(tmp_path, case):
    """Its embedding scales its rows, and its tied head shares the packed weight."""
    model = load_gguf(write_model(tmp_path / "a.gguf", SPECS[case]), dtype=torch.float32)
    assert model.lm_head.shares_weight(model.model.embed_tokens)
    expected = model(TOKENS[None]).logits
    lowbit.save(model, tmp_path / "a.safetensors")
    dense = transformers.AutoModelForCausalLM.from_config(copy.deepcopy(model.config)).eval()
    for path in (tmp_path / "a.safetensors", None):
        loaded = lowbit.load(dense, path) if path else copy.deepcopy(model)
        assert loaded.lm_head.shares_weight(loaded.model.embed_tokens)
        assert torch.equal(loaded(TOKENS[None]).logits, expected)
    other = load_gguf(
        write_model(tmp_path / "b.gguf", SPECS[case], tensors_of(SPECS[case], seed=1)),
        dtype=torch.float32,
    )
    assert not torch.equal(other(TOKENS[None]).logits, expected)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(TOKENS[None]).logits, expected)
    cast = model.to(torch.bfloat16)
    direct = load_gguf(tmp_path / "a.gguf", dtype=torch.bfloat16)
    cast.model.rotary_emb = direct.model.rotary_emb  # torch rounds its frequencies, too
    assert torch.equal(cast(TOKENS[None]).logits, direct(TOKENS[None]).logits)
