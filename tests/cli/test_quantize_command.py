"""lowbit quantize from end to end: a tiny Llama with a tokenizer, calibrated, loaded again, reported."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

transformers = pytest.importorskip("transformers")
gguf = pytest.importorskip("gguf")

from test_cli import fail, run, run_json  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402

import lowbit  # noqa: E402
from lowbit.integrations.pretrained import (  # noqa: E402
    calibration_tokens,
    load_dense,
    load_folder,
    save_folder,
)
from lowbit.ptq import (  # noqa: E402
    Recipe,
    Rule,
    allocate,
    collect_importance,
    load_importance,
    quantize_model,
)

WORDS = [f"w{i}" for i in range(60)]
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as `save_pretrained` leaves it, bf16, with a tied head and a tokenizer of words."""
    path = tmp_path_factory.mktemp("models") / "dense"
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        tie_word_embeddings=True, bos_token_id=0, eos_token_id=1, initializer_range=0.2,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight *= 4
            layer.self_attn.q_proj.weight *= 0.25
    model.save_pretrained(path)
    vocabulary = {word: i for i, word in enumerate(["<s>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven lines of twenty words, and a blank one."""
    rng = np.random.default_rng(0)
    lines = [" ".join(rng.choice(WORDS, 20)) for _ in range(7)]
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n".join([*lines[:3], " ", *lines[3:]]) + "\n")
    return path


TOKENS = torch.arange(24).view(2, 12)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(TOKENS).logits


def only_report(printed: dict) -> dict:
    """What the command prints without what it adds to the report."""
    return {key: value for key, value in printed.items() if key not in ("written", "ignored")}


def test_gptq_from_end_to_end(capsys, folder, text, tmp_path):
    """What the command writes and `load_folder` reads is the model that is quantized in memory."""
    target = tmp_path / "small"
    report = run_json(
        capsys, "quantize", folder, target, "--method", "gptq", "--format", "kmeans3_g32",
        "--calibrate", text, "--length", 32, "--option", "act_order=true", "--skip", "down_proj",
    )  # fmt: skip
    batches = calibration_tokens(text, folder, length=32)
    # 140 words: four windows of 32, and a rest that is left out.
    assert [tuple(batch.shape) for batch in batches] == [(1, 32)] * 4
    model = load_dense(folder)
    wanted = quantize_model(
        model, "kmeans3_g32", method="gptq", calibration=batches, options={"act_order": True},
        skip=("lm_head", "down_proj"), progress=False,
    )  # fmt: skip
    assert only_report(report) == json.loads(json.dumps(wanted.to_dict()))
    assert len(report["layers"]) == 2 * (len(LINEARS) - 1)
    loaded = load_folder(target)
    assert loaded.dtype == torch.bfloat16
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert not any(t.is_meta for t in (*loaded.parameters(), *loaded.buffers()))
    assert torch.equal(logits(loaded), logits(model))
    names = {path.name for path in target.iterdir()}
    assert names == {path.name for path in folder.iterdir()}
    prompt = {"input_ids": TOKENS, "attention_mask": torch.ones_like(TOKENS), "do_sample": False}
    assert torch.equal(
        *(m.generate(**prompt, max_new_tokens=4, pad_token_id=1) for m in (loaded, model))
    )
    x = torch.randn(2, 64, dtype=torch.bfloat16)
    qt = loaded.model.layers[0].self_attn.q_proj.quant_tensor()
    assert "reference" not in str(lowbit.explain(x, qt).selected)
    assert run_json(capsys, "info", target)["quantized_bits_per_weight"] == wanted.bits_per_weight


def test_budget_and_report(capsys, folder, text, tmp_path):
    plots = tmp_path / "plots"
    arguments = [
        "quantize", folder, tmp_path / "small", "-f", "int2_g32", "-f", "int3_g32", "-f", "int4_g32",
        "--budget", 3.5, "--calibrate", text, "--length", 64, "--report", plots,
    ]  # fmt: skip
    report = run_json(capsys, *arguments)
    assert report["bits_per_weight"] == report["allocation"]["bits_per_weight"] <= 3.5
    assert report["allocation"]["error"] < report["allocation"]["uniform"]["int3_g32"][1]
    formats = {row["format"] for row in report["layers"]}
    assert len(formats) > 1
    written = json.loads((plots / "report.json").read_text())
    assert written["allocation"] == report.pop("allocation")
    assert written["report"] == only_report(report)
    for name in ("error_per_layer", "error_over_bits", "codebooks"):
        # The eight bytes that every PNG starts with.
        assert (plots / f"{name}.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    # The recipe makes the same checkpoint, now without a budget.
    again = tmp_path / "again"
    printed = run(capsys, "quantize", folder, again, "--recipe", plots / "recipe.toml")
    assert (plots / "report.txt").read_text().startswith(printed.splitlines()[0])
    states = [load_folder(path).state_dict() for path in (tmp_path / "small", again)]
    assert states[0].keys() == states[1].keys()
    for name, t in states[0].items():
        if isinstance(t, torch.Tensor):
            assert torch.equal(t, states[1][name]), name


def test_budget_of_a_file(capsys, tmp_path):
    weights = {f"{name}.weight": torch.randn(64, 64) * size for name, size in (("a", 1), ("b", 9))}
    source, target = tmp_path / "dense.safetensors", tmp_path / "out.safetensors"
    save_file({**weights, "norm.weight": torch.ones(64)}, source)
    arguments = ["quantize", source, target, "-f", "int2_g32", "-f", "int4_g32", "--budget", 3.5]
    printed = run(capsys, *arguments, "--report", tmp_path / "plots")
    state = lowbit.io.save_load.load_tensors(target)
    assert {name: state[name].format.name for name in "ab"} == {"a": "int2_g32", "b": "int4_g32"}
    assert "3.500" in printed
    assert (tmp_path / "plots" / "codebooks.png").exists()


def test_recipe_with_calibration(capsys, folder, text, tmp_path):
    recipe = Recipe({"q_proj": Rule("int4_g32", "gptq", {"block": 32}), "mlp": "nf4"})
    recipe.save(tmp_path / "r.json")
    arguments = ("quantize", folder, tmp_path / "small", "--recipe", tmp_path / "r.json")
    report = run_json(capsys, *arguments, "--calibrate", text, "--length", 20, "--per-line")
    batches = calibration_tokens(text, folder, length=20, per_line=True)
    assert len(batches) == 7
    wanted = quantize_model(load_dense(folder), recipe, calibration=batches, progress=False)
    assert only_report(report) == json.loads(json.dumps(wanted.to_dict()))
    capsys.readouterr()  # bars of transformers
    assert "method 'gptq' needs calibration" in fail(capsys, *arguments)


def test_imatrix_is_saved_and_used(capsys, folder, text, tmp_path):
    """Saved beside a format that learns nothing; then instead of text."""
    file, target = tmp_path / "m.gguf", tmp_path / "out"
    run(
        capsys, "quantize", folder, tmp_path / "first", "-f", "int8", "--calibrate", text,
        "--length", 20, "--per-line", "--save-imatrix", file,
    )  # fmt: skip
    model = load_dense(folder)
    statistics = collect_importance(
        model, calibration_tokens(text, folder, length=20, per_line=True)
    )
    found = load_importance(file, model)
    assert found.keys() == statistics.keys()
    for name, values in found.items():
        torch.testing.assert_close(values, statistics[name].diagonal, rtol=3e-7, atol=0)
    report = run_json(capsys, "quantize", folder, target, "-f", "kmeans3_g32", "--imatrix", file)
    skip = ("lm_head", r"\w*embed\w*")
    wanted = quantize_model(model, "kmeans3_g32", skip=skip, importance=file)
    assert only_report(report) == json.loads(json.dumps(wanted.to_dict()))
    assert len(report["layers"]) == 14
    assert torch.equal(logits(load_folder(target)), logits(model))
    # With a budget it says what errors count, or, beside text, only what methods learn.
    two = ("-f", "km2_g16", "-f", "km4", "--budget", 3.5, "--imatrix", file)
    report = run_json(capsys, "quantize", folder, tmp_path / "mixed", *two)
    dense = load_dense(folder)
    names = ["km2_g16", "km4"]
    allocation = allocate(dense, names, 3.5, skip=skip, importance=file, progress=False)
    assert report.pop("allocation") == json.loads(json.dumps(allocation.to_dict()))
    wanted = quantize_model(dense, allocation.recipe, skip=skip, importance=file, progress=False)
    assert only_report(report) == json.loads(json.dumps(wanted.to_dict()))
    measured = ("--calibrate", text, "--length", 20, "--samples", 1, "--objective", "measured")
    report = run_json(capsys, "quantize", folder, tmp_path / "measured", *two, *measured)
    assert report["bits_per_weight"] <= 3.5
    assert report["allocation"]["error"] != allocation.error
    assert "general.type is 'model'; expected 'imatrix'" in fail(
        capsys,
        "quantize",
        folder,
        tmp_path / "no",
        "-f",
        "kmeans3",
        "--imatrix",
        gguf_model(tmp_path),
    )
    assert not (tmp_path / "no").exists()


def test_an_imatrix_is_for_models(capsys, tmp_path):
    source = tmp_path / "dense.safetensors"
    save_file({"a.weight": torch.randn(64, 64)}, source)
    for options, message in (
        (
            ("-f", "kmeans3"),
            f"--imatrix is for folders of transformers and GGUF files, got {source}",
        ),
        (("--quantized", "keep"), "give it without --imatrix"),
        (("-f", "km3", "--calibrate", "t"), "give it without --calibrate, or with --budget, too"),
        (
            ("-f", "km3", "-f", "km4", "--budget", 3, "--method", "gptq", "--calibrate", "t"),
            "method 'gptq' learns from --calibrate: give it without --imatrix",
        ),
    ):
        arguments = ("quantize", source, tmp_path / "out.safetensors", "--imatrix", "m", *options)
        assert message in fail(capsys, *arguments)
    assert not (tmp_path / "out.safetensors").exists()


def test_awq_changes_norms_too(capsys, folder, text, tmp_path):
    run(
        capsys, "quantize", folder, tmp_path / "out", "-f", "int4_g32", "--method", "awq",
        "--option", "grid=4", "--calibrate", text, "--length", 20, "--per-line",
    )  # fmt: skip
    model = load_dense(folder)
    before = model.model.layers[0].input_layernorm.weight.detach().clone()
    batches = calibration_tokens(text, folder, length=20, per_line=True)
    quantize_model(model, "int4_g32", method="awq", options={"grid": 4}, calibration=batches)
    loaded = load_folder(tmp_path / "out")
    assert not torch.equal(loaded.model.layers[0].input_layernorm.weight, before)
    assert torch.equal(logits(loaded), logits(model))


def gguf_model(tmp_path: Path) -> Path:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_type("model")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return tmp_path / "model.gguf"


def test_calibration_tokens(folder, text, tmp_path):
    ids = np.arange(100, dtype=np.int32) % 64
    np.save(tmp_path / "stream.npy", ids)
    np.save(tmp_path / "rows.npy", ids.reshape(5, 20))
    save_file({"ids": torch.from_numpy(ids.reshape(5, 20))}, tmp_path / "rows.safetensors")

    def tokens(name, **arguments):
        return torch.cat(calibration_tokens(tmp_path / name, folder, **arguments)).numpy()

    assert np.array_equal(tokens("stream.npy", length=30), ids[:90].reshape(3, 30))
    assert np.array_equal(tokens("stream.npy", length=50)[0], ids[:50])
    for name in ("rows.npy", "rows.safetensors"):
        assert np.array_equal(tokens(name, length=64), ids.reshape(5, 20))
        assert np.array_equal(tokens(name, length=7), ids.reshape(5, 20)[:, :7])
    chosen = [tokens("rows.npy", length=64, samples=2, seed=seed)[:, 0] for seed in (0, 0, 1, 2)]
    assert np.array_equal(chosen[0], chosen[1])
    assert {tuple(c) for c in chosen} - {tuple(chosen[0])}
    assert all(len(c) == 2 and set(c) <= set(ids[::20]) for c in chosen)
    words = text.read_text().split()
    whole = torch.cat(calibration_tokens(text, folder, length=14), 1)[0]
    assert whole.tolist() == [3 + WORDS.index(word) for word in words]
    short = tmp_path / "short.txt"
    short.write_text("w1 nothing w2")
    assert calibration_tokens(short, folder, length=64)[0].tolist() == [[4, 2, 5]]


def test_bad_calibration(folder, text, tmp_path):
    np.save(tmp_path / "float.npy", np.ones(9))
    np.save(tmp_path / "cube.npy", np.ones((2, 2, 2), int))
    np.save(tmp_path / "none.npy", np.ones((0, 4), int))
    np.save(tmp_path / "high.npy", np.array([3, 64]))
    np.save(tmp_path / "low.npy", np.array([3, -1]))
    (tmp_path / "damaged.npy").write_bytes(b"no")
    (tmp_path / "blank.txt").write_text(" \n")
    (tmp_path / "latin.txt").write_bytes(b"\xe9t\xe9")
    save_file({"a": torch.ones(2), "b": torch.ones(2)}, tmp_path / "two.safetensors")
    save_file({"a": torch.ones(2)}, tmp_path / "float.safetensors")
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(folder / "config.json", bare)
    bad = [
        ("float.npy", {}, ValueError, "float.npy: token ids must be integers, got float64"),
        ("float.safetensors", {}, ValueError, "must be integers, got torch.float32"),
        ("two.safetensors", {}, ValueError, "must hold one tensor of token ids, got 2"),
        ("cube.npy", {}, ValueError, r"must be \(n, tokens\) or \(tokens,\)"),
        ("none.npy", {}, ValueError, "calibration is empty, it holds no tokens"),
        ("high.npy", {}, ValueError, r"token 64 is not in \[0, 64\)"),
        ("low.npy", {}, ValueError, r"token -1 is not in \[0, 64\)"),
        ("damaged.npy", {}, ValueError, "damaged.npy: not a .npy file"),
        ("blank.txt", {}, ValueError, "calibration is empty"),
        ("blank.txt", {"per_line": True}, ValueError, "calibration is empty"),
        ("latin.txt", {}, ValueError, "latin.txt: not a text in UTF-8"),
        ("high.npy", {"per_line": True}, ValueError, "only text has lines"),
        ("nothing.txt", {}, FileNotFoundError, "calibration must be a file"),
        ("high.npy", {"length": 0}, ValueError, "at least 1, got 0"),
        ("high.npy", {"length": 65}, ValueError, "at most 64, the positions of the model, got 65"),
        (text, {"folder": bare}, ValueError, "bare: there is no tokenizer"),
        (text, {"folder": tmp_path}, FileNotFoundError, "with a config.json"),
    ]
    for name, arguments, error, message in bad:
        given = {"length": 64, "folder": folder, **arguments}
        with pytest.raises(error, match=message):
            calibration_tokens(tmp_path / name, **given)
    with pytest.raises(ValueError, match="bare: transformers cannot load the model"):
        load_dense(bare)
    with pytest.raises(ValueError, match="dst must not be src"):
        save_folder(torch.nn.Linear(2, 2), bare, bare)


def test_bad_combinations_are_one_line(capsys, folder, text, tmp_path):
    recipe = tmp_path / "r.toml"
    Recipe({"up_proj": "nf4"}).save(recipe)
    two = ("-f", "int2_g32", "-f", "int4_g32")
    bad = [
        ((), "give --format or --recipe, one of the two"),
        (("-f", "nf4", "--recipe", recipe), "give --format or --recipe, one of the two"),
        (("--recipe", recipe, "--budget", 3), "--budget chooses between formats, and a recipe"),
        (("--recipe", tmp_path / "no.toml"), "no.toml"),
        (two, "several formats are candidates for --budget"),
        (("-f", "nf4", "--budget", 3), "give --format several times"),
        ((*two, "--budget", 2.1), "the smallest possible is 2.5"),
        ((*two, "--budget", "nan"), "must be positive and finite"),
        (("-f", "nf5"), "unknown format 'nf5'"),
        (("-f", "nf4", "--method", "best"), "method must be one of"),
        (("-f", "nf4", "--method", "gptq"), "method 'gptq' needs --calibrate FILE"),
        (
            ("-f", "nf4", "--calibrate", text),
            "--calibrate is for --budget, or a method that learns",
        ),
        (("-f", "nf4", "--method", "rtn", "--calibrate", text), "that learns, not rtn"),
        (("-f", "nf4", "--length", 32), "--length is for --calibrate, which is not given"),
        (("-f", "nf4", "--per-line"), "--per-line is for --calibrate"),
        (("-f", "nf4", "--method", "awq"), "method 'awq' needs --calibrate FILE"),
        (
            (*two, "--budget", 3, "--method", "awq", "--calibrate", text),
            "method 'awq' takes no --budget",
        ),
        (
            ("-f", "nf4", "--method", "smoothquant", "--calibrate", text, "--option", "grid=3"),
            "method 'smoothquant' takes no grid",
        ),
        (("-f", "nf4", "--save-imatrix", "m"), "--save-imatrix is for --calibrate"),
        (("-f", "nf4", "--imatrix", "m", "--calibrate", text), "give it without --calibrate"),
        ((*two, "--imatrix", "m", "--budget", 3), "method 'rtn' takes no importance: use 'search'"),
        (("-f", "kmeans3", "--imatrix", tmp_path / "m"), f"no file {tmp_path / 'm'}"),
        ((*two, "--budget", 3, "--objective", "loss"), "--objective must be one of"),
        ((*two, "--budget", 3, "--objective", "output"), "--objective is for --calibrate"),
        (
            ("-f", "nf4", "--method", "gptq", "--calibrate", text, "--objective", "output"),
            "--objective is for --budget",
        ),
        (("-f", "nf4", "--option", "block=3"), "--option is for a method"),
        (("-f", "nf4", "--method", "gptq", "--option", "block"), "must be KEY=VALUE"),
        (("-f", "nf4", "--method", "gptq", "--option", "block=x"), "--option block: value must be"),
        (("-f", "nf4", "--method", "rtn", "--option", "block=3"), "method 'rtn' takes no block"),
        (
            ("-f", "nf4", "--method", "gptq", "--calibrate", text, "--option", "block=1.5"),
            "block of method 'gptq' must be int, got 1.5",
        ),
        (
            ("-f", "nf4", "--method", "gptq", "--calibrate", text, "--length", 99),
            "length must be at most 64",
        ),
        (
            ("-f", "nf4", "--method", "gptq", "--calibrate", tmp_path / "no.txt", "--length", 64),
            "no.txt",
        ),
    ]
    for arguments, message in bad:
        assert message in fail(capsys, "quantize", folder, tmp_path / "out", *arguments)
    gptq = ("-f", "nf4", "--method", "gptq", "--calibrate", text, "--length", 64)
    assert "dst must not be src" in fail(capsys, "quantize", folder, folder, *gptq)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "model.safetensors.index.json").write_text("{}")
    assert "no other checkpoint" in fail(capsys, "quantize", folder, tmp_path / "full", *gptq)
    assert "config.json" in fail(capsys, "quantize", tmp_path, tmp_path / "out", *gptq)
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_a_head_class_is_kept(folder, tmp_path):
    """The class is that of config.json, not the headless or the causal one of its kind."""
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=48, num_labels=3,
    )  # fmt: skip
    dense = transformers.BertForSequenceClassification(config).eval()
    dense.save_pretrained(tmp_path / "dense")
    model = load_dense(tmp_path / "dense")
    assert type(model) is transformers.BertForSequenceClassification
    assert torch.equal(logits(model), logits(dense))
    quantize_model(model, "int4_g32", progress=False)
    save_folder(model, tmp_path / "dense", tmp_path / "small")
    loaded = load_folder(tmp_path / "small")
    assert type(loaded) is type(dense)
    assert torch.equal(logits(loaded), logits(model))
    Path(tmp_path / "small" / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError):
        load_folder(tmp_path / "small")


MISSING = [
    (
        "matplotlib",
        "matplotlib.figure",
        "lowbit.ptq.plots",
        "-f nf4 --report r",
        "lowbit[plots]",
    ),
    (
        "transformers",
        "transformers",
        "lowbit.integrations.pretrained",
        "-f nf4 --method gptq --calibrate t.txt",
        "lowbit[models]",
    ),
]


@pytest.mark.parametrize(
    ("package", "gone", "module", "arguments", "extra"), MISSING, ids=[m[0] for m in MISSING]
)
def test_missing_packages_are_named(package, gone, module, arguments, extra, capsys, monkeypatch):
    """As if neither the package nor what imports it had been imported."""
    parent, _, name = module.rpartition(".")
    monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.delattr(sys.modules[parent], name, raising=False)
    monkeypatch.setitem(sys.modules, gone, None)
    message = fail(capsys, "quantize", "a", "b", *arguments.split())
    assert message.startswith(f"lowbit: {package} is not installed")
    assert extra in message


def test_options_have_the_values_of_json():
    from lowbit.cli.quantize import parse_options

    assert parse_options(["a=true", "b=1", "c=0.5", 'd="x=y"']) == (
        ("a", True),
        ("b", 1),
        ("c", 0.5),
        ("d", "x=y"),
    )
    for given in (["a"], ["=1"], ["a=1", "a=2"]):
        with pytest.raises(ValueError, match="KEY=VALUE, each key once"):
            parse_options(given)
