"""Quality over bits: writes benchmarks/results/kl.json.

`weights` has the squared errors of single matrices, quantized without data. `models` has, for real language models with
all linears but the head quantized, KL(dense || quantized) and the perplexity on text that no method has seen: without
data, with the mean square of every input feature as importance, and by GPTQ. ggml's types are quantized by
libggml-python, with the same importance; IQ types and K-quants need whole blocks of 256, so rows are put together.
Results are kept row by row: what is there is measured again only with --again. report.py makes the tables and the plot.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from typing import Any

import torch
from adapters import ggml
from kl_models import MODELS, Subject
from record import RESULTS, machine
from torch import Tensor

from lowbit.formats import parse
from lowbit.methods import quantize
from lowbit.ptq import InputStatistics
from lowbit.weights.quantized import stored_bytes

PATH = RESULTS / "kl.json"
NONE, IMPORTANCE, GPTQ = "none", "importance", "gptq"
FORMATS = (
    "km4", "km4x2", "km4_g16", "km4x2_g16", "km3", "km3x2", "km3_g16", "km3x2_g16", "km2x2", "km2_g16",
    "km2x2_g16", "nf4", "kmeans4_g32_dq8",
)  # fmt: skip
TYPES = ("Q4_0", "Q4_K", "IQ4_NL", "IQ4_XS", "Q3_K", "IQ3_S", "Q2_K", "IQ2_S")
# Types of two bits without importance are refused by ggml.
NEED_IMPORTANCE = ("IQ2_S",)
ROWS = 192


def quantized(
    weight: Tensor, name: str, data: str, inputs: InputStatistics | None
) -> tuple[Tensor, int]:
    """The values of a weight (N, K) in a format of ours or, after "ggml ", a type of ggml's, and its bytes."""
    kind = name.removeprefix("ggml ")
    diagonal = None if inputs is None or data == NONE else inputs.relative_diagonal
    if kind != name:
        return ggml.quantized(weight, kind, diagonal)
    if data == GPTQ:
        assert inputs is not None
        qt = quantize(weight, name, "gptq", hessian=inputs.relative_hessian)
    elif diagonal is None:
        qt = quantize(weight, name)
    else:
        method = "kmeans" if name.startswith("kmeans") else "search"
        qt = quantize(weight, name, method, weights=diagonal)
    return qt.dequantize(), qt.nbytes


def relative(weight: Tensor, made: Tensor) -> float:
    """The squared error over the squared weight."""
    return float((weight - made).double().square().sum() / weight.double().square().sum())


def measure(subject: Subject, name: str, data: str) -> dict[str, Any]:
    """Bits of a weight, error of the weights (mean over layers), the scores and the CPU time of quantizing."""
    start = time.process_time()
    found = {
        layer: quantized(weight, name, data, subject.inputs[layer])
        for layer, weight in subject.weights.items()
    }
    seconds = time.process_time() - start
    weights = {layer: values for layer, (values, _) in found.items()}
    count = sum(w.numel() for w in weights.values())
    errors = [relative(w, weights[layer]) for layer, w in subject.weights.items()]
    return {
        "format": name,
        "data": data,
        "bits_per_weight": 8 * sum(size for _, size in found.values()) / count,
        "weight_error": sum(errors) / len(errors),
        **subject.score(weights),
        "cpu_seconds": seconds,
    }


def cases() -> Iterator[tuple[str, str]]:
    """Every format with every kind of data that it may be quantized with."""
    for name in FORMATS:
        yield from ((name, data) for data in (GPTQ, IMPORTANCE, NONE))
    for kind in TYPES:
        yield f"ggml {kind}", IMPORTANCE
        if kind not in NEED_IMPORTANCE:
            yield f"ggml {kind}", NONE


def matrices() -> dict[str, Tensor]:
    """ROWS rows of matrices of several kinds, (ROWS, K) fp32."""
    from methods_models import minilm

    generator = torch.Generator().manual_seed(0)
    found = {"Gaussian": torch.randn(ROWS, 1536, generator=generator)}
    layers = minilm().encoder.layer
    for i in (1, 4):
        found[f"MiniLM {i}"] = layers[i].output.dense.weight.detach()
    for key, numbers in (("smollm2", (3, 15, 27)), ("qwen2", (2, 12, 22))):
        weights = Subject(MODELS[key], run=False).weights
        for i in numbers:
            found[f"{key} {i}"] = weights[f"model.layers.{i}.mlp.down_proj"]
    return {name: w[:ROWS].clone() for name, w in found.items()}


def weight_errors() -> list[dict[str, Any]]:
    """A row for every format and type: bits of a weight (of ours at 4096 x 4096), and the error of every matrix."""
    found = matrices()
    rows = []
    for name in (*FORMATS, *(f"ggml {t}" for t in TYPES if t not in NEED_IMPORTANCE)):
        made = {m: quantized(w, name, NONE, None) for m, w in found.items()}
        size = 8 * made["Gaussian"][1] / found["Gaussian"].numel()
        if not name.startswith("ggml "):
            size = 8 * stored_bytes(parse(name), 4096, 4096) / 4096**2
        errors = {m: relative(w, made[m][0]) for m, w in found.items()}
        rows.append({"format": name, "bits_per_weight": size, "errors": errors})
        print(json.dumps(rows[-1]), flush=True)
    return rows


def save(report: dict[str, Any]) -> None:
    """Writes the file as it is by now."""
    PATH.write_text(json.dumps(report, indent=1) + "\n")


def main() -> None:
    """Measures what is asked for and writes the file after every row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=MODELS, action="append", help="default: all")
    parser.add_argument("--format", action="append", help="a whole name, as ggml Q4_K")
    parser.add_argument("--data", choices=(NONE, IMPORTANCE, GPTQ), action="append")
    parser.add_argument("--weights", action="store_true", help="only the errors of matrices")
    parser.add_argument("--again", action="store_true", help="also what is there")
    arguments = parser.parse_args()
    about = machine(("lowbit", "torch", "transformers", "libggml-python"))
    report = json.loads(PATH.read_text()) if PATH.exists() else {"weights": {}, "models": {}}
    if arguments.weights or not (arguments.model or report["weights"]):
        report["weights"] = {"machine": about, "rows": weight_errors()}
        save(report)
    for key in () if arguments.weights else arguments.model or MODELS:
        start = time.perf_counter()
        subject = Subject(MODELS[key])
        found = report["models"].setdefault(key, {"rows": []})
        found |= {
            "machine": about,
            "title": MODELS[key].title,
            "windows": [MODELS[key].calibration, MODELS[key].test],
            "dense": {"perplexity": subject.perplexity},
        }
        for name, data in cases():
            there = [r for r in found["rows"] if (r["format"], r["data"]) == (name, data)]
            wanted = name in (arguments.format or [name]) and data in (arguments.data or [data])
            if not wanted or (there and not arguments.again):
                continue
            row = {**measure(subject, name, data), "commit": about["commit"]}
            print(json.dumps(row), flush=True)
            found["rows"] = [r for r in found["rows"] if r not in there] + [row]
            save(report)
        print(f"{key}: {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
