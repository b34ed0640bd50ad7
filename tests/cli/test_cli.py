"""The command line: what is printed, that --json is one object, and that bad input is one line and status 1."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import lowbit
from lowbit.backends import available
from lowbit.cli import bench, main
from lowbit.formats import all_formats, parse

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The output of a command that must succeed."""
    with pytest.raises(SystemExit) as ended:
        main.main([str(a) for a in arguments])
    output = capsys.readouterr()
    assert ended.value.code == 0, output.err
    return output.out


def run_json(capsys: pytest.CaptureFixture[str], *arguments: object) -> Any:
    """The JSON object of a command; anything else on stdout is an error."""
    return json.loads(run(capsys, *arguments, "--json"))


def fail(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The message of a command that must fail on its input."""
    with pytest.raises(SystemExit) as ended:
        main.main([str(a) for a in arguments])
    output = capsys.readouterr()
    assert ended.value.code == 1
    assert output.out == ""
    lines = output.err.splitlines()
    assert len(lines) == 1, output.err
    assert lines[0].startswith("lowbit: ")
    return lines[0]


def model() -> nn.Module:
    layers = {"proj": nn.Linear(96, 70), "norm": nn.LayerNorm(70), "lm_head": nn.Linear(70, 8)}
    return nn.ModuleDict(layers)


@pytest.fixture
def dense_file(tmp_path: Path) -> Path:
    path = tmp_path / "dense.safetensors"
    save_file(model().state_dict(), path)
    return path


def test_formats(capsys: pytest.CaptureFixture[str]) -> None:
    lines = run(capsys, "formats").splitlines()
    printed = {line.split()[0]: line.split()[-1] for line in lines[1:]}
    assert set(printed) == set(all_formats())
    # 4 bits and an fp16 scale per 64; 8/5 bits and one per 128; a table of 256 fp32 per row of 4096.
    assert printed["nf4"] == "4.250"
    assert printed["ternary_trits"] == f"{820 * 8 / 4096 + 16 / 128:.3f}"
    assert printed["kmeans8_pr"] == f"{8 + 256 * 32 / 4096:.3f}"


def test_bits_per_weight_is_that_of_a_weight() -> None:
    for name in ("nf4_g64_dq8", "nvfp4", "uint3", "kmeans3_pr"):
        qt = lowbit.quantize(torch.randn(64, 300), name)
        assert main.bits_per_weight(parse(name), 64, 300) == qt.bits_per_weight


def test_quantize_and_info(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, dense_file: Path
) -> None:
    target = tmp_path / "out.safetensors"
    report = run_json(capsys, "quantize", dense_file, target, "--format", "int4_g32")
    assert [row["name"] for row in report["layers"]] == ["proj"]

    loaded = lowbit.load(model(), target)
    weight = loaded["proj"].quant_tensor()
    assert weight.format == parse("int4_g32")
    assert isinstance(loaded["lm_head"], nn.Linear)

    found = run_json(capsys, "info", target)
    rows = {row["name"]: row for row in found["tensors"]}
    assert rows["proj"] == {
        "name": "proj",
        "format": "int4_g32",
        "shape": [70, 96],
        "bytes": weight.nbytes,
        "quantized": True,
    }
    assert found["quantized_bits_per_weight"] == weight.bits_per_weight == 4.5
    dense = sum(4 * t.numel() for n, t in model().state_dict().items() if n != "proj.weight")
    assert found["bytes"] == weight.nbytes + dense
    assert found["weights"] == sum(p.numel() for p in model().parameters())
    text = run(capsys, "info", target)
    assert f"{weight.nbytes:,}" in text
    assert "70x96" in text

    nothing = tmp_path / "none.safetensors"
    message = fail(capsys, "quantize", dense_file, nothing, "-f", "nf4", "--skip", "proj")
    assert "nothing to quantize: 2 x skipped" in message
    assert not nothing.exists()


def test_info_of_a_gguf_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    if importlib.util.find_spec("gguf") is None:
        pytest.skip("gguf is not installed")
    import numpy as np
    from gguf import GGMLQuantizationType as GGMLType

    from gguf_files import random_blocks, write

    blocks = random_blocks(GGMLType.IQ4_NL, 3, 2, np.random.default_rng(0))
    tensors = {"w": (blocks, GGMLType.IQ4_NL), "norm": (np.ones(64, np.float32), None)}
    path = write(tmp_path / "m.gguf", tensors)
    found = run_json(capsys, "info", path)
    assert [(r["name"], r["format"], r["quantized"]) for r in found["tensors"]] == [
        ("w", "iq4_nl", True),
        ("norm", "f32", False),
    ]
    assert found["quantized_bits_per_weight"] == 18 * 8 / 32
    assert found["bits_per_weight"] == 8 * (blocks.nbytes + 256) / (3 * 64 + 64)


@pytest.mark.parametrize("dtype", ("fp32", "bf16", "fp16"))
def test_explain(capsys: pytest.CaptureFixture[str], dtype: str) -> None:
    arguments = ("explain", "--shape", "70,96", "-m", 3, "--format", "nf4_g32", "--dtype", dtype)
    x = torch.zeros(3, 96, dtype=DTYPES[dtype])
    expected = lowbit.explain(x, lowbit.quantize(torch.randn(70, 96), "nf4_g32"))
    assert run_json(capsys, *arguments) == json.loads(json.dumps(dataclasses.asdict(expected)))
    text = run(capsys, *arguments)
    assert text == f"{expected}\n"
    assert expected.selected in {row["name"] for row in lowbit.kernels()}
    for row in expected.kernels:
        assert (row.cost is None) != (row.reason is None)


def test_bench(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "cache_bytes", lambda: 1 << 16)
    arguments = ["bench", "--shape", "64,96", "--seconds", 0.01, "--threads", 1]
    arguments += ["-f", "nf4_g32", "-f", "kmeans2", "-m", 1, "-m", 5, "--dtype", "fp32"]
    found = run_json(capsys, *arguments)
    assert found["threads"] == 1
    cases = [(r["format"], r["m"], r["n"], r["k"], r["dtype"]) for r in found["results"]]
    assert cases == [(f, m, 64, 96, "float32") for f in ("nf4_g32", "kmeans2") for m in (1, 5)]
    for r in found["results"]:
        assert r["us"] > 0
        assert r["speedup"] == pytest.approx(r["dense_us"] / r["us"])
        assert r["gflops"] == pytest.approx(2 * r["m"] * 64 * 96 / r["us"] / 1e3)
        least = 64 * 96 * (4 if r["format"] == "nf4_g32" else 2) / 8
        assert r["gb_per_second"] > least / r["us"] / 1e3
    text = run(capsys, *arguments)
    assert all(r["kernel"] in text for r in found["results"])


HOSTILE = (
    "[/x]",
    "[red]w",
    "w\x1b[2J\x1b]0;title\x07",
    "a\nb\r",
    "x\u202egnp",
    ":smile:",
    "\x9b1m",
)


def shown(text: str) -> str:
    """What a terminal shows of it: ESC and the like as Python writes them."""
    return text if text.isprintable() else repr(text)[1:-1]


@pytest.mark.filterwarnings("ignore:.* of the weights stay dense")
@pytest.mark.parametrize("name", HOSTILE)
def test_names_in_files_are_shown_and_not_obeyed(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str
) -> None:
    """Neither as markup nor as control characters: in tables, reports and errors."""
    weight = torch.randn(32, 32)
    path = lowbit.save(
        {name: lowbit.quantize(weight, "int4_g32"), name + "d": weight}, tmp_path / "a.safetensors"
    )
    dense = tmp_path / "dense.safetensors"
    save_file({name + ".weight": weight, name + "d": weight.clone()}, dense)
    texts = {
        "info": run(capsys, "info", path),
        "quantize": run(capsys, "quantize", dense, tmp_path / "out.safetensors", "-f", "int4"),
        "path": fail(capsys, "info", tmp_path / f"absent{name}"),
        "format": fail(capsys, "explain", "--shape", "8,8", "-f", name),
    }
    for command, text in texts.items():
        assert all(c.isprintable() or c == "\n" for c in text), command
        quoted = command in ("format", "path") and repr(name)[1:-1] in text
        assert shown(name) in text or quoted, command
    assert run_json(capsys, "info", path)["tensors"][0]["name"] == name


def test_long_errors_are_cut(capsys: pytest.CaptureFixture[str]) -> None:
    """A file may name a format of megabytes."""
    message = fail(capsys, "explain", "--shape", "8,8", "-f", "x" * 10_000 + "end")
    assert len(message) < 2100
    assert message.startswith("lowbit: unknown format 'xxx")


def test_json_has_no_nan(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Python writes NaN and Infinity, which no other parser reads."""
    from lowbit.text import as_json

    data = {"a": [float("nan"), 1.5], "b": {"c": float("inf")}, "d": (1, -float("inf"), "\udc80")}
    text = as_json(data)
    strict = json.loads(text, parse_constant=lambda name: pytest.fail(name))
    assert strict == {"a": [None, 1.5], "b": {"c": None}, "d": [1, None, "\udc80"]}


def test_version(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(main.importlib.metadata, "version", {"lowbit": "1.2.3"}.__getitem__)
    assert run(capsys, "--version") == "1.2.3\n"


def test_bench_refuses_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "cache_bytes", lambda: 1 << 16)
    right = bench.linear
    monkeypatch.setattr(bench, "linear", lambda x, w: right(x, w) * 1.01)
    with pytest.raises(RuntimeError, match="is wrong on QuantTensor"):
        bench.bench(["int4_g32"], [(64, 96)], [1], torch.float32, 0.01)


def test_bench_weights_exceed_twice_the_cache() -> None:
    assert bench.cache_bytes() >= 1 << 18
    nbytes = 1000
    assert bench._num_copies(nbytes) * nbytes > 2 * bench.cache_bytes()


def test_run_passes_its_options(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = pytest.importorskip("lowbit.cli.run")
    asked = []
    monkeypatch.setattr(module, "run", asked.append)
    run(capsys, "run")
    run(
        capsys, "run", "--prompt", "Hi", "--model", "m.gguf", "--format", "nf4", "--max-new-tokens", 3,
        "--threads", 2, "--dtype", "fp32", "--compare", "--json",
    )  # fmt: skip
    assert asked[0] == module.RunOptions()
    assert asked[1] == module.RunOptions(
        prompt="Hi",
        model=Path("m.gguf"),
        format="nf4",
        max_new_tokens=3,
        threads=2,
        dtype="fp32",
        compare=True,
        json=True,
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    (
        (
            ("explain", "--shape", "70", "-f", "nf4"),
            "shape must be N,K with positive integers below 2^31, got '70'",
        ),
        (("explain", "--shape", f"8,{2**31}", "-f", "nf4"), "got '8,2147483648'"),
        (("explain", "--shape", "70,0", "-f", "nf4"), "got '70,0'"),
        (("explain", "--shape", "8,8", "-f", "nf5"), "unknown format 'nf5'"),
        (("explain", "--shape", "8,8", "-f", "nf4", "--dtype", "fp64"), "dtype must be one of"),
        (("bench", "--shape", "a,b"), "got 'a,b'"),
        (("bench", "--seconds", "0"), "rows and seconds must be positive and finite"),
        (("bench", "--seconds", "nan"), "rows and seconds must be positive and finite"),
        (("bench", "--seconds", "inf"), "rows and seconds must be positive and finite"),
        (("bench", "--m", "0"), "rows and seconds must be positive and finite"),
        (("info", "absent.safetensors"), "absent.safetensors"),
        (("info", "absent.gguf"), "absent.gguf"),
        (("quantize", "absent.safetensors", "out.safetensors", "-f", "nf4"), "absent.safetensors"),
        (("run", "--model", "absent.gguf"), "absent.gguf"),
        (("run", "--prompt", " "), "prompt must not be empty"),
        (("run", "--dtype", "fp64"), "dtype must be one of"),
    ),
)
def test_bad_input_is_one_line(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in fail(capsys, *arguments)


def test_damaged_files_are_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, dense_file: Path
) -> None:
    for name in ("bad.gguf", "bad.safetensors"):
        path = tmp_path / name
        path.write_bytes(b"GGUF\x03\0\0\0" + b"\xff" * 40)
        assert str(path) in fail(capsys, "info", path)
    before = dense_file.read_bytes()
    assert str(dense_file) in fail(capsys, "quantize", dense_file, dense_file, "-f", "int4")
    assert dense_file.read_bytes() == before


def test_usage_errors_have_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (
        ["explain"],
        ["nothing"],
        ["explain", "--shape", "8,8", "-f", "nf4", "-m", "-1"],
    ):
        with pytest.raises(SystemExit) as ended:
            main.main(arguments)
        assert ended.value.code == 2
        assert "Usage" in capsys.readouterr().err


def python(code: str) -> subprocess.CompletedProcess[str]:
    path = str(Path(lowbit.__file__).parents[1])
    return subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {path!r}); {code}"],
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_without_typer_the_message_says_what_to_install() -> None:
    ended = python("sys.modules['typer'] = None; import lowbit.cli.main")
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1] == (
        "lowbit: typer is not installed; the commands need: pip install 'lowbit[cli]'"
    )


