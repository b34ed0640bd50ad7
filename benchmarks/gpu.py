"""On a GPU: checks the Triton and CUDA kernels of every format against float64, times them beside other libraries.

Writes results/gpu.json. Weights rotate through more memory than any L2 cache, inside one CUDA graph; what is wrong is
reported and not timed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from gpu_decode import SHAPES as MODELS
from gpu_decode import milliseconds_per_token
from gpu_fp8 import measure as measure_fp8
from gpu_timing import replay_microseconds
from record import RESULTS, machine
from torch import Tensor

import lowbit
from lowbit import backends, layouts, ops
from lowbit.formats import Format, as_format

SHAPES = ((4096, 4096), (14336, 4096), (8192, 8192), (28672, 8192), (10944, 4096), (4096, 7392))
ROWS = (1, 4, 16, 64, 256, 1024)
FORMATS = ("int4", "nf4", "int3", "nf3", "int2", "binary", "int8", "e4m3", "kmeans8")
FAMILIES = {"triton": layouts.K16, "cuda": layouts.M16}
ROTATED_BYTES = 180 << 20  # more than three times the largest L2 cache
# Relative Frobenius error: bf16 table entries, x and y each round by at most 2^-8 (0.2 % rms).
TOLERANCE = 0.01


@dataclass
class Kernel:
    """One kernel with its rotating weights.

    Attributes:
        name: library and format.
        nbytes: of one weight, scales included.
        weight: (N, K), the values that the first copy stands for.
        calls: x to y, one for each copy.
    """

    name: str
    nbytes: int
    weight: Tensor
    calls: list[Callable[[Tensor], Tensor]]


def num_copies(nbytes: int) -> int:
    """Copies of a weight that do not fit in a cache together."""
    return 1 + ROTATED_BYTES // nbytes


def ours(weight: Tensor, name: str, family: str) -> Kernel:
    """The kernels of a family in a named format; fitted codebooks get random values, which take no time to find."""
    format = as_format(name)
    if format.fitted:
        table = torch.randn(2**format.bits, generator=torch.Generator().manual_seed(0)).sort()[0]
        format = Format.lut(bits=format.bits, table=table, group=format.group, name=name)
    qt = lowbit.quantize(weight, format)
    nbytes = sum(t.nbytes for t in qt.tensors.values())
    copies = [
        layouts.to_operands(
            qt.map(lambda t, i=i: t.roll(i, 0) if t.dim() > 1 else t), FAMILIES[family]
        )
        for i in range(num_copies(nbytes))
    ]
    return Kernel(
        f"{family} {name}",
        nbytes,
        qt.dequantize(),
        [lambda x, w=w: ops.linear(x, w) for w in copies],
    )


def dense(weight: Tensor) -> Kernel:
    """torch's linear on a bf16 weight."""
    w = weight.bfloat16()
    copies = [w.roll(i, 0) for i in range(num_copies(w.nbytes))]
    return Kernel(
        "torch dense bf16", w.nbytes, w.float(), [lambda x, w=w: F.linear(x, w) for w in copies]
    )


