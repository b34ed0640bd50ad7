"""What gpu.py checks on a GPU: every kernel against float64, or bit for bit against the reference of the CPU tests.

As a script: answers tasks, one line of JSON each, for gpu_pool.py.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch
from gpu_kernels import FAMILIES, PEERS, TOLERANCE, error, ours
from torch import Tensor

import lowbit
from lowbit import float8, fp8, layouts, packing
from lowbit.backends.cuda import CUDA
from lowbit.backends.cuda import fp8_matmul as matmul_cuda
from lowbit.backends.cuda.weights import candidates
from lowbit.backends.triton import fp8 as fp8_triton
from lowbit.backends.triton import fp8_matmul as matmul_triton
from lowbit.backends.triton.adamw import adamw_
from lowbit.float8 import FLOAT8
from lowbit.ops.weights import embedding
from lowbit.reference import adamw as optim_reference
from lowbit.reference import fp8 as fp8_reference

Result = dict[str, Any]
# N and K around the tiles of 16 x 64, and a K that is split. Triton compiles anew for most of what follows.
SHAPES = {
    "cuda": ((200, 1000), (130, 576), (144, 8192)),
    "triton": ((200, 1000), (144, 8192)),
}
ROWS = {
    "cuda": dict.fromkeys(
        (torch.bfloat16, torch.float16, torch.float32), (1, 5, 16, 17, 33, 64, 100, 300, 1030)
    ),
    "triton": {torch.bfloat16: (1, 16, 33, 100), torch.float16: (100,), torch.float32: (5,)},
}
CUDA_GRANULARITIES = ("tensor", "row", "1x128", "128x128")
# M, N, K: few rows, several tiles, a long sum, nothing that is a multiple of anything.
FP8_SHAPES = ((33, 130, 208), (200, 300, 640), (5, 257, 16384), (70, 131, 149))


def device() -> str:
    """The GPU, or the CPU where Triton interprets."""
    return "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"


def same_bits(got: Tensor, want: Tensor) -> bool:
    """Whether two tensors have the same bytes."""
    pairs = [t.contiguous().flatten().view(torch.uint8) for t in (got, want)]
    return torch.equal(*pairs)


def linear(family: str, name: str) -> Iterator[Result]:
    """A format: the weight bit for bit, and products in three dtypes against float64."""
    for n, k in SHAPES[family]:
        qt = lowbit.quantize(torch.randn(n, k, device=device()), name)
        w = layouts.to_kernel(qt, FAMILIES[family])
        want = qt.dequantize()
        rows = torch.randint(0, n, (7,), device=device())
        same = torch.equal(lowbit.dequantize(w), want)
        same &= torch.equal(embedding(rows, w, torch.float32), want[rows])
        yield {"what": f"weight {n}x{k}", "ok": same}
        for dtype, ms in ROWS[family].items():
            for m in ms:
                x = torch.randn(m, k, device=device(), dtype=dtype)
                bias = torch.randn(n, device=device(), dtype=dtype)
                exact = x.double() @ want.double().T + bias.double()
                y = lowbit.linear(x, w, bias)
                wrong = float((y.double() - exact).norm() / exact.norm())
                ok = wrong <= (1e-5 if dtype == torch.float32 else TOLERANCE)
                found = {"what": f"{dtype} {m}x{n}x{k}", "ok": ok, "error": wrong}
                yield found if ok else {**found, "where": where(y, exact)}


def where(y: Tensor, exact: Tensor) -> str:
    """Which elements are far off."""
    off = (y.double() - exact).abs() > 0.1 * exact.abs().mean()
    off |= ~y.isfinite()
    first = off.nonzero()[:4].tolist()
    values = [(float(y[tuple(i)]), float(exact[tuple(i)])) for i in first]
    return f"{int(off.sum())} of {off.numel()}, first {first}: {values}"


def hard_values(rows: int, k: int) -> Tensor:
    """Magnitudes of many powers of two, with zeros and values that do not fit."""
    x = torch.randn(rows, k, device=device()) * (4 * torch.randn(rows, k, device=device())).exp()
    return torch.where(torch.rand(rows, k, device=device()) < 0.02, 0.0, x)


def fp8_quantize(_family: str, name: str) -> Iterator[Result]:
    """Codes, scales and the transposed codes, bit for bit."""
    g = float8.find_granularity(name)
    cases = itertools.product(FLOAT8, (torch.float32, torch.bfloat16), (None, 7), (False, True))
    for dtype, x_dtype, seed, transposed in cases:
        x = hard_values(300, 1000).to(x_dtype)
        want, want_scale = fp8_reference.quantize(x, dtype, g, seed=seed)
        q, scale, q_t = fp8_triton.quantize(
            x, dtype, g, g.scale_dtypes[0], transposed=transposed, seed=seed
        )
        ok = same_bits(q, want) and same_bits(scale, want_scale)
        ok &= q_t is None or same_bits(q_t, want.view(torch.uint8).T.view(dtype))
        back = fp8_triton.dequantize(q, scale, g, torch.float32)
        ok &= same_bits(back, fp8_reference.dequantize(want, want_scale))
        yield {"what": f"{dtype} of {x_dtype}, seed {seed}, transposed {transposed}", "ok": ok}
    for dtype, saturate in itertools.product(FLOAT8, (False, True)):
        x = hard_values(300, 1000) * 1e4
        want = fp8_reference.cast(x, dtype, saturate)
        ok = same_bits(fp8_triton.cast(x, dtype, saturate), want)
        yield {"what": f"cast to {dtype}, saturate {saturate}", "ok": ok}


def fp8_product(family: str, kind_a: str) -> Iterator[Result]:
    """A granularity of a with every one of b, against float64: relative error at most 1e-3."""
    run = {"triton": matmul_triton, "cuda": matmul_cuda}[family].scaled_mm
    names = CUDA_GRANULARITIES if family == "cuda" else tuple(float8.GRANULARITIES)
    e4m3, e5m2 = torch.float8_e4m3fn, torch.float8_e5m2
    for kind_b, (m, n, k) in itertools.product(names, FP8_SHAPES):
        types = [(e4m3, e4m3), (e4m3, e5m2), (e5m2, e4m3), (e5m2, e5m2)]
        for type_a, type_b in types if (m, kind_b) == (33, "row") else types[:1]:
            a, scale_a = fp8.quantize(torch.randn(m, k, device=device()), type_a, kind_a)
            b, scale_b = fp8.quantize(torch.randn(n, k, device=device()), type_b, kind_b)
            bias = torch.randn(n, device=device(), dtype=torch.bfloat16)
            exact = fp8_reference.scaled_mm(a, b, scale_a, scale_b, bias)
            operands = (float8.scaled(a, scale_a), float8.scaled(b, scale_b))
            y = run(*operands, bias, torch.float32)
            wrong = float((y.double() - exact).norm() / exact.norm())
            what = f"{m}x{n}x{k} {type_a} x {type_b} by {kind_b}"
            found = {"what": what, "ok": wrong <= 1e-3, "error": wrong}
            yield found if found["ok"] else {**found, "where": where(y, exact)}
    if family == "triton" and kind_a in ("tensor", "row", "1x16", "1x128"):
        a, scale_a = fp8.quantize(torch.randn(70, 640, device=device()), granularity=kind_a)
        b, scale_b = fp8.quantize(torch.randn(90, 640, device=device()), granularity="tensor")
        y = fp8_reference.scaled_mm(a, b, scale_a, scale_b).float()
        operands = (float8.scaled(a, scale_a), float8.scaled(b, scale_b))
        q, scale = matmul_triton.scaled_mm_quantized(*operands, None, torch.float8_e4m3fn)
        # Half a step of E4M3, whose steps are at most 1/8 of a value, and the error of y.
        wrong = float((fp8.dequantize(q, scale) - y).norm() / y.norm())
        yield {"what": "quantized y", "ok": wrong <= 0.04, "error": wrong}


def adamw(_family: str, sq_dtype: str, expand: bool) -> Iterator[Result]:
    """Steps of AdamW from equal states: parameters to 1e-4 of the largest step, since fp32 rounds one between 2 and 4
    by 1e-7 twice; all codes but those of values that lie between two.
    """
    dtypes = (torch.float8_e4m3fn, getattr(torch, sq_dtype))
    size = 5000
    groups, terms = optim_reference.num_groups(size), optim_reference.num_terms(expand)
    param = torch.randn(size, device=device())
    states = []
    for values, dtype in zip(
        (torch.randn(size) * 1e-3, torch.rand(size) * 1e-6), dtypes, strict=True
    ):
        codes, t = optim_reference.quantize(values.to(device()), dtype, expand)
        states.append((codes, t))
        assert t.shape == (terms, groups)
    number, lr = torch.ones((), device=device()), torch.full((), 1e-3, device=device())
    for step in range(1, 4):
        grad = torch.randn(size, device=device()) * 1e-3
        number.fill_(step)
        want_param = param.clone()
        want = [t.clone() for s in states for t in s]
        optim_reference.adamw_(
            want_param, grad, *want, float(step), 1e-3, 0.9, 0.999, 1e-8, 0.01, dtype=torch.float64
        )
        before = param.clone()
        adamw_(
            param, grad, *(optim_reference.State(*s) for s in states),
            optim_reference.Step(number, lr, 0.9, 0.999, 1e-8, 0.01, False),
        )  # fmt: skip
        moved = float((param - want_param).abs().max() / (want_param - before).abs().max())
        other = max(
            float((s[0].view(torch.uint8) != w.view(torch.uint8)).float().mean())
            for s, w in zip(states, want[::2], strict=True)
        )
        yield {
            "what": f"step {step}",
            "ok": moved <= 1e-4 and other <= 2e-3,
            "error": max(moved, other),
        }
        param.copy_(want_param)


def modules() -> Iterator[Result]:
    """Layers: forward, gradient, torch.compile and a CUDA graph; FP8 training lowers a loss as in fp32."""
    torch.manual_seed(0)
    dense = torch.nn.Linear(512, 384, device="cuda", dtype=torch.bfloat16)
    layer = lowbit.nn.QuantLinear.from_linear(dense, "nf4")
    x = torch.randn(9, 512, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = layer.quant_tensor().dequantize().double()
    want = x.double() @ weight.T + dense.bias.double()
    y = layer(x)
    wrong = float((y.double() - want).norm() / want.norm())
    yield {"what": "QuantLinear", "ok": wrong <= TOLERANCE, "error": wrong}
    grad = torch.randn_like(y)
    (got,) = torch.autograd.grad(y, x, grad)
    back = grad.double() @ weight
    wrong = float((got.double() - back).norm() / back.norm())
    yield {"what": "gradient of QuantLinear", "ok": wrong <= TOLERANCE, "error": wrong}
    with torch.no_grad():
        compiled = torch.compile(layer, fullgraph=True)(x)
        yield {"what": "torch.compile", "ok": same_bits(compiled, layer(x))}
        fixed = x.detach().clone()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = layer(fixed)
        fixed.copy_(torch.randn_like(fixed))
        graph.replay()
        yield {"what": "CUDA graph", "ok": same_bits(out, layer(fixed))}
    losses = []
    for fp8_layers in (False, True):
        torch.manual_seed(1)
        net = torch.nn.Sequential(*(torch.nn.Linear(256, 256, device="cuda") for _ in range(3)))
        inputs, targets = (torch.randn(512, 256, device="cuda") for _ in range(2))
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
        if fp8_layers:
            net = torch.nn.Sequential(*(lowbit.nn.FP8Linear.from_linear(m) for m in net))
            optimizer = lowbit.optim.FP8AdamW(net.parameters(), lr=1e-3)
        for _ in range(50):
            optimizer.zero_grad()
            loss = torch.nn.functional.mse_loss(net(inputs), targets)
            loss.backward()
            optimizer.step()
        losses.append(float(loss))
    ok = losses[1] <= losses[0] + 0.05 and losses[0] < 0.9
    yield {"what": f"FP8 training, losses {losses}", "ok": ok}


def lying(family: str, name: str) -> Iterator[Result]:
    """x that lies in memory as kernels do not take it: one row for all, overlapping, misaligned, transposed."""
    n, k = 144, 512
    w = layouts.to_kernel(
        lowbit.quantize(torch.randn(n, k, device=device()), name), FAMILIES[family]
    )
    want = lowbit.dequantize(w).double()
    base = torch.randn(40 * k, device=device(), dtype=torch.bfloat16)
    cases = {
        "one row for all": base[:k].expand(7, k),
        "overlapping rows": base.unfold(0, k, 8)[:9],
        "misaligned rows": base[1 : 1 + 5 * k].view(5, k),
        "transposed": base[: 24 * k].view(k, 24).t(),
        "rows of two for many": base.view(40, k)[:2].repeat_interleave(20, 0)[::2],
    }
    for what, x in cases.items():
        exact = x.double() @ want.T
        wrong = float((lowbit.linear(x, w).double() - exact).norm() / exact.norm())
        yield {"what": what, "ok": wrong <= TOLERANCE, "error": wrong}


def captured() -> Iterator[Result]:
    """Graphs of a product whose K is split, of an embedding and of a decoded weight, and products on another stream."""
    torch.manual_seed(0)
    qt = lowbit.quantize(torch.randn(256, 8192, device="cuda"), "nf4")
    w = layouts.to_kernel(qt, FAMILIES["cuda"])
    ids = torch.tensor([3, 255, 0], device="cuda")
    runs = {
        "split K": lambda x: lowbit.linear(x[:1], w),
        "decoded": lambda x: lowbit.linear(x, w),
        "embedding": lambda x: embedding(ids, w, torch.bfloat16) + x[:3],
    }
    for what, run in runs.items():
        x = torch.randn(700, 8192, device="cuda", dtype=torch.bfloat16)
        run(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = run(x)
        x.copy_(torch.randn_like(x))
        ids.copy_(torch.tensor([254, 1, 7]))
        graph.replay()
        yield {"what": f"graph of {what}", "ok": same_bits(out, run(x))}
    stream = torch.cuda.Stream()
    x = torch.randn(5, 8192, device="cuda", dtype=torch.bfloat16)
    want = lowbit.linear(x, w)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        got = [lowbit.linear(x, w) for _ in range(8)]
    torch.cuda.current_stream().wait_stream(stream)
    yield {"what": "another stream", "ok": all(same_bits(y, want) for y in got)}


def every_way(name: str) -> Iterator[Result]:
    """All the tiles, rings and parts of K that the CUDA kernels have, those that are not chosen too."""
    n, k = 144, 1088
    w = layouts.to_operands(
        lowbit.quantize(torch.randn(n, k, device="cuda"), name), FAMILIES["cuda"]
    )
    weight = CUDA.dequantize(w, torch.float32).double()
    for m in (1, 8, 13, 40, 200):
        x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
        exact = x.double() @ weight.T
        for config in candidates(w, m):
            y = CUDA.linear(x, w, None, config=config)
            wrong = float((y.double() - exact).norm() / exact.norm())
            yield {"what": f"M={m} {config}", "ok": wrong <= TOLERANCE, "error": wrong}


def timed(family: str, name: str, n: int, k: int, rows: list[int]) -> Iterator[Result]:
    """A kernel that gpu.py times next: its products against float64, and its code in Triton's cache."""
    weight = torch.randn(n, k, device="cuda") * 0.02
    kernel = ours(weight, name, family) if family in FAMILIES else PEERS[name](weight)
    for m in rows:
        x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
        wrong = error(kernel, x)
        yield {"what": f"{m}x{n}x{k}", "ok": wrong <= TOLERANCE, "error": wrong}


