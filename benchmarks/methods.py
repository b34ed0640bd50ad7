"""Every quantization method on real models: writes benchmarks/results/methods.json.

A method is a line of METHODS. Every tensor that it makes is first run through `lowbit.linear` on a fast kernel, with
rows of the identity as x, which must give its dequantized weight bit for bit. `--model` measures one model and keeps
the results of the others; `--method` and `--bits` only print. report.py makes the tables and the plot.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from methods_models import SUBJECTS, Layer, Subject, output_square
from record import RESULTS, machine
from torch import Tensor

from lowbit import Format, QuantTensor, codebooks, explain, linear
from lowbit.explanation import REFERENCE
from lowbit.methods import quantize
from lowbit.ptq.smooth import awq_scales

GROUP = 64
IDENTITY_ROWS = 64


@dataclass(frozen=True)
class Made:
    """A quantized weight, and what its inputs are divided by, (K,): the layer before would take that in."""

    weight: QuantTensor
    scales: Tensor | None = None


Make = Callable[[Subject, int], dict[str, Made]]
Given = Callable[[Layer], dict[str, Tensor]]


@dataclass(frozen=True)
class Method:
    """A way to quantize all layers of a model to codes of so many bits."""

    name: str
    make: Make
    bits: tuple[int, ...] = (4, 3, 2)


def each(
    format: str | Callable[[int], Format],
    method: str | None = None,
    *,
    given: Given = lambda layer: {},
    **options: Any,
) -> Make:
    """Every layer by itself: `lowbit.quantize` with what `given` takes from the layer.

    `format` may be a name with {} in place of the bits.
    """

    def make(subject: Subject, bits: int) -> dict[str, Made]:
        chosen = format.format(bits) if isinstance(format, str) else format(bits)
        return {
            name: Made(quantize(layer.weight, chosen, method, **given(layer), **options))
            for name, layer in subject.layers.items()
        }

    return make


def awq(format: str) -> Make:
    """Round to nearest behind the scales of AWQ, which linears that read the same input share."""

    def make(subject: Subject, bits: int) -> dict[str, Made]:
        layers, chosen, made = subject.layers, format.format(bits), {}
        for names in readers(layers):
            inputs = layers[names[0]].inputs
            weights = [layers[name].weight for name in names]
            scales = awq_scales(inputs.absmean, inputs.hessian, weights, chosen, grid=10)
            for name, weight in zip(names, weights, strict=True):
                made[name] = Made(quantize(weight * scales, chosen), scales)
        return made

    return make


def allocated(method: str, given: Given = lambda layer: {}) -> Make:
    """The formats that `allocate` chooses within the size of INT."""

    def make(subject: Subject, bits: int) -> dict[str, Made]:
        size, _ = subject.allocation.uniform[INT.format(bits)]
        best = subject.allocation.at(size)
        return {
            name: Made(quantize(layer.weight, c.option.rule.format, method, **given(layer)))
            for c in best.choices
            for name, layer in subject.layers.items()
            if name in c.names
        }

    return make


def readers(layers: dict[str, Layer]) -> list[list[str]]:
    """The layers that read the same input, by the sums of what they were given."""
    found: dict[bytes, list[str]] = {}
    for name, layer in layers.items():
        found.setdefault(layer.inputs.diagonal.numpy().tobytes(), []).append(name)
    return list(found.values())


def hessian(layer: Layer) -> dict[str, Tensor]:
    """For GPTQ."""
    return {"hessian": layer.inputs.hessian}


def diagonal(layer: Layer) -> dict[str, Tensor]:
    """Importance: the mean square of a column's input."""
    return {"weights": layer.inputs.diagonal}


def fisher(layer: Layer) -> dict[str, Tensor]:
    """Importance: the mean square of a weight's gradient."""
    return {"weights": layer.fisher}


@cache
def absmax_optimal(bits: int) -> Format:
    """The table of least squared error for normal weights over their absmax."""
    return Format.lut(bits=bits, table=codebooks.absmax_optimal(bits, GROUP), group=GROUP)


@cache
def af(bits: int) -> Format:
    """AbnormalFloat."""
    return Format.lut(bits=bits, table=codebooks.af(bits, GROUP), group=GROUP)


def nf(bits: int) -> Format:
    """NormalFloat."""
    return Format.lut(bits=bits, table=codebooks.nf(bits), group=GROUP)


def sf(bits: int) -> Format:
    """Student Float."""
    return Format.lut(bits=bits, table=codebooks.sf(bits), group=GROUP)


