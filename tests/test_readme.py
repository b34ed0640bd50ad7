"""Examples of README.md run as they stand, each with a small model of its own; paths of CONTRIBUTING.md exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import lowbit
from gguf_files import Llama, llama_fields, llama_tensors, write
from lowbit.methods import METHODS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
# The file that an example of GGUF reads, here with random weights.
MODEL_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def names() -> dict[str, object]:
    """What examples use and do not make."""
    model = nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 32))
    return {
        "torch": torch,
        "lowbit": lowbit,
        "model": model,
        "batches": [torch.randn(16, 128) for _ in range(2)],
        "linear": nn.Linear(128, 64),
    }


@pytest.mark.parametrize("example", EXAMPLES[1:], ids=range(1, len(EXAMPLES)))
def test_example(example, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    spec = Llama()
    write(Path(MODEL_FILE), llama_tensors(spec), **llama_fields(spec))
    exec(compile(example, "README.md", "exec"), names())


def test_first_example_computes_what_it_says():
    assert len(EXAMPLES) >= 5
    space: dict = {}
    exec(compile(EXAMPLES[0], "README.md", "exec"), space)
    weight = lowbit.dequantize(lowbit.quantize(space["weight"], space["mine"]))
    torch.testing.assert_close(space["y"], space["x"] @ weight.T, rtol=1e-4, atol=1e-3)


def test_every_method_is_in_the_table():
    cells = set(re.findall(r"`(\w+)`", README))
    assert set(METHODS) <= cells


def test_links_of_files_lead_somewhere():
    found = re.findall(r"\]\(([^)#:]+)\)", README)
    assert found
    assert [link for link in found if not (ROOT / link).exists()] == []


def test_length():
    assert len(README.splitlines()) <= 150


def test_paths_of_contributing_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    paths = re.findall(r"`((?:\.ci|benchmarks|cmake|csrc|kernels|python|tests)/[\w./-]*)`", text)
    assert len(paths) > 30
    assert [path for path in paths if not (ROOT / path).exists()] == []
