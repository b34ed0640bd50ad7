"""Networks as C: every node on the host under sanitizers and on an emulated Cortex-M4 is Python's, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("sklearn")

import integer_models
from c_programs import SANITIZED, TRACED, needs_cortex_m4, needs_gcc, on_cortex_m4, on_host

from lowbit.export.c import arena, project
from lowbit.export.c.project import export_c
from lowbit.integer import IntegerGraph, calibrate, quantize_qmn, quantize_tflite, trace

pytestmark = pytest.mark.usefixtures("one_thread")

MAKERS: dict[str, Callable[[], integer_models.Case]] = {
    "cnn": lambda: integer_models.digits(integer_models.DigitsCNN, 6),
    "signals": integer_models.signals,
    "mlp": lambda: integer_models.digits(integer_models.MLP, 12),
}
SETTINGS: dict[str, dict[str, Any]] = {
    "Q7.9": {"bits": 16},
    "filter, floor, 16 bits": {"bits": 16, "granularity": "filter", "rounding": "floor"},
    "layer, 8 bits": {},
    "layer, floor, 3-bit codes": {"rounding": "floor", "codebook": 3},
    "tflite": {"scheme": "tflite"},
    "tflite, 4-bit codes": {"scheme": "tflite", "codebook": 4},
}
RUNS = [
    *(("cnn", name) for name in SETTINGS),
    *(("signals", name) for name in ("Q7.9", "layer, 8 bits", "tflite")),
    *(("mlp", name) for name in ("layer, floor, 3-bit codes", "tflite")),
]


@pytest.fixture(scope="module")
def cases() -> dict[str, integer_models.Case]:
    """The networks, trained once."""
    return {name: make() for name, make in MAKERS.items()}


@pytest.fixture(scope="module")
def folders(cases: dict[str, integer_models.Case], tmp_path_factory: Any) -> dict[Any, Path]:
    """Each of `RUNS` as a folder of C."""
    made = {}
    for name, setting in RUNS:
        folder = tmp_path_factory.mktemp("c")
        export_c(cases[name].program, cases[name].inputs, folder, **SETTINGS[setting])
        made[name, setting] = folder
    return made


@needs_gcc
@pytest.mark.parametrize("run", RUNS, ids=str)
def test_every_node_on_the_host(run: tuple[str, str], folders: dict[Any, Path]) -> None:
    """Warnings are errors, and so is what the sanitizers find."""
    status, said = on_host(folders[run], *SANITIZED, TRACED)
    assert (status, said.count("differs")) == (0, 0), said
    assert "8 samples" in said


@needs_cortex_m4
@pytest.mark.parametrize("run", RUNS, ids=str)
def test_every_node_on_a_cortex_m4(run: tuple[str, str], folders: dict[Any, Path]) -> None:
    status, said = on_cortex_m4(folders[run], TRACED)
    assert (status, said.count("differs")) == (0, 0), said
    assert "8 samples" in said


@needs_gcc
def test_the_self_test_finds_a_change(folders: dict[Any, Path], tmp_path: Path) -> None:
    """Of one bias: the node is named with -DMODEL_TRACE, the outputs differ without, and the status is 1."""
    for file in folders["cnn", "layer, 8 bits"].glob("*.[ch]"):
        (tmp_path / file.name).write_text(file.read_text())
    text = (tmp_path / "weights.h").read_text()
    start = text.index("{", text.index("linear_biases[10]"))
    (tmp_path / "weights.h").write_text(text[: start + 1] + " 99999 +" + text[start + 1 :])
    status, said = on_host(tmp_path)
    assert status == 1
    assert "sample 0: output 0 is" in said
    status, said = on_host(tmp_path, TRACED)
    assert status == 1
    assert "sample 0: node 6 differs" in said
    assert "node 5" not in said


@pytest.mark.parametrize(
    ("name", "setting", "points"),
    [
        ("cnn", {"bits": 16}, 0.3),
        ("mlp", {"bits": 16}, 0.3),
        ("cnn", {"codebook": 4}, 1.0),
        ("mlp", {"codebook": 4}, 1.0),
        ("cnn", {}, 1.0),
    ],
    ids=str,
)
def test_accuracy_on_digits(
    name: str, setting: dict[str, Any], points: float, cases: dict[str, integer_models.Case]
) -> None:
    """Of 360 images that neither training nor calibration saw, at most so many points are lost, from 95 % on."""
    case = cases[name]
    with torch.no_grad():
        real = case.accuracy(case.model(case.test))
    assert real > 95
    graph = trace(case.program)
    integers = quantize_qmn(graph, calibrate(graph, case.inputs), **setting)
    assert case.accuracy(integers(case.test)) >= real - points


class Torture(nn.Module):
    """Shapes that divide nothing: strides, groups, dilation, padding that does not count, a clamp of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 6, (2, 3), (2, 1), (1, 2), groups=3)
        self.b = nn.Conv2d(3, 6, (3, 4), padding="same", dilation=(1, 2), bias=False)
        self.mean = nn.AvgPool2d((3, 2), (2, 3), (1, 1), count_include_pad=False)
        self.max = nn.MaxPool2d(3, 2, 1, dilation=(1, 2))
        self.rows = nn.Linear(7, 4)
        self.norm = nn.BatchNorm2d(3)
        self.head = nn.Linear(270, 5)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 3, 9, 7) to (batch, 1, 5)."""
        x = self.norm(x)
        a, b = self.mean(self.a(x)), self.max(self.b(x))
        rows = self.rows(x.clamp(max=0.5)).relu()
        joined = torch.cat([a.flatten(2), b.flatten(2).relu()], 2)
        rest = torch.cat([joined.flatten(1), (rows + rows).flatten(1)], 1)
        return self.head(rest).clamp(-1, 1).unsqueeze(1)


@needs_gcc
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_shapes_that_divide_nothing(setting: str, tmp_path: Path) -> None:
    torch.manual_seed(3)
    model = integer_models.random_norms(Torture())
    x = torch.randn(16, 3, 9, 7)
    program = integer_models.program_of(model, x)
    done = export_c(program, x, tmp_path, **SETTINGS[setting])
    assert done.error < 0.5
    status, said = on_host(tmp_path, *SANITIZED, TRACED)
    assert (status, said.count("differs")) == (0, 0), said


def test_results_that_live_together_do_not_overlap(cases: dict[str, integer_models.Case]) -> None:
    """Every result as it was when its last reader runs: a walk over the arena that marks who wrote each value."""
    for case in cases.values():
        graph = trace(case.program)
        integers = quantize_tflite(graph, calibrate(graph, case.inputs))
        places = arena.plan(integers)
        owner: dict[int, str] = {}
        for n in integers.nodes:
            for name in n.node.inputs:
                root = places.roots[name]
                if root in places.offsets:
                    start, count = places.offsets[root], size_of(integers, root)
                    assert {owner[i] for i in range(start, start + count)} == {root}
            root = places.roots[n.node.name]
            if root in places.offsets:
                start, count = places.offsets[root], size_of(integers, root)
                assert start + count <= places.size
                owner.update(dict.fromkeys(range(start, start + count), root))


def size_of(graph: IntegerGraph, name: str) -> int:
    """Values of a result."""
    return next(int(torch.tensor(n.node.shape).prod()) for n in graph.nodes if n.node.name == name)


def test_a_module_name_cannot_end_a_comment(tmp_path: Path) -> None:
    model = nn.Sequential()
    model.add_module("evil*/ \\\n int x;", nn.Linear(3, 2))
    program = integer_models.program_of(model, torch.randn(4, 3))
    export_c(program, torch.randn(4, 3), tmp_path)
    assert "int x" not in (tmp_path / "model.c").read_text()


def test_a_failure_writes_nothing(
    cases: dict[str, integer_models.Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does it change what is there: errors before the first file, and one while they are written."""
    case, folder = cases["mlp"], tmp_path / "out"
    needed = export_c(case.program, case.inputs, folder).ram_bytes
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    with pytest.raises(ValueError, match=f"max_ram is 1 bytes, and the arena .* has {needed}"):
        export_c(case.program, case.inputs, folder, bits=8, max_ram=1)
    export_c(case.program, case.inputs, tmp_path / "fits", max_ram=needed)

    def fail(*_: Any) -> None:
        raise OSError("no space")

    monkeypatch.setattr(project, "write_atomically", fail)
    for place in (folder, tmp_path / "new"):
        with pytest.raises(OSError, match="no space"):
            export_c(case.program, case.inputs, place, scheme="tflite")
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert not (tmp_path / "new").exists()
