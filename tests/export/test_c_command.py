"""`lowbit export net.pt2 out --calibrate inputs.pt`: what it writes and says, and what it says of bad input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("sklearn")

import integer_models
from c_programs import needs_gcc, on_host
from test_cli import fail, run, run_json

pytestmark = pytest.mark.usefixtures("one_thread")
FILES = {"kernels.h", "main.c", "model.c", "model.h", "weights.h"}


@pytest.fixture(scope="module")
def files(tmp_path_factory: Any) -> Path:
    """A program of (6,) to 2, one that has no integer form, inputs, and what is none of them."""
    folder = tmp_path_factory.mktemp("pt2")
    x = torch.randn(20, 6)
    for name, end in (("net", nn.ReLU()), ("tanh", nn.Tanh())):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 40), nn.ReLU(), nn.Linear(40, 2), end)
        torch.export.save(integer_models.program_of(model, x), folder / f"{name}.pt2")
    torch.save(x, folder / "inputs.pt")
    torch.save(x[:, :5].clone(), folder / "short.pt")
    torch.save(torch.full((2, 6), float("nan")), folder / "nan.pt")
    torch.save([1, 2], folder / "list.pt")
    (folder / "text.pt2").write_text("no program")
    return folder


@needs_gcc
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_export(files: Path, tmp_path: Path, capsys: Any) -> None:
    out, calibrate = tmp_path / "out", ("--calibrate", files / "inputs.pt")
    said = run(capsys, "export", files / "net.pt2", out, *calibrate)
    assert f"{out}: c, qmn in 8 bits, flash" in said
    assert "RAM 40 bytes of arena, 320 multiply-adds" in said
    assert "0: linear, int8, a scale per tensor" in said
    assert {file.name for file in out.iterdir()} == FILES
    assert on_host(out) == (0, "8 samples, arena 40 bytes: 0 differences\n")
    options = ("--bits", 16, "--codebook", 4, "--max-ram", 80, "--rounding", "floor")
    done = run_json(capsys, "export", files / "net.pt2", out, *calibrate, *options)
    assert (done["to"], done["scheme"], done["bits"], done["ram_bytes"]) == ("c", "qmn", 16, 80)
    assert done["layers"]["0"] == "linear, 4-bit codes, a scale per tensor"
    # Codes and a byte behind them, a table, biases and a shift, for both layers.
    assert done["flash_bytes"] == (120 + 1 + 32 + 160 + 1) + (40 + 1 + 32 + 8 + 1)
    assert on_host(out)[0] == 0


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_bad_input(files: Path, tmp_path: Path, capsys: Any) -> None:
    out, given = tmp_path / "out", ("--calibrate", files / "inputs.pt")
    net = files / "net.pt2"
    for arguments, message in (
        ((net, out), "--calibrate INPUTS is needed for C"),
        ((files / "tanh.pt2", out, *given), "3 (tanh): aten.tanh.default has no integer form"),
        ((files / "text.pt2", out, *given), "text.pt2 must be a program by torch.export.save"),
        ((files / "none.pt2", out, *given), "no file"),
        ((net, out, "--calibrate", files / "short.pt"), "must have shape (samples, 6), got (20, 5)"),
        ((net, out, "--calibrate", files / "nan.pt"), "sample 0 has NaN or infinity"),
        ((net, out, "--calibrate", files / "list.pt"), "list.pt must hold a tensor, got list"),
        ((net, out, "--calibrate", files / "text.pt2"), "text.pt2 must be a tensor by torch.save"),
        ((net, out, *given, "--max-ram", 39), "max_ram is 39 bytes, and the arena of this network"),
        ((net, out, *given, "--bits", 4), "bits must be 8 or 16, got 4"),
        ((net, out, *given, "--scheme", "x"), "scheme must be one of qmn, tflite, got 'x'"),
        ((net, out, *given, "--scheme", "tflite", "--bits", 16), "scheme tflite has 8 bits, got 16"),
        ((net, out, *given, "--scheme", "tflite", "--rounding", "floor"), "rounding is for scheme qmn"),
        ((net, out, *given, "--granularity", "row"), "granularity must be one of"),
        ((net, out, *given, "--rounding", "up"), "rounding must be one of"),
        ((net, out, *given, "--codebook", 5), "codebook must be one of (2, 3, 4) bits, got 5"),
        ((net, out, *given, "--pre", "x"), "--pre is for models of transformers, got --to c"),
        ((net, out, *given, "--to", "gguf"), "--calibrate is for --to c, got --to gguf"),
        ((net, out, "--to", "gguf", "--max-ram", 1), "--max-ram is for --to c, got --to gguf"),
        ((files, out), "--to must be one of gguf, gptq, compressed-tensors, c, got None"),
    ):  # fmt: skip
        assert message in fail(capsys, "export", *arguments)
    assert not out.exists()