INT, UINT, KMEANS, KMEANS_ROW = "int{}_g64", "uint{}_g64", "kmeans{}", "kmeans{}_pr"
SEARCH, SEARCH_PAIR = "km{}", "km{}x2"
OUTLIERS = "_o4"
METHODS = [
    Method("int", each(INT)),
    Method("int with zero", each(UINT)),
    Method("NF", each(nf)),
    Method("SF", each(sf)),
    Method("AF", each(af), (4, 3)),
    Method("absmax-optimal", each(absmax_optimal), (4, 3)),
    Method("k-means", each(KMEANS)),
    Method("k-means, weighted", each(KMEANS, "kmeans", given=diagonal)),
    Method("k-means per row", each(KMEANS_ROW)),
    Method("k-means per row, weighted", each(KMEANS_ROW, "kmeans", given=diagonal)),
    Method("k-means per row, Fisher", each(KMEANS_ROW, "kmeans", given=fisher)),
    Method(
        "k-means per row, Fisher, outliers", each(KMEANS_ROW + OUTLIERS, "kmeans", given=fisher)
    ),
    Method("int, outliers", each(INT + OUTLIERS)),
    Method("int, allocated", allocated("rtn"), (4, 3)),
    Method("search", each(SEARCH)),
    Method("search, two tables", each(SEARCH_PAIR)),
    Method("search, groups of 16", each(SEARCH + "_g16")),
    Method("search, two tables, groups of 16", each(SEARCH_PAIR + "_g16")),
    Method("search, two tables, weighted", each(SEARCH_PAIR, "search", given=diagonal)),
    Method("KDE", each(KMEANS_ROW, "kde", sample=0.1)),
    Method("Lloyd", each(KMEANS_ROW, "lloyd")),
    Method(
        "DistQ, Student's t", each(KMEANS_ROW, "distq", distribution="student_t", tail="absmax")
    ),
    Method("NUUQ", each(KMEANS, "nuuq")),
    Method("multi-bit binary", each(KMEANS_ROW, "multibit")),
    Method("TWN", each("ternary_g64", "twn"), (2,)),
    Method("BitNet b1.58", each("ternary_g64", "bitnet"), (2,)),
    Method("HQQ", each("uint{}_zfloat", "hqq")),
    Method("AWQ, int", awq(INT)),
    Method("AWQ, int with zero", awq(UINT)),
    Method("GPTQ, int", each(INT, "gptq", given=hessian)),
    Method("GPTQ, int, allocated", allocated("gptq", hessian), (4, 3)),
    Method("GPTQ, int, act_order", each(INT, "gptq", given=hessian, act_order=True)),
    Method("GPTQ, int with zero", each(UINT, "gptq", given=hessian)),
    Method("GPTQ, NF", each(nf, "gptq", given=hessian)),
    Method("GPTQ, k-means", each(KMEANS, "gptq", given=hessian)),
    Method("GPTQ, k-means per row", each(KMEANS_ROW, "gptq", given=hessian)),
    Method("GPTQ, search", each(SEARCH, "gptq", given=hessian)),
    Method("GPTQ, search, two tables", each(SEARCH_PAIR, "gptq", given=hessian)),
]


def checked(qt: QuantTensor) -> Tensor:  # (N, K) fp32
    """The dequantized weight, after rows of the identity have found it on a fast kernel."""
    k = qt.shape[1]
    columns = torch.linspace(0, k - 1, min(k, IDENTITY_ROWS)).long()
    x = torch.zeros(len(columns), k)
    x[torch.arange(len(columns)), columns] = 1
    if explain(x, qt).selected == REFERENCE:
        raise RuntimeError(f"no fast kernel runs {qt}")
    weight = qt.dequantize()
    if not torch.equal(linear(x, qt), weight.T[columns]):
        raise RuntimeError(f"the kernel and the reference disagree on {qt}")
    return weight


def measure(subject: Subject, method: Method, bits: int) -> dict[str, Any]:
    """Bits of a weight, relative squared errors of weights and of outputs (mean over layers), the scores, and the CPU
    time that quantization took.
    """
    start = time.process_time()
    made = method.make(subject, bits)
    seconds = time.process_time() - start
    weights, weight_error, outputs_error, size, count = {}, 0.0, 0.0, 0, 0
    for name, layer in subject.layers.items():
        weight = checked(made[name].weight)
        if (scales := made[name].scales) is not None:
            weight = weight / scales
        error = weight - layer.weight
        weight_error += float(error.square().sum() / layer.weight.square().sum())
        outputs_error += output_square(error, layer.test_inputs) / layer.output_square
        weights[name] = weight
        size, count = size + 8 * made[name].weight.nbytes, count + weight.numel()
    return {
        "method": method.name,
        "bits": bits,
        "bits_per_weight": size / count,
        "weight_error": weight_error / len(weights),
        "output_error": outputs_error / len(weights),
        **subject.score(weights),
        "cpu_seconds": seconds,
    }


def run(subject: Subject, methods: list[Method], bits: list[int]) -> list[dict[str, Any]]:
    """A row for every method and number of bits."""
    rows = []
    for method in methods:
        for b in method.bits:
            if b in bits and method.name not in subject.left_out:
                rows.append(measure(subject, method, b))
                print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    """Measures and writes the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=SUBJECTS, action="append", help="default: all")
    parser.add_argument("--method", action="append", help="part of a name; writes no file")
    parser.add_argument("--bits", type=int, action="append", help="writes no file")
    arguments = parser.parse_args()
    wanted = arguments.method or [""]
    methods = [m for m in METHODS if any(part in m.name for part in wanted)]
    path = RESULTS / "methods.json"
    for name in arguments.model or SUBJECTS:
        about = machine(("lowbit", "torch", "transformers"))
        start = time.perf_counter()
        subject = SUBJECTS[name]()
        rows = run(subject, methods, arguments.bits or [2, 3, 4])
        result = {
            "machine": about,
            "title": subject.title,
            "note": subject.note,
            "scores": subject.scores,
            "dense": subject.score({n: layer.weight for n, layer in subject.layers.items()}),
            "rows": rows,
            "seconds": time.perf_counter() - start,
        }
        if not arguments.method and not arguments.bits:
            report = json.loads(path.read_text()) if path.exists() else {}
            report = {key: report.get(key) for key in SUBJECTS} | {name: result}
            report = {key: found for key, found in report.items() if found}
            path.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
