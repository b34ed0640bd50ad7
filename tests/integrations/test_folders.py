"""lowbit quantize FOLDER: what is written loads, for every architecture, as transformers' own model with
the dequantized weights; whatever else lies in the folder.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from dense_weights import weight_of  # noqa: E402
from test_cli import fail, run, run_json  # noqa: E402
from transformers.pytorch_utils import Conv1D  # noqa: E402

import lowbit  # noqa: E402
from lowbit.integrations import pretrained  # noqa: E402
from lowbit.nn import QuantLinear  # noqa: E402

SMALL = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 64,
}  # fmt: skip
GQA = {**SMALL, "num_key_value_heads": 2}
GPT2 = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
MOE = {
    **GQA, "num_experts": 4, "moe_intermediate_size": 32, "head_dim": 8, "num_experts_per_tok": 2,
    "decoder_sparse_step": 1,
}  # fmt: skip
VIT = {**SMALL, "image_size": 32, "patch_size": 8}
T5 = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}

# Class, configuration, quantized linears; renamed, fused and transposed by transformers, or as stored.
ARCHITECTURES = {
    "Llama": ("LlamaForCausalLM", GQA, 14),
    "Bert": ("BertModel", SMALL, 13),
    "T5": ("T5ForConditionalGeneration", T5, 32),
    "Falcon": ("FalconForCausalLM", SMALL, 8),
    "GPT2": ("GPT2LMHeadModel", GPT2, 8),
    "ImageGPT": ("ImageGPTModel", GPT2, 8),
    "GPTNeoX": ("GPTNeoXForCausalLM", SMALL, 8),
    "Mixtral": ("MixtralForCausalLM", {**GQA, "num_local_experts": 4}, 24),
    "Qwen3Moe": ("Qwen3MoeForCausalLM", MOE, 24),
    "ViT": ("ViTModel", VIT, 13),
}
RUNS = ("Llama", "Bert", "Falcon", "GPT2", "GPTNeoX", "Mixtral", "Qwen3Moe", "ViT")


@pytest.fixture(autouse=True)
def no_bars():
    """Bars of `save_pretrained` would be on the stderr of the command."""
    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.enable_progress_bar()


def dense(kind: str, dtype: torch.dtype = torch.float32, **more: Any) -> Any:
    name, values, _ = ARCHITECTURES[kind]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**values, **more)
    return getattr(transformers, name)(config).eval().to(dtype)


def output(model: nn.Module, kind: str) -> torch.Tensor:
    with torch.no_grad():
        if kind == "ViT":
            pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
            return model(pixel_values=pixels)[0]
        return model(torch.arange(18).view(2, 9))[0]


def dequantized(model: nn.Module, loaded: nn.Module) -> nn.Module:
    """`model` with the weights of the quantized linears of `loaded`."""
    with torch.no_grad():
        for name, module in loaded.named_modules():
            if isinstance(module, QuantLinear):
                weight_of(model, name).copy_(module.quant_tensor().dequantize())
    return model


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_what_is_written_loads(capsys, tmp_path: Path, kind: str):
    dense(kind).save_pretrained(tmp_path / "dense")
    printed = run_json(capsys, "quantize", tmp_path / "dense", tmp_path / "out", "-f", "int8_g32")
    assert len(printed["layers"]) == ARCHITECTURES[kind][2]
    loaded = pretrained.load_folder(tmp_path / "out")
    # Transformers reads the same folder: its tensors are the truth.
    wanted = type(loaded).from_pretrained(tmp_path / "dense")
    state = wanted.state_dict()
    packed = 0
    for name, module in loaded.named_modules():
        if isinstance(module, QuantLinear):
            weight = weight_of(wanted, name).detach()
            state.pop(f"{name}.weight", None)
            state.pop(name.rpartition(".")[0], None)  # the parameter of all experts
            expected = lowbit.quantize(weight.contiguous(), "int8_g32")
            assert torch.equal(module.quant_tensor().dequantize(), expected.dequantize())
            packed += weight.numel()
    assert sum(isinstance(m, QuantLinear) for m in loaded.modules()) == ARCHITECTURES[kind][2]
    own = dict(loaded.named_parameters()) | dict(loaded.named_buffers())
    for name, t in state.items():
        if name in own:
            assert torch.equal(own[name], t), name
    assert printed["written"]["packed"] == packed / printed["written"]["weights"]
    if kind in RUNS:
        reference = dequantized(wanted, loaded)
        assert torch.allclose(output(loaded, kind), output(reference, kind), atol=1e-4)


def test_a_streamed_folder_is_the_model(capsys, tmp_path: Path):
    """Tensor by tensor or through the model: the same checkpoint, also in another dtype."""
    dense("Llama").save_pretrained(tmp_path / "dense")
    for dtype in ("fp32", "bf16"):
        arguments = ("-f", "nf4", "--dtype", dtype)
        run(capsys, "quantize", tmp_path / "dense", tmp_path / f"a{dtype}", *arguments)
        model, rest = pretrained.load_dense_and_rest(
            tmp_path / "dense", {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
        )
        assert rest == []
        lowbit.quantize_model(model, "nf4", progress=False)
        pretrained.save_folder(model, tmp_path / "dense", tmp_path / f"b{dtype}")
        a, b = (load_file(tmp_path / f"{which}{dtype}" / "model.safetensors") for which in "ab")
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)


@pytest.mark.parametrize("kind", ["Llama", "GPTNeoX"])
def test_dtype_is_that_of_the_configuration(capsys, tmp_path: Path, kind: str):
    """An fp32 file with a bf16 configuration is a bf16 model, for transformers and here."""
    dense(kind).save_pretrained(tmp_path / "dense")
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    for given, asked, wanted in (
        ("bfloat16", (), torch.bfloat16),
        ("float16", ("--dtype", "bf16"), torch.bfloat16),
        (None, (), torch.float32),
    ):
        config["dtype"] = given
        (tmp_path / "dense" / "config.json").write_text(json.dumps(config))
        run(capsys, "quantize", tmp_path / "dense", tmp_path / "out", "-f", "int4_g32", *asked)
        stored = load_file(tmp_path / "out" / "model.safetensors")
        dtypes = {t.dtype for name, t in stored.items() if name.endswith("norm.weight")}
        assert dtypes == {wanted}
        loaded = pretrained.load_folder(tmp_path / "out")
        assert loaded.dtype == wanted
        if given is not None:
            assert loaded.config.dtype == wanted
    assert "dtype must be one of" in fail(
        capsys, "quantize", tmp_path / "dense", tmp_path / "out", "-f", "nf4", "--dtype", "int4"
    )


def copy(name: str):
    return lambda folder: shutil.copy(folder / "model.safetensors", folder / name)


def stale_shards(folder: Path) -> None:
    """An index of files that are gone: transformers reads model.safetensors first."""
    index = {"metadata": {}, "weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def adapter(folder: Path) -> None:
    save_file({"a": torch.ones(2)}, folder / "adapter_model.safetensors")


BESIDE = {
    "consolidated": (copy("consolidated.safetensors"), ["consolidated.safetensors"]),
    "variant": (copy("model.fp16.safetensors"), ["model.fp16.safetensors"]),
    "adapter": (adapter, ["adapter_model.safetensors"]),
    "index": (stale_shards, []),
    "nothing": (lambda folder: None, []),
}


@pytest.mark.parametrize("beside", BESIDE)
@pytest.mark.parametrize("sharded", [False, True])
def test_files_beside_the_checkpoint(capsys, tmp_path: Path, beside: str, sharded: bool):
    if sharded and beside == "index":
        pytest.skip("there is one index")
    prepare, ignored = BESIDE[beside]
    folder, out = tmp_path / "dense", tmp_path / "out"
    dense("Llama").save_pretrained(folder)
    expected = load_file(folder / "model.safetensors")
    prepare(folder)
    if sharded:
        (folder / "model.safetensors").unlink()
        dense("Llama").save_pretrained(folder, max_shard_size="20KB")
    printed = run_json(capsys, "quantize", folder, out, "-f", "int4_g32")
    assert printed["ignored"] == ignored
    text = run(capsys, "quantize", folder, out, "-f", "int4_g32")
    assert all(f"not read: {name}" in text for name in ignored)
    state = pretrained.load_folder(out).state_dict()
    assert torch.equal(state["model.embed_tokens.weight"], expected["model.embed_tokens.weight"])
    assert not (out / "consolidated.safetensors").exists()
    # A target that would be read in place of what is written.
    other = out / ("model.safetensors" if sharded else "model.safetensors.index.json")
    other.write_text("{}")
    assert "dst must hold no other checkpoint" in fail(
        capsys, "quantize", folder, out, "-f", "int4_g32"
    )


def test_names_without_the_prefix(capsys, tmp_path: Path):
    model = dense("Llama")
    model.save_pretrained(tmp_path / "dense")
    file = tmp_path / "dense" / "model.safetensors"
    old = {name.removeprefix("model."): t for name, t in load_file(file).items()}
    # As old checkpoints have it, no part of the model: said, and not written.
    old["rotary.extra"] = torch.ones(4)
    save_file(old, file, {"format": "pt"})
    printed = run_json(capsys, "quantize", tmp_path / "dense", tmp_path / "out", "-f", "int4_g32")
    assert printed["left"]["rotary.extra"] == "not part of a LlamaForCausalLM, and not written"
    loaded = pretrained.load_folder(tmp_path / "out")
    assert torch.allclose(
        output(loaded, "Llama"), output(dequantized(model, loaded), "Llama"), atol=1e-4
    )


def test_tensors_that_the_model_has_not(capsys, tmp_path: Path):
    """As checkpoints of old versions hold buffers: said, and not written."""
    model = dense("Llama")
    model.save_pretrained(tmp_path / "dense")
    file = tmp_path / "dense" / "model.safetensors"
    extra = {"model.layers.0.mlp.masked_bias": torch.ones(()), "model.old.weight": torch.ones(4, 4)}
    save_file({**load_file(file), **extra}, file, {"format": "pt"})
    printed = run_json(capsys, "quantize", tmp_path / "dense", tmp_path / "out", "-f", "int4_g32")
    assert printed["left"]["model.old.weight"] == "not part of a LlamaForCausalLM, and not written"
    assert len(printed["layers"]) == 14
    loaded = pretrained.load_folder(tmp_path / "out")
    assert torch.allclose(
        output(loaded, "Llama"), output(dequantized(model, loaded), "Llama"), atol=1e-4
    )


def test_budget_of_a_renamed_model(capsys, tmp_path: Path):
    """Without calibration, through the model."""
    dense("GPT2").save_pretrained(tmp_path / "dense")
    two = ("-f", "int2_g32", "-f", "int4_g32")
    printed = run_json(
        capsys, "quantize", tmp_path / "dense", tmp_path / "out", *two, "--budget", 3.5
    )
    assert {row["format"] for row in printed["layers"]} == {"int2_g32", "int4_g32"}
    assert len(printed["layers"]) == 8
    pretrained.load_folder(tmp_path / "out")


def test_a_skipped_conv1d_stays_as_it_is(capsys, tmp_path: Path):
    model = dense("GPT2")
    model.save_pretrained(tmp_path / "dense")
    arguments = ("quantize", tmp_path / "dense", tmp_path / "out", "-f", "int4_g32")
    run(capsys, *arguments, "--skip", "mlp")
    loaded = pretrained.load_folder(tmp_path / "out")
    block = loaded.transformer.h[0]
    assert isinstance(block.attn.c_attn, QuantLinear)
    assert type(block.mlp.c_fc) is Conv1D
    assert torch.equal(block.mlp.c_fc.weight, model.transformer.h[0].mlp.c_fc.weight)


def test_missing_weights_are_not_made_up(capsys, tmp_path: Path):
    """transformers would initialise them at random, and say so in a log."""
    dense("GPTNeoX").save_pretrained(tmp_path / "dense")
    file = tmp_path / "dense" / "model.safetensors"
    state = load_file(file)
    gone = next(name for name in state if name.endswith("dense_h_to_4h.weight"))
    del state[gone]
    save_file(state, file, {"format": "pt"})
    message = fail(capsys, "quantize", tmp_path / "dense", tmp_path / "out", "-f", "int4_g32")
    assert "lacks 1 weights of a GPTNeoXForCausalLM" in message
    assert not (tmp_path / "out").exists()


I32 = torch.zeros(8, 64, dtype=torch.int32)
FP8 = torch.zeros(128, 128).to(torch.float8_e4m3fn)
FOREIGN = {
    "GPTQ": {"l.qweight": I32, "l.qzeros": I32 + 1, "l.scales": torch.ones(8, 64).half(), "l.g_idx": I32[0].clone()},
    "AWQ": {"l.qweight": I32, "l.qzeros": I32 + 1, "l.scales": torch.ones(8, 64).half()},
    "FP8": {"l.weight": FP8, "l.weight_scale_inv": torch.ones(1, 1)},
    "float8_e4m3fn": {"l.weight": FP8, "l.weight_scale": torch.ones(())},
    "int8": {"l.weight": torch.zeros(8, 8, dtype=torch.int8), "l.weight_scale": torch.ones(8, 1)},
    "bitsandbytes, 4": {"l.weight": torch.zeros(64, 1, dtype=torch.uint8), "l.weight.absmax": torch.ones(2)},
    "bitsandbytes, 8": {"l.weight": torch.zeros(8, 8, dtype=torch.int8), "l.SCB": torch.ones(8)},
    "compressed-tensors": {"l.weight_packed": I32, "l.weight_scale": torch.ones(8, 4)},
    "MXFP4": {"e.down_proj_blocks": torch.zeros(2, 4, 4, 16, dtype=torch.uint8)},
}  # fmt: skip


@pytest.mark.parametrize("program", FOREIGN)
def test_quantized_tensors_are_recognized(capsys, tmp_path: Path, program: str):
    """Beside a dense matrix too, which would be quantized and the rest copied."""
    source, out = tmp_path / "a.safetensors", tmp_path / "out.safetensors"
    save_file({**FOREIGN[program], "dense.weight": torch.randn(32, 32)}, source)
    message = fail(capsys, "quantize", source, out, "-f", "int4_g32")
    assert "is quantized already" in message
    assert program in message
    assert "--quantized keep or requantize" in message
    assert not out.exists()


CONFIGURED = {
    "config.json": {"model_type": "llama", "quantization_config": {"quant_method": "fp8"}},
    "config.json nested": {"model_type": "x", "text_config": {"quantization_config": {"quant_method": "awq"}}},
    "config.json old": {"model_type": "llama", "compression_config": {"quant_method": "sparseml"}},
    "quantize_config.json": {"bits": 4},
    "quant_config.json": {"w_bit": 4},
    "hf_quant_config.json": {"quantization": {}},
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGURED)
@pytest.mark.parametrize("calibrated", [False, True])
def test_quantized_configurations_are_recognized(
    capsys, tmp_path: Path, name: str, calibrated: bool
):
    folder = tmp_path / "dense"
    dense("Llama").save_pretrained(folder)
    (folder / name.split()[0]).write_text(json.dumps(CONFIGURED[name]))
    (tmp_path / "t.txt").write_text("a b c")
    more = ("--method", "gptq", "--calibrate", tmp_path / "t.txt") if calibrated else ()
    message = fail(capsys, "quantize", folder, tmp_path / "out", "-f", "int4_g32", *more)
    assert "is quantized already" in message
    assert name.split()[0] in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("calibrated", [False, True])
def test_a_folder_says_that_lowbit_quantized_it(capsys, tmp_path: Path, calibrated: bool):
    """Every entry of lowbit reads it, and a model of it is free of it."""
    dense("Llama").save_pretrained(tmp_path / "dense")
    source, out, again = tmp_path / "dense", tmp_path / "out", tmp_path / "again"
    np.save(tmp_path / "t.npy", np.arange(64))
    more = (
        ("--method", "gptq", "--calibrate", tmp_path / "t.npy", "--length", 16)
        if calibrated
        else ()
    )
    run(capsys, "quantize", source, out, "-f", "int4_g32", *more)
    config = json.loads((out / "config.json").read_text())
    assert config.pop("quantization_config") == {"quant_method": "lowbit"}
    assert config == json.loads((source / "config.json").read_text())
    model = lowbit.load_model(out)
    assert not hasattr(model.config, "quantization_config")
    assert "int4_g32" in run(capsys, "info", out)
    run(capsys, "quantize", out, again, "-f", "int8_g32", "--quantized", "requantize")
    assert "quantization_config" in json.loads((again / "config.json").read_text())
    same = lowbit.load(dense("Llama"), out)
    ids = torch.arange(12)[None]
    with torch.inference_mode():
        assert torch.equal(same(ids).logits, model.to(torch.float32)(ids).logits)


@pytest.mark.parametrize("calibrated", [False, True])
def test_shards(capsys, tmp_path: Path, calibrated: bool):
    """The same tensors as in one file, for every entry."""
    dense("Llama").save_pretrained(tmp_path / "dense")
    np.save(tmp_path / "t.npy", np.arange(64))
    more = (
        ("--method", "gptq", "--calibrate", tmp_path / "t.npy", "--length", 16)
        if calibrated
        else ()
    )
    one, parts, again = (tmp_path / name for name in ("one", "parts", "again"))
    run(capsys, "quantize", tmp_path / "dense", one, "-f", "int4_g32", *more)
    size = ("--max-shard-size", "4KB")
    run(capsys, "quantize", tmp_path / "dense", parts, "-f", "int4_g32", *size, *more)
    assert len(list(parts.glob("*.safetensors"))) > 2
    assert (parts / "model.safetensors.index.json").is_file()
    state, expected = lowbit.load_model(parts).state_dict(), lowbit.load_model(one).state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(t, expected[name]) for name, t in state.items())
    described = [sorted(run(capsys, "info", path).splitlines()[1:]) for path in (one, parts)]
    assert described[0] == described[1]
    run(capsys, "quantize", parts, again, "-f", "int8_g32", "--quantized", "requantize", *size)
    assert len(list(again.glob("*.safetensors"))) > 2
    assert "got '4XB'" in fail(
        capsys,
        "quantize",
        tmp_path / "dense",
        tmp_path / "x",
        "-f",
        "nf4",
        "--max-shard-size",
        "4XB",
    )
    message = fail(capsys, "quantize", tmp_path / "dense", one, "-f", "nf4", *size)
    assert "must hold no other checkpoint" in message
    file = tmp_path / "dense" / "model.safetensors"
    message = fail(capsys, "quantize", file, tmp_path / "x.safetensors", "-f", "nf4", *size)
    assert "--max-shard-size is for folders of transformers" in message
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("calibrated", [False, True])
def test_its_own_checkpoints_are_refused(capsys, tmp_path: Path, calibrated: bool):
    dense("Llama").save_pretrained(tmp_path / "dense")
    run(capsys, "quantize", tmp_path / "dense", tmp_path / "out", "-f", "int4_g32")
    (tmp_path / "t.txt").write_text("a b c")
    more = ("--method", "gptq", "--calibrate", tmp_path / "t.txt") if calibrated else ()
    message = fail(capsys, "quantize", tmp_path / "out", tmp_path / "twice", "-f", "nf4", *more)
    assert "is a lowbit checkpoint already" in message


@pytest.mark.parametrize(
    "tensors",
    [
        {"norm.weight": torch.ones(8)},
        {"l.weight": torch.zeros(4, 4, dtype=torch.int64)},
        {"l.weight": torch.zeros(4, 4).to(torch.float8_e5m2)},
        {"conv.weight": torch.ones(2, 2, 2)},
        {"lm_head.weight": torch.ones(32, 32)},
    ],
)
def test_nothing_to_quantize_is_an_error(capsys, tmp_path: Path, tensors: dict):
    source, out = tmp_path / "a.safetensors", tmp_path / "out.safetensors"
    save_file(tensors, source)
    for more in (("-f", "nf4"), ("-f", "nf4", "-f", "int8", "--budget", 6)):
        assert "nothing to quantize" in fail(capsys, "quantize", source, out, *more)
    assert not out.exists()


def test_a_wrong_copy_is_not_called_done(capsys, tmp_path: Path, monkeypatch):
    """What is written is compared with the model that config.json describes."""
    dense("Llama").save_pretrained(tmp_path / "dense")
    right = pretrained.set_dtype

    def spoil(folder, dtype):
        right(folder, dtype)
        file = Path(folder) / "config.json"
        file.write_text(
            file.read_text().replace('"intermediate_size": 64', '"intermediate_size": 96')
        )

    monkeypatch.setattr(pretrained, "set_dtype", spoil)
    arguments = ("quantize", tmp_path / "dense", tmp_path / "out", "-f", "nf4", "--dtype", "fp32")
    for old in (False, True):
        if old:
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "config.json").write_text("old")
        message = fail(capsys, *arguments)
        assert "has shape (96, 32) in the model, (64, 32) in the file" in message
        assert f"as it would not load: {tmp_path / 'out'} does not fit the model" in message
        assert sorted(p.name for p in tmp_path.iterdir()) == (
            ["dense", "out"] if old else ["dense"]
        )
    assert [(p.name, p.read_text()) for p in (tmp_path / "out").iterdir()] == [
        ("config.json", "old")
    ]


@pytest.mark.parametrize("kind", ["Llama", "GPT2"], ids=["by tensors", "by the model"])
def test_a_folder_is_written_whole_or_not_at_all(kind, capsys, tmp_path: Path, monkeypatch):
    dense(kind).save_pretrained(tmp_path / "dense")
    arguments = ("quantize", tmp_path / "dense", tmp_path / "new" / "out", "-f", "nf4")
    seen, right = [], pretrained.check_folder

    def check(folder):
        seen.append({p.name for p in Path(folder).iterdir()})
        assert not [p for p in (tmp_path / "new" / "out").iterdir() if p != folder]
        right(folder)
        raise ValueError("no")

    with monkeypatch.context() as m:
        m.setattr(pretrained, "check_folder", check)
        assert "no" in fail(capsys, *arguments)
    assert [p.name for p in tmp_path.iterdir()] == ["dense"]
    run(capsys, *arguments)
    assert seen == [{p.name for p in (tmp_path / "new" / "out").iterdir()}]
    assert "model.safetensors" in seen[0]
