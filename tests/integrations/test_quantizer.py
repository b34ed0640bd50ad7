"""lowbit as a quantization method of transformers: from_pretrained, save_pretrained, dequantize. The oracle is
`quantize_model` of the dense model, and transformers' own forward.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")


from dense_weights import weight_of  # noqa: E402

import lowbit  # noqa: E402
from lowbit.nn import QuantEmbedding, QuantLinear  # noqa: E402

SMALL = {
    "vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96,
    "num_key_value_heads": 2,
}  # fmt: skip
GPT2 = {"vocab_size": 64, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
T5 = {
    "vocab_size": 64, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4,
    "decoder_start_token_id": 0,
}  # fmt: skip
MODELS: dict[str, tuple[str, str, dict[str, Any], int]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", {**SMALL, "tie_word_embeddings": False}, 14),
    "tied": ("LlamaForCausalLM", "LlamaConfig", {**SMALL, "tie_word_embeddings": True}, 14),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**SMALL, "head_dim": 16}, 14),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2, 8),
    "t5": ("T5ForConditionalGeneration", "T5Config", T5, 32),
    # Transformers renames and fuses what its checkpoints hold.
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {**SMALL, "num_local_experts": 4}, 24),
    # Stored transposed, with biases.
    "gpt_oss": (
        "GptOssForCausalLM", "GptOssConfig",
        {**SMALL, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16}, 24,
    ),
}  # fmt: skip
every_model = pytest.mark.parametrize("name", MODELS)
pytestmark = pytest.mark.filterwarnings("ignore:.*of the weights stay dense:UserWarning")


@pytest.fixture(autouse=True)
def no_bars():
    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.enable_progress_bar()


def dense(name: str) -> Any:
    kind, config, values, _ = MODELS[name]
    torch.manual_seed(0)
    return getattr(transformers, kind)(getattr(transformers, config)(**values)).eval()


def load(name: str, folder: Path, **more: Any) -> Any:
    """What must be complete, without a word."""
    kind = getattr(transformers, MODELS[name][0])
    model, info = kind.from_pretrained(folder, output_loading_info=True, **more)
    assert not any(info.values()), info
    return model


def logits(model: nn.Module) -> torch.Tensor:
    ids = torch.arange(18).view(2, 9)
    more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=ids, **more).logits


def quantized(model: nn.Module, rules: Any = "nf4", **more: Any) -> nn.Module:
    lowbit.quantize_model(model, rules, progress=False, **more)
    return model


def packed(model: nn.Module) -> list[str]:
    return [n for n, m in model.named_modules() if isinstance(m, QuantLinear | QuantEmbedding)]


def assert_same(a: nn.Module, b: nn.Module) -> None:
    """Bit for bit: every tensor, the names of packed modules, and what is computed."""
    one, other = a.state_dict(), b.state_dict()
    assert one.keys() == other.keys()
    for name, t in one.items():
        assert t.dtype == other[name].dtype, name
        assert torch.equal(t, other[name]), name
    assert packed(a) == packed(b)
    assert [m.weight.dtype for m in a.modules() if hasattr(m, "weight")] == [
        m.weight.dtype for m in b.modules() if hasattr(m, "weight")
    ]
    assert torch.equal(logits(a), logits(b))


@every_model
def test_on_load_and_back(tmp_path: Path, name: str):
    """Quantized on load as `quantize_model` does; saved, in one file and in shards, and loaded by every entry."""
    dense(name).save_pretrained(tmp_path / "dense")
    want = quantized(load(name, tmp_path / "dense"))
    model = load(name, tmp_path / "dense", quantization_config=lowbit.LowbitConfig("nf4"))
    assert len(packed(model)) == MODELS[name][3]
    assert model.quantization_method == "lowbit"
    assert model.is_quantized
    assert not model.training
    assert not any(p.is_meta for p in model.parameters())
    assert_same(model, want)
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size=20_000)
    assert len([*(tmp_path / "many").glob("*.safetensors")]) > 2
    config = json.loads((tmp_path / "one" / "config.json").read_text())["quantization_config"]
    assert config == {"quant_method": "lowbit", "format": "nf4"}
    for folder in (tmp_path / "one", tmp_path / "many"):
        again = load(name, folder)
        assert_same(again, model)
        assert_same(lowbit.load_model(folder), model)
        again.save_pretrained(tmp_path / "again")
        assert_same(load(name, tmp_path / "again", device_map="cpu"), model)


def test_layers_of_more_than_256_features(tmp_path: Path):
    """Equal numbers of that size are not one object in Python."""
    config = transformers.LlamaConfig(**{**SMALL, "intermediate_size": 300})
    model = quantized(transformers.LlamaForCausalLM(config).eval(), "q4_k")
    model.save_pretrained(tmp_path)
    assert_same(transformers.LlamaForCausalLM.from_pretrained(tmp_path), model)


@every_model
def test_save_pretrained_after_quantize_model(tmp_path: Path, name: str):
    model = quantized(dense(name), "int4_g32")
    model.save_pretrained(tmp_path)
    assert_same(load(name, tmp_path), model)


@every_model
def test_folders_of_lowbit_save(tmp_path: Path, name: str):
    model = quantized(dense(name), "q4_k")
    for folder, size in (("one", None), ("many", 20_000)):
        lowbit.save(model, tmp_path / folder, max_shard_size=size)
        model.config.save_pretrained(tmp_path / folder)
        assert_same(load(name, tmp_path / folder), model)


def test_folders_of_load_model(tmp_path: Path):
    """What `lowbit.load_model` gives can be saved, with no trace in its configuration before."""
    quantized(dense("llama")).save_pretrained(tmp_path / "a")
    model = lowbit.load_model(tmp_path / "a")
    model.save_pretrained(tmp_path / "b")
    assert_same(load("llama", tmp_path / "b"), model)


def test_base_and_headed_classes(tmp_path: Path):
    """Of one checkpoint, with and without the prefix of the base."""
    model = quantized(dense("llama"), skip=())
    model.save_pretrained(tmp_path / "head")
    base = transformers.AutoModel.from_pretrained(tmp_path / "head")
    assert type(base).__name__ == "LlamaModel"
    assert len(packed(base)) == 14
    ids = torch.arange(9)[None]
    with torch.no_grad():
        assert torch.equal(base(ids)[0], model.model(ids)[0])
    base.save_pretrained(tmp_path / "base")
    assert_same_values = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    with torch.no_grad():
        assert torch.equal(assert_same_values.model(ids)[0], model.model(ids)[0])
    assert type(assert_same_values.lm_head) is nn.Linear  # made up, as of a dense checkpoint


@pytest.mark.parametrize("key", ["skip", "modules_to_not_convert"])
def test_skip(tmp_path: Path, key: str):
    dense("llama").save_pretrained(tmp_path / "dense")
    skip = ["lm_head", "layers.0", "up_proj"]
    config = lowbit.LowbitConfig("nf4", **{key: skip})
    model = load("llama", tmp_path / "dense", quantization_config=config)
    assert_same(model, quantized(load("llama", tmp_path / "dense"), skip=skip))
    assert len(packed(model)) == 6
    model.save_pretrained(tmp_path / "out")
    assert_same(load("llama", tmp_path / "out"), model)


@pytest.mark.parametrize("skip", [(), ("lm_head",)])
@pytest.mark.parametrize("name", ["tied", "llama", "gpt2"])
def test_recipes_and_ties(tmp_path: Path, name: str, skip: tuple[str, ...]):
    """An embedding, the head that is tied to it, and formats by layer."""
    recipe = {
        "embed_tokens|wte|lm_head": "int8_g32",
        "self_attn|attn": lowbit.nn.names.Rule("int4_g32", "rtn"),
        "layers.0|h.0": None,
        ".*": "nf4",
    }
    dense(name).save_pretrained(tmp_path / "dense")
    config = lowbit.LowbitConfig(recipe, skip=skip)
    config = lowbit.LowbitConfig.from_dict(json.loads(config.to_json_string()))
    model = load(name, tmp_path / "dense", quantization_config=config)
    want = quantized(load(name, tmp_path / "dense"), recipe, skip=skip)
    assert_same(model, want)
    head, rows = model.get_output_embeddings(), model.get_input_embeddings()
    assert isinstance(rows, QuantEmbedding)
    assert isinstance(head, QuantLinear) is (skip == ())
    if name != "llama" and not skip:
        assert head.shares_weight(rows)
        model.save_pretrained(tmp_path / "out")
        again = load(name, tmp_path / "out")
        assert again.get_output_embeddings().shares_weight(again.get_input_embeddings())
        assert_same(again, model)


@pytest.mark.parametrize("name", ["tied", "gpt2"])
def test_a_tied_weight_in_two_formats(tmp_path: Path, name: str):
    """Each has a weight of its own then, also where the folder is loaded again."""
    recipe = {"embed_tokens|wte": "int8_g32", ".*": "nf4"}
    dense(name).save_pretrained(tmp_path / "dense")
    config = lowbit.LowbitConfig(recipe, skip=())
    model = load(name, tmp_path / "dense", quantization_config=config)
    assert_same(model, quantized(load(name, tmp_path / "dense"), recipe, skip=()))
    head, rows = model.get_output_embeddings(), model.get_input_embeddings()
    assert (head.format.name, rows.format.name) == ("nf4", "int8_g32")
    model.save_pretrained(tmp_path / "out")
    assert_same(load(name, tmp_path / "out"), model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_dtypes(tmp_path: Path, name: str, dtype: torch.dtype):
    """Those of weights that models keep in fp32 included, which T5 asks for."""
    dense(name).save_pretrained(tmp_path / "dense")
    model = load(
        name, tmp_path / "dense", dtype=dtype, quantization_config=lowbit.LowbitConfig("nf4_fp16")
    )
    assert_same(model, quantized(load(name, tmp_path / "dense", dtype=dtype), "nf4_fp16"))
    model.save_pretrained(tmp_path / "out")
    assert_same(load(name, tmp_path / "out", dtype="auto"), model)
    assert logits(model).dtype == dtype


@every_model
def test_dequantize(tmp_path: Path, name: str):
    """A dense model of the same values, with the classes of the original; it is saved as one."""
    model = (
        quantized(dense(name), {".*": "nf4"}, skip=()) if name == "tied" else quantized(dense(name))
    )
    model.save_pretrained(tmp_path / "packed")
    model = load(name, tmp_path / "packed")
    want = dense(name)
    with torch.no_grad():
        for layer, module in model.named_modules():
            if layer in packed(model):
                values = module.weight.clone()
                weight_of(want, layer).copy_(values)
    made = model.dequantize()
    assert made is model
    assert not packed(model)
    assert not model.is_quantized
    assert_same(model, want)
    assert [type(m) for m in model.modules()] == [type(m) for m in want.modules()]
    model.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense/config.json").read_text())
    assert_same(load(name, tmp_path / "dense"), want)


def test_static_scales_and_extra_states_are_kept(tmp_path: Path):
    model = dense("llama")
    quantized(model, "int8_g32_a8")
    model.model.layers[0].mlp.up_proj.set_input_scale(0.25)
    model.save_pretrained(tmp_path)
    assert_same(load("llama", tmp_path), model)


def test_copies_and_compiled_models_work(tmp_path: Path):
    quantized(dense("llama")).save_pretrained(tmp_path)
    model = load("llama", tmp_path)
    copy.deepcopy(model).save_pretrained(tmp_path / "copy")
    assert_same(load("llama", tmp_path / "copy"), model)
    assert model.hf_quantizer.is_compileable
    assert model.hf_quantizer.is_serializable()
    assert model.hf_quantizer.is_trainable
    assert not model.hf_quantizer.is_qat_trainable


# Errors ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"format": "nf5"}, ValueError, "nf5"),
        ({"format": {"a(": "nf4"}}, ValueError, "not a regular expression"),
        ({"format": {"mlp": "nf5"}}, ValueError, "nf5"),
        ({"format": 7}, TypeError, "must be a Format or a string, got int"),
        ({"format": "nf4", "bit": 4}, TypeError, "bit"),
        ({"quant_method": "gptq"}, ValueError, "quant_method must be 'lowbit', got 'gptq'"),
        ({"skip": ["a"], "modules_to_not_convert": ["a"]}, ValueError, "not both"),
        ({"skip": "lm_head"}, TypeError, "skip must be a sequence"),
    ],
)
def test_wrong_configurations(arguments: Any, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        lowbit.LowbitConfig(**arguments)


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        (lambda: lowbit.LowbitConfig(), ValueError, "needs a format"),
        (lambda: lowbit.LowbitConfig("int4_g32", method="gptq"), ValueError, "needs calibration"),
        (lambda: lowbit.LowbitConfig("nf4", method="no"), ValueError, "no"),
    ],
)
def test_what_a_dense_folder_needs(tmp_path: Path, config: Any, error: Any, message: str):
    dense("llama").save_pretrained(tmp_path)
    with pytest.raises(error, match=message):
        load("llama", tmp_path, quantization_config=config())


def test_a_weight_that_cannot_be_quantized_is_named(tmp_path: Path):
    model = dense("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 3] = torch.nan
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj: weight.*nan"):
        load("llama", tmp_path, quantization_config=lowbit.LowbitConfig("nf4"))


def test_other_methods_and_lowbit_do_not_mix(tmp_path: Path):
    quantized(dense("llama")).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="LowbitConfig but you are passing a GPTQConfig"):
        load("llama", tmp_path, quantization_config=transformers.GPTQConfig(4))
    path = tmp_path / "config.json"
    content = json.loads(path.read_text())
    content["quantization_config"] = {"quant_method": "fp8"}
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="FineGrainedFP8Config but you are passing a LowbitConfig"):
        load("llama", tmp_path, quantization_config=lowbit.LowbitConfig("nf4"))


def damage(folder: Path, change: Any) -> None:
    """Changes the tensors and the header of a checkpoint."""
    from safetensors import safe_open

    file = folder / "model.safetensors"
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    header, tensors = json.loads(metadata["lowbit"]), load_file(file)
    change(header, tensors)
    save_file(tensors, file, {**metadata, "lowbit": json.dumps(header)})


DAMAGES: dict[str, tuple[Any, str]] = {
    "a newer version": (lambda h, t: h.update(version=3), "version must be 1 or 2, got 3"),
    "an unknown format": (
        lambda h, t: h["layers"]["model.layers.0.mlp.up_proj"].update(format="nf5"),
        "layers.0.mlp.up_proj.*nf5",
    ),
    "no codes": (lambda h, t: t.pop("model.layers.0.mlp.up_proj.codes"), "up_proj.codes.*missing"),
    "no norm": (lambda h, t: t.pop("model.norm.weight"), "lacks model.norm.weight"),
    "no layer": (
        lambda h, t: [
            h["layers"].pop("model.layers.0.mlp.up_proj"),
            [t.pop(n) for n in [*t] if "layers.0.mlp.up_proj" in n],
        ],
        "lacks model.layers.0.mlp.up_proj.weight",
    ),
    "a layer too many": (
        lambda h, t: [
            h["layers"].update(more=h["layers"]["model.layers.0.mlp.up_proj"]),
            t.update({n.replace("model.layers.0.mlp.up_proj", "more"): v.clone() for n, v in t.items()
                      if "layers.0.mlp.up_proj" in n}),
        ],
        "the model has no layers more",
    ),
    "a NaN": (
        lambda h, t: t["model.layers.0.mlp.up_proj.scales"].fill_(torch.nan),
        "up_proj.*NaN",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", DAMAGES)
def test_damaged_folders(tmp_path: Path, what: str):
    change, message = DAMAGES[what]
    quantized(dense("llama")).save_pretrained(tmp_path)
    damage(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        load("llama", tmp_path)


def test_a_folder_of_other_files(tmp_path: Path):
    """That says it is lowbit's."""
    model = dense("llama")
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    content = {**json.loads(path.read_text()), "quantization_config": {"quant_method": "lowbit"}}
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="not a lowbit checkpoint"):
        load("llama", tmp_path)
    path.write_text(
        json.dumps({**content, "quantization_config": {"quant_method": "lowbit", "new": 1}})
    )
    with pytest.raises(TypeError, match=r"got new .*of a newer version"):
        load("llama", tmp_path)


