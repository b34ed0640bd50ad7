"""The choice of a kernel row, and the process around it: instruction sets, threads, fork, the GIL."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
import time

import pytest
import torch

from lowbit import _C
from lowbit.backends.cpu import weights as cpu
from lowbit.formats import parse
from lowbit.ops.terms import matrix
from weights import random_weight

ALL_ISAS = ["scalar", "avx2", "avx512", "avx512bf16", "avx512vnni", "avx512vpopcntdq", "amxbf16"]


def python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=120,
    )


def int4(n: int = 64, k: int = 64, **kw) -> _C.Weight:
    return _C.Weight(n=n, k=k, bits=4, group=32, **kw)


def test_cap_leaves_an_instruction_set_and_what_it_builds_on() -> None:
    assert _C.isa_capped(ALL_ISAS, "") == ALL_ISAS
    assert _C.isa_capped(ALL_ISAS, "scalar") == ["scalar"]
    assert _C.isa_capped(ALL_ISAS, "avx2") == ["scalar", "avx2"]
    assert _C.isa_capped(ALL_ISAS, "avx512bf16") == ["scalar", "avx2", "avx512", "avx512bf16"]
    assert _C.isa_capped(ALL_ISAS, "avx512vnni") == ["scalar", "avx2", "avx512", "avx512vnni"]
    vpopcntdq = ["scalar", "avx2", "avx512", "avx512vpopcntdq"]
    assert _C.isa_capped(ALL_ISAS, "avx512vpopcntdq") == vpopcntdq
    assert _C.isa_capped(["scalar", "avx2"], "avx512") == ["scalar", "avx2"]


def test_environment_caps_the_active_sets_and_the_choice() -> None:
    code = """
    from lowbit import _C
    w = _C.Weight(n=64, k=64, bits=4, group=32)
    print(_C.isa_active(), w.select("linear", "bf16", 1))
    """
    for cap in ("scalar", "avx2"):
        done = python(code, LOWBIT_ISA=cap)
        assert done.returncode == 0, done.stderr
        active = _C.isa_capped(_C.isa_detected(), cap)
        assert done.stdout.startswith(str(active))
        assert done.stdout.strip().endswith(active[-1])


def test_unknown_cap_stops_the_import() -> None:
    done = python("import lowbit._C", LOWBIT_ISA="avx3")
    assert done.returncode != 0
    assert "LOWBIT_ISA" in done.stderr
    assert "'avx3'" in done.stderr


def test_fp16_is_never_rounded_to_bf16() -> None:
    assert "_f32_" in int4().select("linear", "fp16", 1)
    assert "_f32_" in int4().select("linear", "fp32", 1)


@pytest.mark.skipif("avx512bf16" not in _C.isa_active(), reason="this CPU has no avx512bf16")
def test_fp16_is_split_where_the_table_is_exact_in_bf16() -> None:
    """Whether that is faster than fp32 differs between CPUs."""
    name = "gemv_f16_lut4_n16_avx512bf16"
    for exact in (int4(codec="int"), int4(bf16_table=True)):
        reasons = {row[0]: row[3] for row in exact.explain("linear", "fp16", 1)}
        assert reasons[name] is None
        assert "would round" in dict((r[0], r[3]) for r in exact.explain("linear", "fp32", 1))[name]
    refused = {row[0]: row[3] for row in int4().explain("linear", "fp16", 1)}
    assert refused[name] == "table is not exact in bf16"


def test_codecs_are_checked() -> None:
    with pytest.raises(ValueError, match="codec must be lut, int, e4m3 or e5m2, got 'fp8'"):
        int4(codec="fp8")
    with pytest.raises(ValueError, match="codec e4m3 needs bits 8 and scope shared, got bits 4"):
        int4(codec="e4m3")


def test_every_request_has_a_row_and_every_other_row_a_reason() -> None:
    for group in (1, 7, 32, 100, 64):
        for bits in (1, 2, 3, 4, 5, 6, 8):
            for scope in ("shared", "column"):
                w = _C.Weight(n=100, k=100, bits=bits, group=group, scope=scope)
                for x in ("fp32", "bf16", "fp16"):
                    for m in (1, 4, 1000):
                        chosen = w.select("linear", x, m)
                        rows = w.explain("linear", x, m)
                        assert chosen in [name for name, _, _, why in rows if why is None]
                        assert all((cost is None) != (why is None) for _, cost, _, why in rows)


def test_the_number_of_threads_chooses_no_kernel() -> None:
    """Kernels add in different orders: a result would depend on the machine's load."""
    chosen = set()
    for n, k in ((64, 64), (100, 520), (640, 576), (4096, 4096)):
        for bits in (2, 4, 8):
            for group in (16, 32, 128):
                for codec in ("lut", "int"):
                    w = _C.Weight(n=n, k=k, bits=bits, group=group, codec=codec)
                    for x in ("fp32", "bf16", "fp16"):
                        for m in (1, 3, 8, 30, 64, 200, 1000):
                            names = {w.select("linear", x, m, threads) for threads in (1, 2, 3, 16)}
                            assert len(names) == 1, (n, k, bits, group, codec, x, m, names)
                            chosen |= names
    assert len(chosen) > 3  # not one for all


