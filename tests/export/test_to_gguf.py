"""Models as GGUF files: the bytes of the file they came from, and what transformers' own loader reads of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

gguf = pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from gguf import GGMLQuantizationType as GGMLType  # noqa: E402
from tokenizers import Regex, Tokenizer, models, pre_tokenizers  # noqa: E402

import lowbit  # noqa: E402
from gguf_files import Llama, llama_fields, llama_tensors, random_blocks, write, write_llama  # noqa: E402
from lowbit.export.gguf import to_gguf  # noqa: E402
from lowbit.export.gguf_blocks import block_type, to_blocks  # noqa: E402
from lowbit.formats import as_format  # noqa: E402
from lowbit.integrations.transformers import load_gguf, load_tokenizer  # noqa: E402
from lowbit.io.readers.gguf import GGUFFile  # noqa: E402
from lowbit.nn import QuantLinear  # noqa: E402

SIZES = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": False,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "rope_theta": 5e4, "factor": 4.0}
GEMMA = {"head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 16, "tie_word_embeddings": True}  # fmt: skip
# Class, what differs, and whether transformers' own reader of GGUF takes all of it.
MODELS: dict[str, tuple[str, dict[str, Any], bool]] = {
    "llama": ("Llama", {"attention_bias": True}, False),  # it leaves biases of llama out
    "llama tied": ("Llama", {"tie_word_embeddings": True}, True),
    "llama 3": ("Llama", {"rope_parameters": LLAMA3}, False),
    "llama linear": ("Llama", {"rope_parameters": LINEAR}, False),
    "mistral": ("Mistral", {"sliding_window": None}, True),
    "qwen2": ("Qwen2", {}, True),
    "qwen3": ("Qwen3", {"head_dim": 128}, True),
    "gemma2": ("Gemma2", GEMMA, True),
    "gemma3": ("Gemma3", GEMMA, True),
}


def made(case: str, **changes: Any) -> Any:
    kind, more, _ = MODELS[case]
    config = getattr(transformers, f"{kind}{'Text' if kind == 'Gemma3' else ''}Config")
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config(**{**SIZES, **more, **changes}))
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, 0.5, 0.2)
    return model.float().eval()


def raw(file: GGUFFile, name: str) -> bytes:
    info = file.tensors[name]
    return bytes(file._bytes(info, 0, info.nbytes))


KINDS = (
    GGMLType.Q4_0, GGMLType.Q4_1, GGMLType.Q5_0, GGMLType.Q5_1, GGMLType.Q8_0, GGMLType.MXFP4, GGMLType.BF16,
    GGMLType.F16, GGMLType.F32,
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_the_file_that_was_loaded_comes_back(tmp_path: Path, kind: GGMLType) -> None:
    """Every tensor's type and bytes, permuted rows included, and the tokenizer."""
    spec = Llama(kind=kind, heads=6, kv_heads=2, hidden=192, tied=kind.value % 2 == 0, bias=True)
    general = {"general.name": "Tiny", "general.license": "mit", "general.tags": ["a", "b"]}
    source = GGUFFile(write_llama(tmp_path / "a.gguf", spec, **general))
    done = to_gguf(
        load_gguf(source.path, dtype=torch.float32), tmp_path / "b.gguf", tokenizer=source
    )
    found = GGUFFile(tmp_path / "b.gguf")
    assert {n: t.type for n, t in found.tensors.items()} == {
        n: t.type for n, t in source.tensors.items()
    }
    for name in source.tensors:
        assert raw(found, name) == raw(source, name), name
    for key in source.metadata.keys() - {"GGUF.kv_count", "llama.vocab_size"}:
        assert np.array_equal(found.metadata[key], source.metadata[key]), key
    assert not done.requantized
    text = "the cat sat"
    tokens = [load_tokenizer(file.path)(text)["input_ids"] for file in (source, found)]
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize(
    "kind",
    [
        "Q2_K",
        "Q3_K",
        "Q4_K",
        "Q5_K",
        "Q6_K",
        "IQ4_XS",
        "TQ2_0",
        "NVFP4",
        "IQ1_M",
        "IQ2_XS",
        "IQ3_XXS",
    ],
)
def test_super_blocks_come_back(tmp_path: Path, kind: str) -> None:
    spec, rng = Llama(hidden=256, heads=4, kv_heads=2, mlp=256, layers=1), np.random.default_rng(0)
    tensors = llama_tensors(spec)
    for name, (data, _) in tensors.items():
        if name.startswith("blk") and data.ndim == 2:
            count = 256 // gguf.GGML_QUANT_SIZES[GGMLType[kind]][0]
            blocks = random_blocks(GGMLType[kind], data.shape[0], count, rng, 0.01)
            if kind == "NVFP4":  # a scale with its sign set, or of 127, stands for another one
                blocks.reshape(-1, 36)[:, :4] %= 127
            tensors[name] = blocks, GGMLType[kind]
    source = GGUFFile(write(tmp_path / "a.gguf", tensors, **llama_fields(spec)))
    to_gguf(load_gguf(source.path, dtype=torch.float32), tmp_path / "b.gguf")
    found = GGUFFile(tmp_path / "b.gguf")
    for name in source.tensors:
        assert found.tensors[name].type == source.tensors[name].type
        assert raw(found, name) == raw(source, name), name


