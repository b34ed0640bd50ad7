"""The first use of a weight in the child of a fork, where the threads of torch's pool are gone, comes to an end."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

SETUP = """
import os, sys, torch, lowbit
from torch import nn
from lowbit.formats import parse
from lowbit.weights.quantized import QuantTensor, tensor_specs
torch.set_num_threads(2)
n = k = 1024
def weight(name):
    f = parse(name)
    tensors = {key: torch.ones(s, dtype=d) for key, (s, d) in tensor_specs(f, n, k).items()}
    if "outlier_columns" in tensors:
        tensors["outlier_columns"][:] = torch.arange(f.outliers, dtype=torch.int32)
    return QuantTensor(f, (n, k), tensors)
q = weight(sys.argv[1])
x = torch.randn(1, k)
torch.ones(4_000_000).add_(1)  # torch's threads exist
"""
USES = {
    "linear": "lowbit.linear(x, q)",
    "many": "lowbit.linear_many(x, [q, q])",
    "embedding": "lowbit.ops.weights.embedding(torch.arange(n), q)",
    "many rows of an embedding": "lowbit.ops.weights.embedding(indices, q, torch.bfloat16)",
    "dequantize": "lowbit.dequantize(q)",
    "canonical": "lowbit.linear(x, lowbit.layouts.to_kernel(q, 'canonical'))",
    "layer": "nn.Sequential(lowbit.nn.QuantLinear.from_quant_tensor(q))(x)",
    "state dict": "lowbit.nn.QuantLinear(k, n, bias=False, format=sys.argv[1]).load_state_dict(state)",
    "file": "lowbit.load(model, path)",
    "quantize": "lowbit.quantize(dense, 'int4_g32')",
    "k-means": "lowbit.quantize(dense[:64], 'kmeans4')",
    "save": "lowbit.save(model, sys.argv[2])",
    "export": "layer.state_dict()",
    "conv": "lowbit.nn.QuantConv2d.from_quant_tensor(q, like=torch.nn.Conv2d(k, n, 1))(x.view(1, k, 1, 1))",
    "int8": "lowbit.int8.static_linear(x, torch.tensor(0.1), static)",
}
FORMATS = ("int4_g32", "uint4", "nf4_g64_dq8", "kmeans4", "mxfp4", "int4_g32_o4")


def child(folder: Path, format: str, *uses: str) -> subprocess.CompletedProcess[str]:
    """Each use in a child of its own, after its first result is known to be wanted; a child that hangs is ended."""
    script = SETUP + textwrap.dedent("""
    import time, logging
    import lowbit.layouts, lowbit.ops, lowbit.nn, lowbit.int8
    logging.disable()
    layer = lowbit.nn.QuantLinear.from_quant_tensor(weight(sys.argv[1]))
    state = lowbit.nn.QuantLinear.from_quant_tensor(weight(sys.argv[1])).state_dict()
    indices, static = torch.zeros(40_000, dtype=torch.int64), weight("int8_row_a8")
    path = lowbit.save(nn.Sequential(layer), sys.argv[2])
    dense = torch.randn(n, k)
    model = nn.Sequential(nn.Linear(k, n, bias=False))
    torch.ones(4_000_000).add_(1)
    hung = []
    for use in sys.argv[3:]:
        q = weight(sys.argv[1])
        pid = os.fork()
        if pid == 0:
            try:
                eval(use)
                assert torch.get_num_threads() == 2
            except BaseException as error:
                print(use, repr(error), file=sys.stderr)
                os._exit(1)
            os._exit(0)
        deadline = time.time() + 8
        while (done := os.waitpid(pid, os.WNOHANG))[0] == 0 and time.time() < deadline:
            time.sleep(0.002)
        if done[0] == 0:
            os.kill(pid, 9)
            os.waitpid(pid, 0)
            hung.append(use)
        elif done[1]:
            hung.append(use + " failed")
    assert not hung, hung
    """)
    return subprocess.run(
        [sys.executable, "-c", script, format, str(folder / "x.safetensors"), *uses],
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("format", FORMATS)
def test_first_use(format: str, tmp_path: Path) -> None:
    done = child(tmp_path, format, *USES.values())
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_fork_before_anything_ran() -> None:
    """Names of lowbit are imported when they are first used, here in the child."""
    script = SETUP + textwrap.dedent("""
    import signal
    pid = os.fork()
    if pid == 0:
        signal.alarm(10)
        lowbit.linear(x, q)
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    """)
    done = subprocess.run(
        [sys.executable, "-c", script, "int4_g32"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_explain_knows_of_the_one_thread(tmp_path: Path) -> None:
    done = child(
        tmp_path,
        "int4_g32",
        "(_ for _ in ()).throw(AssertionError('threads')) if {row.threads for row in lowbit.explain("
        "x.expand(64, k), q).kernels} - {1, None} or ', at most 1 threads' not in str(lowbit.explain(x, q)) else None",
    )
    assert done.returncode == 0, done.stderr[-3000:]
