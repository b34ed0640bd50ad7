"""What people type who know other libraries: bits and groups, names of quantizers, tables, methods of tensors."""

from __future__ import annotations

import dataclasses
import functools
import subprocess
import sys
import types

import pytest
import torch
from torch import nn

import lowbit
from lowbit import qat
from lowbit.ptq import quantize_model


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict(
        {"a": nn.Linear(96, 32), "b": nn.Linear(32, 40), "lm_head": nn.Linear(32, 9)}
    )


def formats(made: nn.Module) -> dict[str, str]:
    return {n: m.format.name for n, m in made.named_modules() if hasattr(m, "format")}


@pytest.mark.parametrize(
    ("given", "format"),
    [
        ({"bits": 4}, "int4"),
        ({"bits": 3, "group_size": 32}, "int3_g32"),
        ({"bits": 8, "group_size": -1}, "int8_row"),
        ({"format": "nf4", "group_size": 16}, "nf4_g16"),
        ({"format": "uint4_g32_bf16", "group_size": 48}, "uint4_bf16_g48"),
        ({"format": "int8_row_a8", "group_size": 32}, "int8_a8_g32"),
    ],
)
def test_bits_and_group_size(given, format: str):
    one, other = model(), model()
    quantize_model(one, **given, progress=False)
    quantize_model(other, format, progress=False)
    assert formats(one).keys() == {"a", "b"}
    assert one["a"].format == other["a"].format
    for name, t in other.state_dict().items():
        assert torch.equal(one.state_dict()[name], t)


def test_modules_to_not_convert():
    made = model()
    report = quantize_model(made, bits=4, modules_to_not_convert=["a"], progress=False)
    assert [row.name for row in report.layers] == ["b", "lm_head"]


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({}, ValueError, "give a format, as 'nf4', or bits: got neither"),
        ({"format": "nf4", "bits": 4}, ValueError, "got both"),
        ({"bits": 7}, ValueError, r"bits must be one of \[2, 3, 4, 5, 6, 8\], got 7"),
        ({"bits": True}, ValueError, "bits must be one of"),
        ({"bits": 4, "group_size": 0}, ValueError, "group_size must be a positive integer, or -1"),
        ({"format": {"a": "nf4"}, "group_size": 32}, ValueError, "group_size is for one format"),
        ({"bits": 4, "skip": ["a"], "modules_to_not_convert": ["a"]}, ValueError, "not both"),
        ({"format": "nf5"}, ValueError, "did you mean 'nf4' or 'nf3'"),
    ],
)
def test_wrong_arguments(given, error, message: str):
    with pytest.raises(error, match=message):
        quantize_model(model(), **given, progress=False)


@pytest.mark.parametrize("name", [*qat.layers.SPECS, "LSQ", "int4_g32", "w4a16"])
def test_prepare_by_name(name: str):
    made = model()
    assert qat.prepare(made, name, skip=["lm_head"]) == ["a", "b"]
    loss = made["b"](made["a"](torch.randn(5, 96))).square().sum()
    loss.backward()
    assert bool(made["a"].weight.grad.any())
    wanted = {"lsq": qat.LSQ, "twn": qat.TWN, "ttq": qat.TTQ}.get(name.lower(), qat.WeightQuantizer)
    assert isinstance(made["a"].quantizer, wanted)
    if name != "ttq":
        assert qat.convert(made) == ["a", "b"]


def test_prepare_by_name_is_the_spec():
    one, other = model(), model()
    qat.prepare(one, {"a": "lsq", "b": None})
    qat.prepare(other, {"a": qat.Spec(functools.partial(qat.LSQ, format="int4_row_fp32"))})
    assert str(one) == str(other)
    with pytest.raises(ValueError, match="'lqs' is no quantizer .*did you mean 'lsq'"):
        qat.prepare(model(), "lqs")
    with pytest.raises(TypeError, match=r"must be a qat\.Spec, a name or a mapping, got int"):
        qat.prepare(model(), 4)