@pytest.mark.parametrize("case", MODELS)
def test_models_are_read_back(tmp_path: Path, case: str) -> None:
    """Bit for bit by lowbit; and by transformers' own dense loader, where it reads all that there is."""
    model = made(case)
    lowbit.quantize_model(model, "q5_1", progress=False)
    to_gguf(model, tmp_path / "a.gguf")
    ids = torch.arange(40)[None]
    with torch.inference_mode():
        expected = model(ids).logits
        assert torch.equal(
            load_gguf(tmp_path / "a.gguf", dtype=torch.float32)(ids).logits, expected
        )
        if not MODELS[case][2]:
            return
        oracle = type(model).from_pretrained(str(tmp_path), gguf_file="a.gguf", dtype=torch.float32)
        torch.testing.assert_close(oracle.eval()(ids).logits, expected, rtol=1e-4, atol=1e-5)


FORMATS = {
    "q4_0": "Q4_0", "int4_g128": "Q4_0", "int4_row": "Q4_0", "int5_g64": "Q5_0", "int8": "Q8_0", "q8_0": "Q8_0",
    "int4_g32_a8": "Q4_0", "mxfp4": "MXFP4", "iq4_nl": "IQ4_NL", "binary": "Q1_0", "ternary_g256": "TQ2_0",
    "ternary_trits_g256": "TQ1_0", "ternary": None, "int4_g16": None, "int4_g48": None, "int4_g32_bf16": None,
    "nf4": None, "uint4_g32": None, "int3_g32": None, "int4_g32_o2": None, "kmeans4": None, "e4m3": None,
}  # fmt: skip


@pytest.mark.parametrize("format", FORMATS)
def test_blocks_hold_the_values_of_a_format(format: str) -> None:
    """As package gguf dequantizes them."""
    kind = block_type(as_format(format), 512)
    assert (kind and kind.name) == FORMATS[format]
    if kind is None:
        return
    torch.manual_seed(0)
    weight = lowbit.quantize(torch.randn(6, 512), format)
    blocks = to_blocks(weight, kind)
    assert blocks.shape == (
        6,
        512 // gguf.GGML_QUANT_SIZES[kind][0] * gguf.GGML_QUANT_SIZES[kind][1],
    )
    try:
        values = gguf.dequantize(blocks, kind)
    except NotImplementedError:
        pytest.skip(f"this version of package gguf does not dequantize {kind.name}")
    assert np.array_equal(values, weight.dequantize().numpy())


def test_no_whole_blocks() -> None:
    assert block_type(as_format("q4_0"), 48) is None
    assert block_type(as_format("q4_0"), 64) == GGMLType.Q4_0