def int4pack(weight: Tensor) -> Kernel:
    """aten._weight_int4pack_mm with groups of 128."""
    n, k = weight.shape
    groups = weight.view(n, -1, 128)
    scales = (groups.abs().amax(-1) / 7).bfloat16()
    codes = (groups / scales.float()[..., None]).round().clamp(-8, 7) + 8
    terms = torch.stack((scales, torch.zeros_like(scales)), -1).transpose(0, 1).contiguous()
    pairs = codes.view(n, k // 2, 2).to(torch.uint8)
    nbytes = n * k // 2 + terms.nbytes
    calls = []
    for i in range(num_copies(nbytes)):
        packed = (pairs[..., 0] << 4 | pairs[..., 1]).roll(i, 0)
        w, s = torch.ops.aten._convert_weight_to_int4pack(packed, 8), terms.roll(i, 1)
        calls.append(lambda x, w=w, s=s: torch.ops.aten._weight_int4pack_mm(x, w, 128, s))
    values = ((codes - 8) * scales.float()[..., None]).view(n, k)
    return Kernel("torch int4pack", nbytes, values, calls)


def bitsandbytes(weight: Tensor) -> Kernel:
    """bitsandbytes NF4 in blocks of 64."""
    import bitsandbytes as bnb

    n, k = weight.shape
    calls, values = [], None
    nbytes = n * k // 2 + n * k // 64 * 4
    for i in range(num_copies(nbytes)):
        w, state = bnb.functional.quantize_4bit(
            weight.bfloat16().roll(i, 0), blocksize=64, quant_type="nf4"
        )
        if values is None:
            values = bnb.functional.dequantize_4bit(w, state).float()
        calls.append(lambda x, w=w, state=state: bnb.matmul_4bit(x, w.t(), state))
    assert values is not None
    return Kernel("bitsandbytes nf4", nbytes, values, calls)


def torchao_int4(weight: Tensor) -> Kernel:
    """torchao's int4 weight-only linear, tiles packed, groups of 128."""
    from torchao.quantization import Int4WeightOnlyConfig, quantize_

    n, k = weight.shape
    config = Int4WeightOnlyConfig(group_size=128, int4_packing_format="tile_packed_to_4d")
    nbytes = n * k // 2 + n * k // 128 * 4
    layers = []
    for i in range(num_copies(nbytes)):
        layer = torch.nn.Linear(k, n, bias=False, device="cuda", dtype=torch.bfloat16)
        layer.weight.data.copy_(weight.roll(i, 0))
        quantize_(layer, config)
        layers.append(layer.requires_grad_(False))
    return Kernel("torchao int4", nbytes, values_of(layers[0], k), layers)


def humming_int4(weight: Tensor) -> Kernel:
    """humming's int4 linear, groups of 128."""
    from humming.layer import HummingLayer

    n, k = weight.shape
    nbytes = n * k // 2 + n * k // 128 * 2
    layers = []
    for i in range(num_copies(nbytes)):
        layer = HummingLayer(
            shape_n=n,
            shape_k=k,
            weight_config={"dtype": "int4", "weight_scale_group_size": 128},
            torch_dtype=torch.bfloat16,
        ).cuda()
        layer.load_from_unquantized(weight.bfloat16().roll(i, 0))
        layer.transform()
        layers.append(layer)
    return Kernel("humming int4", nbytes, values_of(layers[0], k), layers)


def values_of(call: Callable[[Tensor], Tensor], k: int) -> Tensor:
    """The weight that a linear computes with: what the identity returns."""
    return call(torch.eye(k, device="cuda", dtype=torch.bfloat16)).T.float()


PEERS: tuple[Callable[[Tensor], Kernel], ...] = (
    dense,
    int4pack,
    bitsandbytes,
    torchao_int4,
    humming_int4,
)


def error(kernel: Kernel, x: Tensor) -> float:
    """Largest relative error of all copies against float64."""
    exact = x.double() @ kernel.weight.double().T
    worst = 0.0
    for i, call in enumerate(kernel.calls):
        want = exact.roll(i, 1)
        worst = max(worst, float((call(x).double() - want).norm() / want.norm()))
    return worst


def microseconds(kernel: Kernel, x: Tensor) -> list[float]:
    """Times of one product, from replays of a graph of all copies."""
    for call in kernel.calls[:2]:
        call(x)
    taken = replay_microseconds(lambda: [call(x) for call in kernel.calls])
    return [us / len(kernel.calls) for us in taken]


def copy_bandwidth() -> float:
    """Bytes per second, read and written, of a large device copy."""
    a = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    copy = Kernel("copy", 2 << 30, a, [lambda x: x.clone()])
    return (2 << 30) / (statistics.median(microseconds(copy, a)) / 1e6)


def check(device: str, family: str) -> list[dict[str, Any]]:
    """Every built-in format on ragged shapes: error against float64 in three dtypes, and the weight bit for bit."""
    found = []
    for name, format in lowbit.formats().items():
        if family == "cuda" and not layouts.fits_m16(format):
            continue
        for n, k in ((200, 1000), (130, 576)):
            qt = lowbit.quantize(torch.randn(n, k, device=device), format)
            w = layouts.to_operands(qt, FAMILIES[family])
            want = qt.dequantize()
            about = {"family": family, "format": name, "n": n, "k": k}
            rows = torch.randint(0, n, (7,), device=device)
            same = torch.equal(ops.dequantize(w), want)
            same &= torch.equal(ops.embedding(rows, w, torch.float32), want[rows])
            found.append({**about, "dtype": "weight", "m": 0, "error": float(not same), "ok": same})
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                for m in (1, 5, 16, 17, 33, 64, 100, 300, 1030):
                    x = torch.randn(m, k, device=device, dtype=dtype)
                    bias = torch.randn(n, device=device, dtype=dtype)
                    exact = x.double() @ want.double().T + bias.double()
                    got = float((ops.linear(x, w, bias).double() - exact).norm() / exact.norm())
                    ok = got <= (1e-5 if dtype == torch.float32 else TOLERANCE)
                    found.append({**about, "dtype": str(dtype), "m": m, "error": got, "ok": ok})
    return found


def measure(
    shapes: list[tuple[int, int]], names: list[str], families: list[str]
) -> list[dict[str, Any]]:
    """Every kernel on every shape and number of rows."""
    results = []
    for n, k in shapes:
        weight = torch.randn(n, k, device="cuda") * 0.02
        for make in (*PEERS, *((name, family) for name in names for family in families)):
            try:
                kernel = ours(weight, *make) if isinstance(make, tuple) else make(weight)
            except (ImportError, RuntimeError, ValueError) as e:
                if isinstance(make, tuple):
                    raise
                results.append({"name": make.__name__, "n": n, "k": k, "failed": str(e)[:300]})
                continue
            for m in ROWS:
                x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
                about = {"name": kernel.name, "n": n, "k": k, "m": m, "bytes": kernel.nbytes}
                if not (wrong := error(kernel, x)) <= TOLERANCE:
                    results.append({**about, "failed": f"relative error {wrong:.3g}"})
                    continue
                low, us, high = statistics.quantiles(microseconds(kernel, x), n=4)
                results.append({**about, "error": wrong, "us": us, "low_us": low, "high_us": high})
            del kernel
            torch.cuda.empty_cache()
    return results


def table(results: list[dict[str, Any]], bandwidth: float) -> str:
    """One line per shape and kernel: us, percent of the copy bandwidth at M = 1, ratio to dense."""
    timed = {(r["n"], r["k"], r["name"], r["m"]): r for r in results if "us" in r}
    lines = []
    for n, k, name in dict.fromkeys(key[:3] for key in timed):
        cells = []
        for m in ROWS:
            r, d = (timed.get((n, k, who, m)) for who in (name, "torch dense bf16"))
            if r is None or d is None:
                continue
            share = f" {100 * r['bytes'] / (r['us'] / 1e6) / bandwidth:.0f}%" if m == 1 else ""
            cells.append(f"{r['us']:.1f}{share} {d['us'] / r['us']:.2f}x")
        lines.append(f"{n}x{k} {name}: " + " | ".join(cells))
    return "\n".join(lines)


def main() -> None:
    """Checks, times, writes the file and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="only check; --device cpu interprets")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shape", action="append", help="N,K; may be repeated")
    parser.add_argument("--format", action="append")
    parser.add_argument("--family", action="append", choices=FAMILIES)
    parser.add_argument("--out", type=Path, default=RESULTS / "gpu.json")
    arguments = parser.parse_args()
    families = arguments.family or list(FAMILIES)
    checked = [c for family in families for c in check(arguments.device, family)]
    wrong = [c for c in checked if not c["ok"]]
    print(f"{len(checked)} checks, {len(wrong)} wrong {wrong[:5]}")
    if arguments.check:
        sys.exit(bool(wrong))
    shapes = [tuple(map(int, s.split(","))) for s in arguments.shape or ()] or list(SHAPES)
    bandwidth = copy_bandwidth()
    results = measure(shapes, arguments.format or list(FORMATS), families)
    decode = [
        {"model": shape.name, "family": family, "format": format,
         "ms": milliseconds_per_token(shape, format, FAMILIES.get(family))}
        for shape in MODELS
        for family, format in (("dense", None), *((f, "nf4") for f in families))
    ]  # fmt: skip
    fp8 = measure_fp8(families)
    about = {**machine(("lowbit", "torch", "triton")), "gpu": torch.cuda.get_device_name()}
    data = {
        "machine": about, "copy_bytes_per_second": bandwidth, "checks": checked, "results": results,
        "decode": decode, "fp8": fp8,
        "rows": {f"{family} {f}": backends.explain_request(
                     as_format(f), 8192, 8192, 1, torch.bfloat16, "cuda", FAMILIES[family]).selected
                 for f in arguments.format or FORMATS for family in families},
    }  # fmt: skip
    arguments.out.write_text(json.dumps(data, indent=1, sort_keys=True) + "\n")
    print(table(results, bandwidth))
    for r in fp8:
        time = f"{r['us']:.1f} us, {r['tflops']:.0f} TFLOP/s" if "us" in r else r["failed"]
        print(f"fp8 {r['m']}x{r['n']}x{r['k']} {r['name']}: {time}")
    for d in decode:
        print(f"{d['model']} {d['family']} {d['format']}: {d['ms']:.3f} ms per token")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
