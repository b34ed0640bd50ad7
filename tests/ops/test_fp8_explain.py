"""`lowbit.fp8.explain`: which kernel a product runs and why, on this CPU and on GPUs that are not here."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

import pytest
import torch

import lowbit
from fp8_operands import operand
from fp8_values import E4M3
from lowbit import _C, fp8
from lowbit.backends import available
from lowbit.backends.cpu import weights as cpu
from lowbit.explanation import REFERENCE
from lowbit.formats import parse
from lowbit.fp8 import explanation, matmul, matmul_cuda, matmul_triton, reference
from lowbit.fp8.granularity import find
from lowbit.ops.terms import matrix
from weights import random_weight

ROWS = [row for row in lowbit.kernels() if row["op"] == "fp8_scaled_mm"]


def test_the_cpu_runs_its_newest_instruction_set() -> None:
    a, scale_a = operand(3, 40, "row")
    b, scale_b = operand(5, 40, "1x16")
    shown = fp8.explain(a, b, scale_a, scale_b)
    assert shown.selected == _C.fp8_matmul_name()
    assert [row.name for row in shown.kernels] == [row["name"] for row in ROWS]
    active = [row["name"] for row in ROWS if row["isa"] in _C.isa_active()]
    assert shown.selected == active[0]
    assert all((row.reason is None) == (row.name == shown.selected) for row in shown.kernels)
    first, *lines = str(shown).splitlines()
    assert first == f"fp8_scaled_mm row 1x16 M=3 N=5 K=40 on cpu: {shown.selected}"
    assert [line for line in lines if line.endswith("  runs")] == [
        line for line in lines if shown.selected + " " in line
    ]
    quantized = fp8.explain(a, b, scale_a, scale_b, requantize="1x16")
    assert quantized.request.endswith("on cpu, y quantized by 1x16")


def test_a_cap_is_named() -> None:
    code = """
    import torch
    from lowbit import fp8
    q, scale = fp8.quantize(torch.ones(2, 16))
    print(fp8.explain(q, q, scale, scale))
    """
    code = "\n".join(line.strip() for line in code.splitlines())
    environment = {**os.environ, "LOWBIT_ISA": "scalar"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    first, *lines = done.stdout.splitlines()
    assert first.endswith("on cpu: fp8_mm_scalar")
    for row, line in zip(ROWS, lines, strict=True):
        why = (
            "runs"
            if row["isa"] == "scalar"
            else "LOWBIT_ISA excludes it"
            if row["available"]
            else f"this CPU has no {row['isa']}"
        )
        assert line.split(maxsplit=1) == [row["name"], why]


def test_rows_of_the_table_are_not_run_by_weights() -> None:
    """`Weight` takes the rows of other ops alone."""
    assert [row["isa"] for row in ROWS] == ["avx512bf16", "avx512", "avx2", "scalar"]
    op = matrix(random_weight(parse("int4"), 64, 64))
    with pytest.raises(ValueError, match="not for FP8 products"):
        cpu.linear(torch.ones(2, 64), op, None, kernel=ROWS[0]["index"])


def test_bad_input() -> None:
    a, scale_a = operand(3, 40, "row")
    with pytest.raises(ValueError, match="scale_b of a"):
        fp8.explain(a, a, scale_a, scale_a[:2])
    with pytest.raises(TypeError, match="a must be"):
        fp8.explain(a.float(), a, scale_a, scale_a)
    with pytest.raises(ValueError, match="requantize must be"):
        fp8.explain(a, a, scale_a, scale_a, requantize="1x128")
    meta = a.to("meta")
    with pytest.raises(ValueError, match="a must be on a CPU or a CUDA device"):
        fp8.explain(meta, meta, scale_a, scale_a)


def test_triton_rows_name_the_tile_and_what_keeps_tma_away(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(matmul_triton, "num_sms", lambda device: 132)
    monkeypatch.setattr(matmul_triton, "capability", lambda device: (9, 0))
    a, b = torch.zeros(2, 4096).to(E4M3), torch.zeros(4096, 4096).to(E4M3)
    g = find("row"), find("row")
    (row,) = explanation.triton_rows(a, b, *g, False)
    assert (row.name, row.reason) == ("triton_fp8_mm_64x64x128_tma_split6", None)
    (row,) = explanation.triton_rows(a, b, *g, True)
    assert row.name == "triton_fp8_mm_64x64x128_tma_split1"
    odd = torch.zeros(2, 4097).to(E4M3)[:, 1:]
    tma, row = explanation.triton_rows(odd, b, *g, False)
    assert tma.reason == "rows of a do not begin at multiples of 16 bytes"
    assert (row.name, row.reason) == ("triton_fp8_mm_64x64x128_pointers_split4", None)
    monkeypatch.setattr(matmul_triton, "capability", lambda device: (8, 0))
    tma, row = explanation.triton_rows(a, b, *g, False)
    assert tma.reason == "TMA needs sm_90, this is sm_80"
    assert "_16x64x64_pointers" in row.name


def test_what_keeps_the_cuda_kernel_away(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cuda, row, mx = torch.device("cuda"), find("row"), find("mx")
    monkeypatch.setattr(available, "has_triton", lambda: True)
    monkeypatch.setattr(available, "cuda_obstacle", lambda: "it is not built")
    cached = matmul_cuda._obstacle, matmul._log_triton
    for f in cached:
        f.cache_clear()
    with caplog.at_level(logging.INFO, "lowbit"):
        assert matmul.backend_of(cuda, row, row, 5) is matmul_triton
        assert matmul.backend_of(cuda, row, row, 5) is matmul_triton
    assert [r.getMessage() for r in caplog.records] == [
        "the Triton kernel computes FP8 products, not the CUDA kernel: it is not built"
    ]
    for capability, scales, why in (
        ((9, 0), row, None),
        ((10, 0), row, "its instructions are those of sm_90a, this is sm_100"),
        ((9, 0), mx, "it does not know the scales row of a and mx of b"),
    ):
        monkeypatch.setattr(available, "cuda_obstacle", lambda: None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        matmul_cuda._obstacle.cache_clear()
        assert matmul_cuda.obstacle(cuda, row, scales, 16) == why
        chosen = matmul_cuda if why is None else matmul_triton
        assert matmul.backend_of(cuda, row, scales, 16) is chosen
        assert matmul.backend_of(cuda, row, scales, 17) is matmul_triton
    for f in cached:
        f.cache_clear()


def test_pointers_in_place_of_tma_are_logged_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(matmul_triton, "capability", lambda device: (9, 0))
    monkeypatch.setattr(matmul_triton, "interpreted", lambda device: False)
    matmul_triton._log_pointers.cache_clear()
    odd = torch.zeros(2, 33).to(E4M3)
    g = find("row"), find("row")
    with caplog.at_level(logging.INFO, "lowbit"):
        for a in (odd[:, :32], odd[:, :32], odd[:, :32].contiguous()):
            matmul_triton.choose(a, a, *g, False)
    assert [r.getMessage() for r in caplog.records] == [
        "the Triton kernel of FP8 products loads by pointers, not TMA: "
        "rows of a do not begin at multiples of 16 bytes"
    ]
    matmul_triton._log_pointers.cache_clear()


def test_without_triton_plain_torch_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    a, scale = operand(3, 40, "row")
    monkeypatch.setattr(matmul, "backend_of", lambda *_: reference)
    monkeypatch.setattr(matmul_cuda, "obstacle", lambda *_: "it is not built")
    shown = fp8.explain(a, a, scale, scale)
    assert shown.selected == REFERENCE
    assert [row.reason for row in shown.kernels] == ["it is not built", "triton is not installed"]