def test_a_format_without_a_type_is_an_error_or_requantized(tmp_path: Path) -> None:
    model = made("llama", attention_bias=False)
    lowbit.quantize_model(model, "nf4", progress=False)
    path = tmp_path / "new" / "a.gguf"
    with pytest.raises(
        ValueError,
        match=r"model\.layers\.0\.self_attn\.q_proj: no GGUF type .* 'nf4'.*Q4_0 \(q4_0\)",
    ):
        to_gguf(model, path)
    assert not path.parent.exists()
    done = to_gguf(model, path, requantize="q8_0")
    assert set(done.requantized.values()) == {"Q8_0"}
    assert len(done.requantized) == 14
    assert not done.packed
    loaded = load_gguf(path, dtype=torch.float32)
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            expected = lowbit.quantize(lowbit.dequantize(module.quant_tensor()), "q8_0")
            found = loaded.get_submodule(name).quant_tensor()
            assert torch.equal(found.dequantize(), expected.dequantize()), name
    with pytest.raises(ValueError, match=r"requantize must be one of .*Q8_0.*, got 'Q4_K'"):
        to_gguf(model, path, requantize="Q4_K")


@pytest.mark.parametrize("name", ["q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_xs"])
def test_super_blocks_that_lowbit_fitted(tmp_path: Path, name: str) -> None:
    """As gguf dequantizes them."""
    model = made("qwen2", hidden_size=256, intermediate_size=256)
    lowbit.quantize_model(model, name, progress=False)
    to_gguf(model, tmp_path / "a.gguf")
    found = GGUFFile(tmp_path / "a.gguf")
    kept = found.tensors["blk.0.ffn_up.weight"]
    assert kept.type.name == name.upper()
    expected = lowbit.dequantize(model.model.layers[0].mlp.up_proj.quant_tensor())
    assert torch.equal(found.dequantized(kept.name), expected)


def test_scales_that_do_not_fit_leave_nothing(tmp_path: Path) -> None:
    """NVFP4 of GGUF has no factor of a tensor."""
    model = made("qwen2", hidden_size=256, intermediate_size=256)
    lowbit.quantize_model(model, "nvfp4", progress=False)
    with pytest.raises(
        ValueError, match=r"q_proj, in format 'nvfp4': as NVFP4 .* no factor of the whole tensor"
    ):
        to_gguf(model, tmp_path / "a.gguf")
    assert not list(tmp_path.iterdir())


UNSUPPORTED = {
    "architecture": ("llama", {}, "model_type 'gpt_neox'; expected one of .*'llama'"),
    "windows": ("mistral", {"sliding_window": 8}, "sliding_window 8 of a mistral; expected None"),
    "scale": ("gemma2", {"query_pre_attn_scalar": 64}, "query_pre_attn_scalar 64 of a gemma2; expected 256"),
    "pattern": ("gemma3", {"layer_types": ["full_attention"] * 2}, "layer_types .* of a gemma3"),
    "rope": ("qwen2", {"rope_parameters": LINEAR}, r"rope_type 'linear' of a qwen2; expected one of \('default',\)"),
}  # fmt: skip


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_what_is_not_written_is_said(tmp_path: Path, case: str) -> None:
    name, changes, message = UNSUPPORTED[case]
    model = made(name, **changes)
    if case == "architecture":
        model.config.model_type = "gpt_neox"
    lowbit.quantize_model(model, "q4_0", progress=False)
    with pytest.raises(NotImplementedError, match=message):
        to_gguf(model, tmp_path / "a.gguf")
    assert not list(tmp_path.iterdir())


def test_a_dense_model_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the model has no packed layer"):
        to_gguf(made("llama"), tmp_path / "a.gguf")


WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
WORDS += r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)
PLAIN = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def split(pattern: str) -> Any:
    parts = [pre_tokenizers.Split(Regex(pattern), "isolated"), PLAIN]
    return pre_tokenizers.Sequence(parts)


SPLITS = {
    "gpt-2": BYTES,
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), BYTES]),
    "llama-bpe": split(WORDS),
    "qwen2": split(WORDS.replace("{1,3}", "")),
    None: split(r"\w+"),
}