_INT6 = {"scale_dtype": "int6", "scale2_dtype": "fp16"}


def test_every_kernel_of_products_has_a_fitted_cost() -> None:
    """benchmarks/fit_costs.py times them all; a kernel without a cost would count as one without rivals."""
    products = [k for k in _C.kernels() if k["op"] == "linear"]
    assert products
    assert not [k["name"] for k in products if not min(k["cost"][0]) > 0]


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"n": -1}, "shape"),
        ({"k": 0}, "shape"),
        ({"bits": 7}, "bits"),
        ({"group": 0}, "group"),
        ({"zero": "minus"}, "zero"),
        ({"zero": "add"}, "zero_dtype"),
        ({"scale_dtype": "fp64"}, "dtype"),
        ({"scale_dtype": "uint4"}, "scale_dtype uint4 needs a second level"),
        (
            {"scale_dtype": "fp32", "zero": "add", "zero_dtype": "int6"},
            "zero_dtype must be a number",
        ),
        ({**_INT6, "zero": "subtract", "zero_dtype": "int6"}, "zero_dtype must be .* got int6"),
        ({**_INT6, "zero": "add", "zero_dtype": "uint6"}, "zero_dtype must be .* got uint6"),
        ({"table_groups": 3}, "table_groups"),
    ],
)
def test_bad_weight_descriptions(change: dict, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        _C.Weight(**{"n": 64, "k": 64, "bits": 4, "group": 32, **change})


def test_numpy_calls_check_sizes() -> None:
    import numpy as np

    w = int4(scale_dtype="fp32")
    codes = np.zeros(w.code_bytes, np.uint8)
    table = np.arange(16, dtype=np.float32)
    scales = np.ones(w.lane_terms, np.float32)
    y = w.linear(np.ones((2, 64), np.float32), codes, table, scales)
    assert y.shape == (2, 64)
    assert (y == 0).all()
    for bad in (
        {"x": np.ones((2, 63), np.float32)},
        {"codes": codes[:-1]},
        {"table": table[:-1]},
        {"scales": scales[:-1]},
        {"scales": None},
        {"zeros": scales},
        {"bias": scales[:3]},
    ):
        arguments = {
            "x": np.ones((2, 64), np.float32),
            "codes": codes,
            "table": table,
            "scales": scales,
        }
        with pytest.raises(ValueError, match=next(iter(bad))):
            w.linear(**{**arguments, **bad})
    with pytest.raises(TypeError):
        w.linear(np.ones((2, 64)), codes, table, scales)


def big_call():
    op = matrix(random_weight(parse("int4"), 2048, 2048))
    x = torch.randn(64, 2048)
    return lambda: cpu.linear(x, op, None)


def test_one_openmp_runtime_in_the_process() -> None:
    done = python("""
    import lowbit._C, torch, threadpoolctl
    pools = [p for p in threadpoolctl.threadpool_info() if p["user_api"] == "openmp"]
    assert len(pools) == 1, pools
    """)
    assert done.returncode == 0, done.stderr


def test_thread_count_follows_torch() -> None:
    done = python("""
    import os, sys, torch
    sys.path[:0] = ["tests", "tests/backends"]
    torch.set_num_threads(1)
    from test_dispatch import big_call
    call = big_call()
    tasks = lambda: len(os.listdir("/proc/self/task"))
    before = tasks()
    call()
    assert tasks() == before, (before, tasks())
    torch.set_num_threads(3)
    call()
    assert tasks() == before + 2, (before, tasks())
    """)
    assert done.returncode == 0, done.stderr


def test_gil_is_released() -> None:
    call = big_call()
    call()
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            call()

    thread = threading.Thread(target=work)
    thread.start()
    # While the kernels run, this thread goes on: a held GIL would let it through only every few milliseconds.
    ticks, end = 0, time.perf_counter() + 0.3
    while time.perf_counter() < end:
        ticks += 1
    stop.set()
    thread.join()
    assert ticks > 10_000


def test_concurrent_calls_agree() -> None:
    call = big_call()
    expected = call()
    results: list[torch.Tensor] = []
    threads = [
        threading.Thread(target=lambda: results.extend(call() for _ in range(5))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 20
    assert all(torch.equal(r, expected) for r in results)


def test_calls_after_fork() -> None:
    done = python("""
    import os, sys, torch
    sys.path[:0] = ["tests", "tests/backends"]
    torch.set_num_threads(2)
    from test_dispatch import big_call
    call = big_call()
    expected = call()
    child = os.fork()
    if child == 0:
        same = bool((call().numpy() == expected.numpy()).all())
        os._exit(0 if same else 1)
    assert os.waitpid(child, 0)[1] == 0
    """)
    assert done.returncode == 0, done.stderr