CHECKS: dict[str, Callable[..., Iterator[Result]]] = {
    f.__name__: f
    for f in (linear, fp8_quantize, fp8_product, adamw, modules, lying, captured, every_way, timed)
}


def tasks(families: list[str]) -> list[list[Any]]:
    """Every check."""
    found: list[list[Any]] = []
    for family in sorted(families):
        for name, format in lowbit.formats().items():
            made_here = not packing.is_blocks(format)
            if made_here and (family != "cuda" or "m16" in layouts.fitting(format)):
                found.append(["linear", family, name])
        granularity = CUDA_GRANULARITIES if family == "cuda" else float8.GRANULARITIES
        found += [["fp8_product", family, g] for g in granularity]
    found += [["fp8_quantize", "triton", g] for g in float8.GRANULARITIES]
    found += [
        ["adamw", "triton", t, e] for t in ("float8_e4m3fn", "float8_e5m2") for e in (False, True)
    ]
    found += [["lying", family, name] for family in families for name in ("nf4", "q4_1")]
    if device() != "cuda":
        return found
    if "cuda" in families:
        found += [["captured"], *(["every_way", name] for name in ("int4", "binary", "q4_1"))]
    return [*found, ["modules"]]


def answer(task: list[Any]) -> list[Result]:
    """Results of a task; an exception is a result that is not ok."""
    results: list[Result] = []
    torch.manual_seed(0)  # what is wrong once is wrong again
    if device() == "cuda":
        torch.cuda.empty_cache()  # other processes want the memory that the last task kept
    try:
        for result in CHECKS[task[0]](*task[1:]):
            results.append(result)
    except Exception:
        results.append({"what": "exception", "ok": False, "failed": traceback.format_exc()[-1200:]})
    return results


def main() -> None:
    """Answers until the end of the input."""
    out, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        out.write(json.dumps(answer(json.loads(line))) + "\n")
        out.flush()


if __name__ == "__main__":
    main()
