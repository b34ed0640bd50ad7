"""Models as folders of GPTQ and of compressed-tensors: read back bit for bit, by their own libraries where they are
there, and by a formula of their layout.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from folders import stream, tiny  # noqa: E402
from tokenizers import Tokenizer, models  # noqa: E402

import lowbit  # noqa: E402
from lowbit.export.compressed_tensors import to_compressed_tensors  # noqa: E402
from lowbit.export.folders import words  # noqa: E402
from lowbit.export.gptq import to_gptq  # noqa: E402
from lowbit.integrations.pretrained import put, save_folder  # noqa: E402
from lowbit.nn import PackedModule, QuantEmbedding, QuantLinear, ReorderedLinear  # noqa: E402

WRITERS = {"gptq": to_gptq, "compressed-tensors": to_compressed_tensors}
FORMATS = (
    "int4_g32", "uint4_g32", "int8_row", "uint8_g16", "int3_g32_bf16", "uint3_g32", "int2_g64_fp32", "uint2_g16",
    "q4_0", "q8_0", "int4_g40", "uint4_row", "int4_g128",
)  # fmt: skip


def quantized(format: Any, kind: str = "Qwen2", **more: Any) -> Any:
    torch.manual_seed(0)
    model = tiny(kind, **more)
    lowbit.quantize_model(model, format, progress=False)
    return model


def check_same(loaded: Any, model: Any) -> None:
    """Every packed tensor, and every dense one, is as it was; a tensor is shared or not as it was."""
    ours, theirs = dict(model.named_modules()), dict(loaded.named_modules())
    packed = [name for name, module in ours.items() if isinstance(module, QuantLinear)]
    for name in packed:
        made, expected = theirs[name].quant_tensor(), ours[name].quant_tensor()
        assert made.tensors.keys() == expected.tensors.keys()
        for key, t in expected.tensors.items():
            assert torch.equal(made.tensors[key], t), (name, key)
        assert torch.equal(made.dequantize(), expected.dequantize())
    found = dict(loaded.named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(found[name], parameter), name
    assert packed


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("to", WRITERS)
def test_layers_are_read_back(tmp_path: Path, to: str, format: str) -> None:
    model = quantized(format)
    done = WRITERS[to](model, tmp_path)
    assert len(done.packed) == 7
    assert not done.requantized
    loaded = lowbit.load_model(tmp_path)
    check_same(loaded, model)
    ids = torch.arange(24)[None] % 64
    with torch.inference_mode():
        assert torch.equal(loaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize("to", WRITERS)
def test_layers_may_differ(tmp_path: Path, to: str) -> None:
    model = quantized(
        {".*q_proj": "int8_g32", ".*down_proj": "uint4_g32", ".*(k|v|o|gate|up)_proj": "int4_row"}
    )
    WRITERS[to](model, tmp_path)
    loaded = lowbit.load_model(tmp_path)
    check_same(loaded, model)
    assert loaded.model.layers[0].mlp.down_proj.format.zero == "int"
    assert loaded.model.layers[0].mlp.up_proj.format.zero is None


@pytest.mark.parametrize("to", WRITERS)
@pytest.mark.parametrize("group", [16, 32])
def test_columns_in_another_order(tmp_path: Path, to: str, group: int) -> None:
    model = quantized("uint4_g32")
    name = "model.layers.0.mlp.up_proj"
    weight = lowbit.quantize(torch.randn(96, 64), f"uint4_g{group}")
    order = torch.argsort((torch.arange(64) // group)[torch.randperm(64)], stable=True)
    put(model, name, ReorderedLinear.from_ordered(weight, order, None, torch.float32))
    WRITERS[to](model, tmp_path)
    loaded = lowbit.load_model(tmp_path).get_submodule(name)
    assert isinstance(loaded, ReorderedLinear)
    assert torch.equal(loaded.weight_source()(), model.get_submodule(name).weight_source()())
    assert torch.equal(loaded.input_order, order)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert config.get("desc_act", True)


@pytest.mark.parametrize("to", WRITERS)
@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_are_decoded_and_heads_are_not(tmp_path: Path, to: str, tied: bool) -> None:
    torch.manual_seed(0)
    model = tiny("Llama", tied)
    lowbit.quantize_model(model, "int8_g32", skip=(), progress=False)
    embedding = lowbit.quantize(model.model.embed_tokens.weight.detach(), "int4_g32")
    made = QuantEmbedding.from_quant_tensor(embedding, torch.float32)
    put(model, "model.embed_tokens", made)
    if tied:
        put(model, "lm_head", QuantLinear.tied_to(made))
    done = WRITERS[to](model, tmp_path)
    assert done.decoded == ["model.embed_tokens"]
    assert ("lm_head" in done.packed) != tied
    loaded = lowbit.load_model(tmp_path)
    assert torch.equal(loaded.model.embed_tokens.weight, embedding.dequantize())
    assert isinstance(loaded.lm_head, PackedModule) != tied
    ids = torch.arange(24)[None]
    with torch.inference_mode():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)


REFUSED: dict[str, tuple[str, str]] = {
    "nf4": ("gptq", "'nf4' of a weight \\(64, 64\\) is none of integers"),
    "q4_1": ("compressed-tensors", "is none of integers with integer zero points"),
    "int4_g32_o1": ("gptq", "is none of integers"),
    "int4_g32_int8": ("gptq", "has scales in int8"),
    "int5": ("gptq", r"has 5 bits, not one of \(2, 3, 4, 8\)"),
}


@pytest.mark.parametrize("format", REFUSED)
def test_other_formats_are_refused_or_quantized_anew(tmp_path: Path, format: str) -> None:
    to, message = REFUSED[format]
    model = quantized(format)
    target = tmp_path / "new" / "folder"
    with pytest.raises(ValueError, match=rf"model\.layers\.0\.self_attn\.q_proj: .*{message}"):
        WRITERS[to](model, target)
    with pytest.raises(ValueError, match=r"requantize must be a format that .* holds: 'nf3'"):
        WRITERS[to](model, target, requantize="nf3")
    assert not target.parent.exists()
    done = WRITERS[to](model, target, requantize="int4_g32")
    assert len(done.requantized) == 7
    loaded = lowbit.load_model(target)
    for name in done.requantized:
        again = lowbit.quantize(model.get_submodule(name).quant_tensor().dequantize(), "int4_g32")
        found = loaded.get_submodule(name).quant_tensor()
        assert torch.equal(found.dequantize(), again.dequantize())


@pytest.mark.parametrize(
    ("to", "sizes", "format", "message"),
    [
        ("gptq", {"intermediate_size": 100}, "int4_row", "has 100 out features, in 4 bits no whole words"),
        ("gptq", {"intermediate_size": 80}, "int3_row", "has 80 out features, in 3 bits no whole words"),
        ("compressed-tensors", {"intermediate_size": 80}, "int3_row", "has 80 out features, no multiple of 32"),
    ],
)  # fmt: skip
def test_sizes_are_refused(
    tmp_path: Path, to: str, sizes: dict[str, int], format: str, message: str
) -> None:
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, **sizes
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    lowbit.quantize_model(model, format, progress=False)
    with pytest.raises(ValueError, match=f"gate_proj: .*{message}"):
        WRITERS[to](model, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("to", WRITERS)
def test_a_folder_hands_down_its_files(tmp_path: Path, to: str) -> None:
    dense = tmp_path / "dense"
    tiny().save_pretrained(dense)
    (dense / "tokenizer_config.json").write_text("{}")
    (dense / "quantize_config.json").write_text('{"bits": 2}')
    model = quantized("int4_g32", "Llama")
    save_folder(model, dense, tmp_path / "packed")
    source, target = tmp_path / "packed", tmp_path / "out"
    WRITERS[to](lowbit.load_model(source), target, source=source)
    check_same(lowbit.load_model(target), lowbit.load_model(source))
    config = json.loads((target / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == to
    assert (target / "tokenizer_config.json").read_text() == "{}"
    assert not (target / "quantize_config.json").exists()
    with pytest.raises(ValueError, match="dst"):
        WRITERS[to](model, source, source=source)
    assert lowbit.load_model(source)


def test_a_tokenizer_is_saved(tmp_path: Path) -> None:
    inner = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=inner)
    to_gptq(quantized("int4_g32"), tmp_path, tokenizer=fast)
    assert transformers.AutoTokenizer.from_pretrained(str(tmp_path))("b")["input_ids"] == [1]


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 8])
def test_words_are_streams(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (3, 37), dtype=torch.uint8)
    assert torch.equal(words(codes, bits), stream(codes, bits))


@pytest.mark.parametrize("format", ["int4_g32", "uint4_g32", "uint3_g32", "int2_g32", "uint8_g32"])
def test_gptq_is_its_formula(tmp_path: Path, format: str) -> None:
    """W[n, k] = scales[g[k], n] * (code[k, n] - zero[g[k], n]), fields of the words along K and along N."""
    model = quantized(format)
    to_gptq(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for name, module in model.named_modules():
        if not isinstance(module, QuantLinear):
            continue
        bits = module.format.bits
        group = tensors[f"{name}.g_idx"].long()
        codes = fields(tensors[f"{name}.qweight"].t(), bits).t()
        zeros = fields(tensors[f"{name}.qzeros"], bits)
        weight = tensors[f"{name}.scales"][group].float() * (codes - zeros[group])
        assert torch.equal(weight.t(), module.quant_tensor().dequantize()), name


def fields(rows: Tensor, bits: int) -> Tensor:
    """Bit by bit, in Python's integers."""
    out = []
    for row in rows.tolist():
        whole = sum((word & 0xFFFFFFFF) << 32 * i for i, word in enumerate(row))
        out.append([whole >> bits * i & (1 << bits) - 1 for i in range(32 * len(row) // bits)])
    return torch.tensor(out)


@pytest.mark.parametrize("format", ["int4_g32", "uint4_g32", "uint2_g32", "int8_g32", "int3_g32"])
def test_as_gptqmodel_dequantizes(tmp_path: Path, format: str) -> None:
    qlinear = pytest.importorskip("gptqmodel.nn_modules.qlinear.torch")
    formats = pytest.importorskip("gptqmodel.quantization.config").FORMAT
    model = quantized(format)
    to_gptq(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for name, module in model.named_modules():
        if not isinstance(module, QuantLinear):
            continue
        n, k = module.out_features, module.in_features
        symmetric = module.format.zero is None
        layer = qlinear.TorchLinear(
            module.format.bits, 32, symmetric, False, k, n, format=formats.GPTQ_V2
        )
        for part in ("qweight", "qzeros", "scales", "g_idx"):
            getattr(layer, part).data = tensors[f"{name}.{part}"].contiguous()
        layer.post_init()
        expected = module.quant_tensor().dequantize(torch.float16)
        assert torch.equal(layer.dequantize_weight().t(), expected), name


@pytest.mark.parametrize(
    "format",
    ["int4_g32", "uint4_g32", "uint3_g32", "int2_g32", "int8_row", "uint4_row", "int6_g32"],
)
def test_as_compressed_tensors_decompresses(tmp_path: Path, format: str) -> None:
    base = pytest.importorskip("compressed_tensors.compressors.base")
    pytest.importorskip("compressed_tensors.compressors")
    library: Callable[..., Any] = pytest.importorskip("compressed_tensors.quantization").QuantizationConfig  # fmt: skip
    model = quantized(format)
    to_compressed_tensors(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    scheme = library(**config).config_groups["group_0"]
    compressor = base.BaseCompressor.get_value_from_registry("pack-quantized")
    tensors = load_file(tmp_path / "model.safetensors")
    for name, module in model.named_modules():
        if not isinstance(module, QuantLinear):
            continue
        parts = {
            key.removeprefix(f"{name}."): t
            for key, t in tensors.items()
            if key.startswith(f"{name}.weight")
        }
        weight = compressor.decompress(parts, scheme)["weight"]
        assert torch.equal(weight, module.quant_tensor().dequantize(weight.dtype)), name


def test_transformers_loads_compressed_tensors(tmp_path: Path) -> None:
    """Symmetric: it wants zero points of another shape than the library packs them to."""
    pytest.importorskip("compressed_tensors")
    model = quantized("int4_g32")
    to_compressed_tensors(model, tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(str(tmp_path), dtype=torch.float32)
    ids = torch.arange(24)[None]
    with torch.inference_mode():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
