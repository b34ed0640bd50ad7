"""Which kernels a GPU gets where the CUDA kernels were built but cannot run: a module that only answers stands for
them, and no GPU is needed.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import lowbit
from lowbit import layouts
from lowbit.backends import available
from lowbit.backends.cuda import fp8_matmul, weights
from lowbit.backends.triton import weights as triton
from lowbit.explanation import explain_request
from lowbit.float8 import find_granularity
from lowbit.formats import FORMATS, Format, parse

OLD = "the driver knows CUDA 12.4, the kernels were built with CUDA 13.0"
NF4 = FORMATS["nf4"]
FIRST, SECOND = (torch.device("cuda", i) for i in range(2))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The CUDA kernels are built; GPU 0 runs them with code for sm_90, GPU 1 cannot. Which GPUs were asked about."""
    found: list[int] = []

    def probe(device: int) -> tuple[str | None, int]:
        found.append(device)
        return (None, 90) if device == 0 else (OLD, 0)

    fake = SimpleNamespace(probe=probe)
    monkeypatch.setitem(sys.modules, "lowbit._cuda", fake)
    monkeypatch.setattr(lowbit, "_cuda", fake, raising=False)
    monkeypatch.setattr(available, "_CUDA_OBSTACLE", None)
    monkeypatch.setattr(available, "_PROBED", {})
    for cached in (fp8_matmul._obstacle, weights._choose):
        cached.cache_clear()
    yield found
    for cached in (fp8_matmul._obstacle, weights._choose):
        cached.cache_clear()


def test_a_gpu_is_asked_about_once(
    asked: list[int], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(available, "_HAS_TRITON", True)
    with caplog.at_level(logging.WARNING, logger="lowbit"):
        for _ in range(3):
            assert available.kernel_layout(FIRST, NF4) == layouts.M16
            assert available.kernel_layout(SECOND, NF4) == layouts.K16
    assert asked == [0, 1]
    assert available.cuda_code(FIRST) == 90
    assert available.cuda_obstacle(FIRST) is None
    assert available.cuda_obstacle(SECOND) == OLD
    assert [r.getMessage() for r in caplog.records] == [
        f"the CUDA kernels do not run on GPU 1: {OLD}"
    ]
    monkeypatch.setattr(available, "_HAS_TRITON", False)
    assert available.kernel_layout(SECOND, NF4) == layouts.CANONICAL


def test_fp8_products_pass_over_what_cannot_run(asked: list[int]) -> None:
    row = find_granularity("row")
    assert fp8_matmul.obstacle(SECOND, row, row, 1) == OLD
    assert asked == [1]


@pytest.mark.usefixtures("asked")
def test_the_reason_is_given() -> None:
    assert available.cuda_passed_over(SECOND, NF4) == OLD
    per_row = FORMATS["kmeans4_pr"]
    assert available.cuda_passed_over(FIRST, per_row) == "they do not know the format kmeans4_pr"


def test_no_gpu_is_asked_about_where_there_is_none(
    asked: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert available.cuda_obstacle() is None
    assert available.kernel_layout(torch.device("cuda"), NF4) == layouts.M16
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert available.cuda_obstacle() == OLD
    assert asked == [1]


@pytest.mark.usefixtures("asked")
def test_a_compiled_function_asks_too() -> None:
    def name(x: torch.Tensor) -> torch.Tensor:
        return x + (1 if available.kernel_layout(SECOND, NF4) == layouts.M16 else 2)

    compiled = torch.compile(name, backend="eager", fullgraph=True)
    assert compiled(torch.zeros(())).item() == 2


@pytest.fixture
def h100(asked: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Two H100s, of which the second cannot run the CUDA kernels; the choice is that of a wide and of a split tile."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(weights, "num_sms", lambda _: 132)
    monkeypatch.setattr(triton, "num_sms", lambda _: 132)

    class Chosen:
        num_groups, float_zero = 64, True

        def choose(self, m: int, architecture: int, code: int, sms: int) -> tuple[object, ...]:
            assert (architecture, code, sms) == (90, 90, 132)
            return ("decode", 0, 1) if m > 640 else ("mma", 2, 3)

    monkeypatch.setattr(weights, "weight", lambda *_: Chosen())


@pytest.mark.usefixtures("h100")
def test_explain_says_which_dtype_and_how_much_memory() -> None:
    def said(m: int, x: torch.dtype, n: int = 4096, k: int = 4096, name: str = "q4_1") -> object:
        found = explain_request(parse(name), n, k, m, x, "cuda:0")
        assert f"temporary memory: {found.memory:,} bytes" in str(found)
        assert found.kernels == ()
        return found.selected, found.memory

    parts, sums = 3 * 4 * 16 * 4096, 64 * 16 * 4
    assert said(16, torch.bfloat16) == ("cuda_mma_16_split3", parts + sums)
    # x is padded to whole tiles of K.
    padded = 16 * 4096 * 2
    assert said(16, torch.bfloat16, k=4094) == ("cuda_mma_16_split3", parts + sums + padded)
    # A decoded copy: fp32 x, a table that fp16 does not hold, and many rows, of which a large weight takes slices.
    copied = 4096 * 4096
    assert said(16, torch.float32) == ("cuda_dequantize, torch in fp32", 4 * copied)
    assert said(1000, torch.float16) == ("cuda_dequantize, torch in fp16", 2 * copied)
    wide = Format.lut(bits=2, table=[-1e5, 0.0, 1.0, 1e5], group=64)
    table = explain_request(wide, 4096, 4096, 16, torch.float16, "cuda:0")
    assert table.selected == "cuda_dequantize, torch in fp32"
    assert table.memory == 4 * (copied + 16 * 4096)
    _, large = said(1000, torch.bfloat16, n=128256)
    assert large <= (1 << 28) + 256 * 4096 * 2


@pytest.mark.usefixtures("h100")
def test_explain_says_why_cuda_kernels_are_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(available, "_HAS_TRITON", True)
    pytest.importorskip("triton")
    found = explain_request(NF4, 64, 64, 1, torch.bfloat16, "cuda:1")
    assert found.selected.startswith("triton_linear")
    assert [(kernel.name, kernel.reason) for kernel in found.kernels] == [("cuda", OLD)]
    assert OLD in str(found)
    monkeypatch.setattr(available, "_HAS_TRITON", False)
    found = explain_request(NF4, 64, 64, 1, torch.bfloat16, "cuda:1")
    assert (found.selected, found.memory) == ("reference", None)
    assert [kernel.name for kernel in found.kernels] == ["cuda", "triton"]


@pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc not found: no driver is made")
def test_a_driver_older_than_the_kernels(tmp_path: Path) -> None:
    """The compiled module itself, with a driver that knows a version of CUDA and nothing else."""
    if importlib.util.find_spec("lowbit._cuda") is None:
        pytest.skip("the package was built without its CUDA kernels")
    source = tmp_path / "driver.c"
    source.write_text(
        "int cuInit(unsigned flags) { return (int)flags; }\n"
        "int cuDriverGetVersion(int *version) { *version = 11020; return 0; }\n"
    )
    driver = tmp_path / "libcuda.so.1"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", driver, source], check=True)
    script = "import lowbit, lowbit._cuda as c; print(c.probe(0))"
    environment = {
        **os.environ,
        "LD_LIBRARY_PATH": str(tmp_path),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    said = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True
    )
    assert "they do not load on the GPU" in said.stdout
    assert "the driver knows CUDA 11.2, the kernels were built with CUDA " in said.stdout
