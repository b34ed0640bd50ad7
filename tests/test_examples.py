"""The scripts of examples/ run as they stand, with small models of their own, and say what they shall."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from c_programs import needs_gcc

from gguf_files import write_llama

EXAMPLES = Path(__file__).parents[1] / "examples"
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def run(monkeypatch: Any, capsys: Any) -> Any:
    def run(name: str, *arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out

    return run


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text("That the other thing is there, they thought. " * 40)
    return file


def test_all_are_here() -> None:
    here = {path.stem for path in EXAMPLES.glob("*.py")}
    assert here == {"codebook", "quantize_llm", "finetune_lora", "train_2bit", "microcontroller"}


def test_codebook(run: Any) -> None:
    out = run("codebook")
    assert "4.25 bits a weight" in out
    assert "gemv" in out or "gemm" in out


def test_quantize_llm(run: Any, tmp_path: Path, text: Path) -> None:
    pytest.importorskip("gguf")
    out = run("quantize_llm", write_llama(tmp_path / "a.gguf"), text, tmp_path / "out")
    assert "model.layers.1.mlp.down_proj" in out
    assert (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_finetune_lora(run: Any, tmp_path: Path, text: Path) -> None:
    pytest.importorskip("peft")
    out = run("finetune_lora", write_llama(tmp_path / "a.gguf"), text, tmp_path / "out")
    losses = [float(line.split()[-1]) for line in out.splitlines() if line.startswith("step")]
    assert losses[-1] < losses[0] - 0.1
    torch.set_grad_enabled(True)


def test_train_2bit(run: Any) -> None:
    out = run("train_2bit")
    fp32, rounded, trained = (float(line.split()[-2]) for line in out.splitlines()[:3])
    assert rounded < trained
    assert trained > fp32 - 5


@needs_gcc
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_microcontroller(run: Any, tmp_path: Path) -> None:
    assert "flash" in run("microcontroller", tmp_path / "out")
    assert (tmp_path / "out" / "selftest").exists()