def tokenizer_of(pre_tokenizer: Any) -> Any:
    vocab = {t: i for i, t in enumerate(("<s>", "</s>", "a", "b", "ab", "c"))}
    inner = Tokenizer(models.BPE(vocab, [("a", "b")]))
    inner.pre_tokenizer = pre_tokenizer
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>"
    )
    fast.add_tokens("word")
    fast.chat_template = "{{ messages }}"
    return fast


@pytest.mark.parametrize("pre", SPLITS)
def test_tokenizers_of_byte_pairs(tmp_path: Path, pre: str | None) -> None:
    model = made("qwen2")
    lowbit.quantize_model(model, "q4_0", progress=False)
    tokenizer = tokenizer_of(SPLITS[pre])
    if pre is None:
        with pytest.raises(NotImplementedError, match="llama.cpp's name of that is not known here"):
            to_gguf(model, tmp_path / "a.gguf", tokenizer=tokenizer)
    to_gguf(model, tmp_path / "a.gguf", tokenizer=tokenizer, pre=pre or "mine")
    if pre is not None:
        to_gguf(model, tmp_path / "a.gguf", tokenizer=tokenizer)
    found = GGUFFile(tmp_path / "a.gguf").metadata
    assert found["tokenizer.ggml.model"] == "gpt2"
    assert found["tokenizer.ggml.pre"] == (pre or "mine")
    assert found["tokenizer.ggml.tokens"][:8] == ["<s>", "</s>", "a", "b", "ab", "c", "word", "[PAD7]"]  # fmt: skip
    assert found["tokenizer.ggml.token_type"].tolist() == [3, 3, 1, 1, 1, 1, 4] + [5] * 57
    assert found["tokenizer.ggml.merges"] == ["a b"]
    assert found["tokenizer.ggml.bos_token_id"] == 0
    assert found["tokenizer.ggml.eos_token_id"] == 1
    assert found["tokenizer.chat_template"] == "{{ messages }}"


def test_other_tokenizers_are_refused(tmp_path: Path) -> None:
    model = made("qwen2")
    lowbit.quantize_model(model, "q4_0", progress=False)
    inner = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words = transformers.PreTrainedTokenizerFast(tokenizer_object=inner)
    with pytest.raises(NotImplementedError, match="WordLevel after WhitespaceSplit; expected BPE"):
        to_gguf(model, tmp_path / "a.gguf", tokenizer=words)
    many = tokenizer_of(BYTES)
    many.add_tokens([f"t{i}" for i in range(80)])
    with pytest.raises(ValueError, match="the tokenizer has a token 86, and the model 64 rows"):
        to_gguf(model, tmp_path / "a.gguf", tokenizer=many)
    with pytest.raises(
        ValueError, match="pre is for a tokenizer of transformers, got 'qwen2' and None"
    ):
        to_gguf(model, tmp_path / "a.gguf", pre="qwen2")
    assert not list(tmp_path.iterdir())


def test_llama3_factors_are_llama_cpps(tmp_path: Path) -> None:
    """1 for high frequencies, the factor for low ones, between them as llama.cpp's converter computes it."""
    model = made("llama 3", hidden_size=128, num_attention_heads=2)
    lowbit.quantize_model(model, "q4_0", progress=False)
    to_gguf(model, tmp_path / "a.gguf")
    expected = []
    for i in range(32):
        length = 2 * np.pi * 10000.0 ** (2 * i / 64)
        smooth = (32 / length - 1.0) / (4.0 - 1.0)
        plain = 1 / ((1 - smooth) / 8.0 + smooth)
        expected.append(1.0 if length < 32 / 4 else 8.0 if length > 32 / 1 else plain)
    found = GGUFFile(tmp_path / "a.gguf")["rope_freqs.weight"]
    assert isinstance(found, torch.Tensor)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5)
    assert len(set(np.round(expected, 3))) > 3


def test_the_result_says_all(tmp_path: Path) -> None:
    model = made("gemma2")
    lowbit.quantize_model(model, "q4_0", progress=False)
    done = to_gguf(model, tmp_path / "a.gguf")
    assert str(done) == "14 layers packed as they are, 1 dense"
    assert done.dense == ["model.embed_tokens"]
    assert done.packed["model.layers.1.mlp.down_proj"] == "Q4_0"