def test_quant_tensor_has_what_tensors_have():
    qt = lowbit.quantize(torch.randn(7, 33), "nf4")
    assert qt.dtype == torch.float32 == qt.dequantize().dtype
    assert qt.numel() == 7 * 33
    assert torch.equal(qt.cpu().codes, qt.codes)
    html = qt._repr_html_()
    assert "7 x 33 nf4" in html
    assert html.count("<tr>") == 1 + len(qt.tensors)
    if not torch.cuda.is_available():
        with pytest.raises((RuntimeError, AssertionError), match="CUDA|NVIDIA"):
            qt.cuda()


def test_output_errors():
    """Those of the inputs themselves: of fp64 sums, which differ from the fp32 Hessian by 1e-5 or less."""
    made, x = model(), torch.randn(64, 96)
    batch = nn.Sequential(made["a"])
    weight = made["a"].weight.detach().clone()
    report = quantize_model(batch, "int3_g32", method="gptq", calibration=[x], progress=False)
    (row,) = report.layers
    error = weight - batch[0].weight.clone()
    want = (x.double() @ error.double().T).norm() / (x.double() @ weight.double().T).norm()
    assert row.output_error == pytest.approx(float(want), rel=1e-4)
    assert row.output_error < row.relative_error
    assert "output error" in str(report)
    assert f"{row.output_error:.3g}" in str(report)
    assert report.to_dict()["layers"][0]["output_error"] == row.output_error
    plain = quantize_model(model(), "int4", progress=False)
    assert "output error" not in str(plain)
    assert all(row.output_error is None for row in plain.layers)


def test_reports_in_notebooks_and_tables(monkeypatch: pytest.MonkeyPatch):
    report = quantize_model(model(), "int4", progress=False)
    report.layers[0] = dataclasses.replace(report.layers[0], name="<b>")
    html = report._repr_html_()
    assert "&lt;b&gt;" in html
    assert "<b>" not in html
    assert html.count("<tr>") == 2 + len(report.layers)
    # pandas is no dependency: what it is called with counts.
    fake = types.ModuleType("pandas")
    fake.DataFrame = lambda rows, columns: (rows, columns)
    monkeypatch.setitem(sys.modules, "pandas", fake)
    rows, columns = report.to_pandas()
    assert columns[:3] == ["name", "format", "shape"]
    assert [row["name"] for row in rows] == ["<b>", "b"]
    assert all(set(row) == set(columns) for row in rows)
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match="pip install pandas"):
        report.to_pandas()


WITHOUT_TORCH = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "torch":
            raise ModuleNotFoundError("No module named 'torch'", name="torch")
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name.split(".")[0] == "torch" else find(name, *a)
sys.meta_path.insert(0, Missing())
import lowbit
from lowbit.cli.main import main
try:
    lowbit.quantize
except ImportError as e:
    print(e)
main(["formats"])
"""


def test_without_torch():
    """`lowbit formats` works, and the rest says what to install."""
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH], capture_output=True, text=True, check=False
    )
    assert (
        "lowbit.quantize needs torch, which is not installed: pip install 'lowbit[torch]'"
        in done.stdout
    )
    assert "kmeans3" in done.stdout, done.stderr
    assert "bits/weight" not in done.stdout


@pytest.mark.parametrize("order", [["--method", "gptq", "--help"], ["--help", "--method=gptq"]])
def test_help_of_a_method(capsys, order: list[str]):
    pytest.importorskip("typer")
    from lowbit.cli.main import main

    with pytest.raises(SystemExit) as ended:
        main(["quantize", *order])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert "--option act_order=False" in out
    assert "It needs --calibrate" in out


def test_help_of_a_method_that_is_none(capsys):
    pytest.importorskip("typer")
    from lowbit.cli.main import main

    with pytest.raises(SystemExit):
        main(["quantize", "--method", "gtpq", "--help"])
    assert "did you mean 'gptq'" in capsys.readouterr().err