# Registration ---------------------------------------------------------------------------------------------------------

LOAD = "from transformers import AutoModelForCausalLM as A; m = A.from_pretrained(sys.argv[1])"
COUNT = "print(sum(type(l).__name__ == 'QuantLinear' for l in m.modules()))"


def python(folder: Path, *lines: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "\n".join(("import sys", *lines)), str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    "first", ["import lowbit", "import transformers.modeling_utils\nimport lowbit"]
)
def test_importing_lowbit_is_all_that_is_needed(tmp_path: Path, first: str):
    """In any order; lowbit alone does not import transformers."""
    quantized(dense("llama")).save_pretrained(tmp_path)
    check = "assert 'transformers' not in sys.modules" if first == "import lowbit" else ""
    done = python(tmp_path, first, check, LOAD, COUNT)
    assert done.stdout.strip() == "14", done.stderr


def test_without_lowbit_transformers_refuses_the_folder(tmp_path: Path):
    """Rather than make up the weights, whoever wrote the folder and whatever config.json says."""
    model = quantized(dense("llama"))
    model.save_pretrained(tmp_path / "a")
    lowbit.save(model, tmp_path / "b")
    del model.config.quantization_config
    model.config.save_pretrained(tmp_path / "b")
    errors = {}
    for folder in ("a", "b"):
        done = python(tmp_path / folder, LOAD, COUNT)
        errors[folder] = done.stderr
        assert done.returncode != 0, done.stdout
        assert "RuntimeError" in done.stderr
        assert "layers.0.mlp.down_proj.weight" in done.stderr
    assert "lowbit" in errors["a"]
    with pytest.raises(RuntimeError):  # imported, but config.json does not say that it is needed
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "b")


def test_models_within_another_module_are_saved_as_such(tmp_path: Path) -> None:
    """As sentence-transformers saves what it holds."""
    inner = dense("llama")
    outer = nn.ModuleDict({"transformer": nn.Sequential(inner), "head": nn.Linear(64, 8)})
    lowbit.quantize_model(outer, "int4_g32", progress=False)
    assert inner.is_quantized
    assert not hasattr(inner.model, "is_quantized")
    inner.save_pretrained(tmp_path)
    found = load("llama", tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(found.buffers(), inner.buffers(), strict=True))
    other = nn.Sequential(dense("llama"), nn.Linear(64, 8))
    lowbit.quantize_model(other, "int4_g32", skip=("0.*",), progress=False)
    assert not hasattr(other[0], "hf_quantizer")