def test_without_torch_the_tables_still_work() -> None:
    ended = python(
        "sys.modules['torch'] = None; import lowbit; from lowbit import _C; "
        "print(len(lowbit.formats()), len(lowbit.kernels())); lowbit.linear"
    )
    assert ended.stdout.split() == [str(len(all_formats())), str(len(lowbit.kernels()))]
    assert "ModuleNotFoundError" in ended.stderr.splitlines()[-1]
    assert "torch" in ended.stderr.splitlines()[-1]


def test_info_of_this_machine(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which kernels a GPU runs, and why not: of two that are not there."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    alone = run_json(capsys, "info")
    assert (alone["torch"], alone["gpus"]) == (torch.__version__, [])
    assert "no GPU that torch sees" in run(capsys, "info")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    properties = SimpleNamespace(
        name="H100", major=9, minor=0, multi_processor_count=132, total_memory=80 << 30
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(available, "_CUDA_OBSTACLE", None)
    monkeypatch.setattr(available, "_PROBED", {0: (None, 90), 1: ("the driver is old", 0)})
    monkeypatch.setattr(available, "_HAS_TRITON", False)
    found = run_json(capsys, "info")["gpus"]
    assert [gpu["cuda"] for gpu in found] == [None, "the driver is old"]
    assert [gpu["triton"] for gpu in found] == ["triton is not installed"] * 2
    text = run(capsys, "info")
    assert "GPU 0: H100, sm_90, 132 multiprocessors, 80.0 GiB\n  cuda: runs\n" in text
    assert "cuda: does not run: the driver is old" in text


@pytest.mark.parametrize("device", ("cuda:2", "cuda:", "gpu", "cpu:0"))
def test_devices_that_are_not_there(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    message = fail(capsys, "explain", "--shape", "8,8", "-f", "nf4", "--device", device)
    assert "device must be cpu, cuda or cuda:N with N below 2" in message
    assert repr(device) in message
