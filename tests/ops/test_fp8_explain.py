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
from lowbit.backends import available, pytorch_fp8
from lowbit.backends import fp8 as backends
from lowbit.backends.cpu import weights as cpu
from lowbit.backends.cuda import fp8_matmul as matmul_cuda
from lowbit.backends.triton import fp8_matmul as matmul_triton
from lowbit.explanation import REFERENCE
from lowbit.float8 import Scaled, find_granularity
from lowbit.formats import parse
from lowbit.ops.terms import matrix
from weights import random_weight

ROWS = [row for row in lowbit.kernels() if row["op"] == "fp8_scaled_mm"]


def test_the_cpu_runs_its_newest_instruction_set() -> None:
    a, scale_a = operand(3, 40, "row")
    b, scale_b = operand(5, 40, "1x16")
    shown = fp8.explain(a, b, scale_a, scale_b)
    assert shown.selected == _C.fp8_matmul_name()
    assert [kernel.name for kernel in shown.kernels] == [row["name"] for row in ROWS]
    active = [row["name"] for row in ROWS if row["isa"] in _C.isa_active()]
    assert shown.selected == active[0]
    assert all(
        (kernel.reason is None) == (kernel.name == shown.selected) for kernel in shown.kernels
    )
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
    w = matrix(random_weight(parse("int4"), 64, 64))
    with pytest.raises(ValueError, match="not for FP8 products"):
        cpu.linear(torch.ones(2, 64), w, None, kernel=ROWS[0]["index"])


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
    a, b, odd = (
        Scaled(
            torch.zeros(shape).to(E4M3)[:, -4096:], torch.ones(shape[0], 1), find_granularity("row")
        )
        for shape in ((2, 4096), (4096, 4096), (2, 4097))
    )
    assert matmul_triton.explain(a, b, False) == (("triton_fp8_mm_64x64x128_tma_split6", None),)
    assert matmul_triton.explain(a, b, True) == (("triton_fp8_mm_64x64x128_tma_split1", None),)
    assert matmul_triton.explain(odd, b, False) == (
        ("triton_fp8_mm_tma", "rows of a do not begin at multiples of 16 bytes"),
        ("triton_fp8_mm_64x64x128_pointers_split4", None),
    )
    monkeypatch.setattr(matmul_triton, "capability", lambda device: (8, 0))
    tma, (name, why) = matmul_triton.explain(a, b, False)
    assert tma == ("triton_fp8_mm_tma", "TMA needs sm_90, this is sm_80")
    assert "_16x64x64_pointers" in name
    assert why is None


def test_what_keeps_the_cuda_kernel_away(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cuda, row, mx = torch.device("cuda"), find_granularity("row"), find_granularity("mx")
    monkeypatch.setattr(available, "has_triton", lambda: True)
    monkeypatch.setattr(available, "cuda_obstacle", lambda _: "it is not built")
    cached = matmul_cuda._obstacle, backends._log_triton
    for f in cached:
        f.cache_clear()
    with caplog.at_level(logging.INFO, "lowbit"):
        for _ in range(2):
            chosen = backends.choose_product(cuda, row, row, 5)
            assert chosen == (matmul_triton, (("cuda_fp8_mm_wgmma", "it is not built"),))
    assert [r.getMessage() for r in caplog.records] == [
        "the Triton kernel computes FP8 products, not the CUDA kernel: it is not built"
    ]
    for capability, scales, why in (
        ((9, 0), row, None),
        ((10, 0), row, "its instructions are those of sm_90a, this is sm_100"),
        ((9, 0), mx, "it does not know the scales row of a and mx of b"),
    ):
        monkeypatch.setattr(available, "cuda_obstacle", lambda _: None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        matmul_cuda._obstacle.cache_clear()
        assert matmul_cuda.obstacle(cuda, row, scales, 16) == why
        chosen = matmul_cuda if why is None else matmul_triton
        assert backends.choose_product(cuda, row, scales, 16).backend is chosen
        assert backends.choose_product(cuda, row, scales, 17).backend is matmul_triton
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
    row, ones = find_granularity("row"), torch.ones(2, 1)
    with caplog.at_level(logging.INFO, "lowbit"):
        for a in (odd[:, :32], odd[:, :32], odd[:, :32].contiguous()):
            both = Scaled(a, ones, row), Scaled(a, ones, row)
            matmul_triton.choose(*both, False)
    assert [r.getMessage() for r in caplog.records] == [
        "the Triton kernel of FP8 products loads by pointers, not TMA: "
        "rows of a do not begin at multiples of 16 bytes"
    ]
    matmul_triton._log_pointers.cache_clear()


def test_without_triton_plain_torch_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    a, scale = operand(3, 40, "row")
    cuda, choose = torch.device("cuda"), backends.choose_product
    monkeypatch.setattr(matmul_cuda, "obstacle", lambda *_: "it is not built")
    monkeypatch.setattr(available, "has_triton", lambda: False)
    assert choose(cuda, find_granularity("row"), find_granularity("row"), 3).backend is pytorch_fp8
    monkeypatch.setattr(backends, "choose_product", lambda _, *request: choose(cuda, *request))
    shown = fp8.explain(a, a, scale, scale)
    assert shown.selected == REFERENCE
    assert [kernel.reason for kernel in shown.kernels] == [
        "it is not built",
        "triton is not installed",
    ]
