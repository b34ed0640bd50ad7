"""Writes the result tables of README.md from benchmarks/results/*.json; --check only compares."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

import report_gpu
from cases import MODEL_TARGETS
from evaluate import full_table, ratios, summary_table
from report_gpu import row

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- results -->\n", "<!-- /results -->"
MIB = 1 << 20


def load(name: str) -> dict[str, Any]:
    """One result file."""
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def kernel_table(data: dict[str, Any]) -> str:
    """Time of a linear by format, rows of x and threads, and the ratio to torch's dense bf16."""
    runs = {run["threads"]: run["results"] for run in data["runs"]}
    rows = sorted({r["m"] for r in data["runs"][0]["results"]})
    formats = list(dict.fromkeys(r["format"] for r in data["runs"][0]["results"]))
    heads = [f"M = {m}, {t} thr." for m in rows for t in runs]
    lines = [f"| format | {' | '.join(heads)} |", "|---|" + "---|" * len(heads)]
    for format in formats:
        cells = []
        for m in rows:
            for results in runs.values():
                r = next(r for r in results if r["m"] == m and r["format"] == format)
                cells.append(f"{r['us']:.0f} us, {r['speedup']:.2f}x")
        lines.append(f"| {format} | {' | '.join(cells)} |")
    n, k = runs[1][0]["n"], runs[1][0]["k"]
    caption = (
        f"Linear of {n} x {k} with bf16 activations: median time and speed-up over torch's dense bf16 in the same run "
        f"(below 1: slower). {about(data)} Weights rotate through more than twice the last-level cache; each result is "
        "checked against the reference first."
    )
    return "\n".join([caption, "", *lines])


def model_table(data: dict[str, Any]) -> str:
    """`lowbit run --compare` on the model of the demo."""
    first = data["runs"][0]
    columns = [
        ("dense bf16, transformers", first["dense"], None),
        *((f"lowbit, {run['format'] or 'as stored'}", run, run) for run in data["runs"]),
    ]
    lines = [
        f"| | {' | '.join(name for name, _, _ in columns)} |",
        "|---|" + "---|" * len(columns),
        row("decode, tokens/s", [f"{c['decode_tokens_per_second']:.0f}" for _, c, _ in columns]),
        row("prefill, tokens/s", [f"{c['prefill_tokens_per_second']:.0f}" for _, c, _ in columns]),
        row("peak memory, MiB", [f"{c['peak_rss_bytes'] / MIB:.0f}" for _, c, _ in columns]),
        row(
            "bits per weight",
            ["16" if r is None else f"{r['bits_per_weight']:.2f}" for _, _, r in columns],
        ),
        row("perplexity", [perplexity(c, r) for _, c, r in columns]),
        row(
            "KL to dense, nats",
            ["" if r is None else f"{r['kl_divergence']:.4f}" for _, _, r in columns],
        ),
    ]
    caption = f"{first['model']}, {first['threads']} threads. {about(data)}"
    return "\n".join([caption, "", *lines])


def peers_model_table(data: dict[str, Any]) -> str:
    """Whole models beside llama.cpp: tokens per second and the ratio to its fastest type."""
    kinds = ("prefill", "decode", "decode_late")
    heads = (
        f"prompt of {data['prompt']}",
        f"decode after {data['short']}",
        f"decode after {data['prompt']}",
    )
    lines = [f"| model | threads | {' | '.join(heads)} |", "|---|---|---|---|---|"]
    for model, threads in dict.fromkeys((r["model"], r["threads"]) for r in data["results"]):
        some = [r for r in data["results"] if (r["model"], r["threads"]) == (model, threads)]
        cells = []
        for kind in kinds:
            own = next(r[kind] for r in some if r["library"] == "lowbit")
            best = max((r for r in some if r["library"] != "lowbit"), key=lambda r: r[kind])
            target = MODEL_TARGETS[model].get(kind) if threads > 1 else None
            ratio = f"{own / best[kind]:.2f}x"
            aim = "" if target is None else f", target {target:g}x"
            cells.append(
                f"{own:.0f} / {best[kind]:.0f} ({best['type']}): "
                + (f"**{ratio}**" if target and own / best[kind] >= target else ratio)
                + aim
            )
        lines.append(f"| {model} | {threads} | {' | '.join(cells)} |")
    caption = (
        "Tokens per second here / in llama.cpp with its fastest 4-bit type (in brackets), exact bf16 activations here, "
        f"int8 there. The 1.2 B Llama has random weights, Q4_0 here. {about(data)}"
    )
    return "\n".join([caption, "", *lines])


def perplexity(column: dict[str, Any], run: dict[str, Any] | None) -> str:
    """Perplexity of a column, wherever the command put it."""
    value = column.get("perplexity") if run is None else run["perplexity"]
    return "" if value is None else f"{value:.2f}"


def about(data: dict[str, Any]) -> str:
    """The machine in one sentence."""
    m = data["machine"]
    versions = ", ".join(f"{name} {v}" for name, v in m["versions"].items())
    return f"{m['cpu']}, {versions}, commit {m['commit']}."


def fp8_table(isa: str) -> str:
    """Ratio of `fp8.scaled_mm` to torch's dense bf16, by pair of granularities, M and threads."""
    data = load(f"fp8_{isa}")
    cases = {(c["m"], c["threads"]): c["results"] for c in data["cases"]}
    n, k = data["cases"][0]["n"], data["cases"][0]["k"]
    names = [r["name"] for r in data["cases"][0]["results"]][1:]
    heads = [f"M = {m}, {t} thr." for m, t in sorted(cases)]
    lines = [row("a x b", heads), "|---|" + "---|" * len(heads)]
    for name in names:
        found = [next(r for r in cases[key] if r["name"] == name) for key in sorted(cases)]
        lines.append(row(name.removeprefix("lowbit "), [f"{r['speedup']:.2f}x" for r in found]))
    caption = (
        f"`fp8.scaled_mm` of M x {k} and {n} x {k} with {isa}: time of torch's dense bf16 over that of the FP8 "
        f"product in the same run (below 1: slower). {about(data)} Operands are quantized beforehand, weights rotate "
        "through more than twice the last-level cache, each result is checked against float64 first."
    )
    return "\n".join([caption, "", *lines])


def quantizers_table(data: dict[str, Any]) -> str:
    """Time and error of every quantizer, and how they compare with scikit-learn's k-means."""
    lines = [row("method, 4 bits", ["seconds per million weights", "error"]), "|---|---|---|"]
    lines += [row(r["name"], [f"{r['seconds']:.3f}", f"{r['error']:.4f}"]) for r in data["methods"]]
    rows = data["rows"]
    beside = [
        f"k-means of a row of {rows['weights']}, {rows['levels']} entries: {1e3 * rows['seconds']:.2f} ms, "
        f"{rows['scikit_learn_seconds'] / rows['seconds']:.0f} times faster than scikit-learn's best of ten starts, "
        f"and never worse (target 20); one start takes {rows['scikit_learn_one_start_seconds'] / rows['seconds']:.1f} "
        "times our time."
    ]
    for d in data["densities"]:
        worst = max(max(found) for found in d["error_ratios"].values())
        taken = d["kde_seconds"]["lm"]
        beside.append(
            f"KDE from 0.1 % of a million {d['distribution']} weights, rounded to it: {taken:.3f} s, "
            f"{d['scikit_learn_seconds'] / taken:.0f} times faster than k-means of scikit-learn on all of them "
            f"(target 20) and {d['kmeans_seconds'] / taken:.1f} times faster than ours; error at most {worst:.3f} of "
            "that of k-means (target 1.05)."
        )
    caption = (
        f"Quantizers on N(0, 1), {data['threads']} threads: squared error over squared weight (gptq: error of outputs "
        f"over that of round to nearest). {about(data)}"
    )
    return "\n".join([caption, "", *lines, "", " ".join(beside)])


def training_table(data: dict[str, Any]) -> str:
    """Training in FP8 beside bf16 with fp32 AdamW: loss and bytes, then errors of states and time of a step."""
    runs, numel = (
        {r: [x for x in data["runs"] if x["recipe"] == r] for r in ("bf16", "fp8")},
        data["parameters"],
    )
    lines = [
        row("", ["bf16, torch AdamW in fp32", "FP8Linear, FP8AdamW, FP8 activations"]),
        "|---|---|---|",
        *(
            row(
                f"held-out loss, seed {runs['bf16'][i]['seed']}",
                [f"{some[i]['loss']:.3f}" for some in runs.values()],
            )
            for i in range(len(runs["bf16"]))
        ),
        row(
            "optimizer state, bytes per parameter",
            [f"{some[0]['state_bytes'] / numel:.2f}" for some in runs.values()],
        ),
        row(
            "saved activations of the blocks, MB",
            [f"{some[0]['activation_bytes'] / 1e6:.1f}" for some in runs.values()],
        ),
    ]
    names = list(data["state_errors"])
    errors = [row("m \\ v", names), "|---|" + "---|" * len(names)]
    errors += [
        row(name, [f"{1e4 * e:.2f}" for e in cells.values()])
        for name, cells in data["state_errors"].items()
    ]
    steps = "; ".join(
        f"{threads} thread{'s' * (threads != '1')}: "
        + ", ".join(f"{name} {ns:.2f}" for name, ns in times.items())
        for threads, times in data["step_ns_per_parameter"].items()
    )
    head = (
        f"Training in FP8: a byte-level transformer of {numel / 1e6:.1f} M parameters, "
        f"{len(runs['fp8'][0]['curve'])} steps of {data['tokens_per_step']} bytes of Python's standard library "
        "([loss curves](benchmarks/results/fp8_training.png)). "
        f"{about(data)}"
    )
    middle = (
        "Relative squared error of m / sqrt(v) with states in FP8, 1e-4, after the bf16 runs (+X: dynamic range "
        "expansion):"
    )
    return "\n".join(
        [
            head,
            "",
            *lines,
            "",
            middle,
            "",
            *errors,
            "",
            f"A step on CPU, ns per parameter: {steps}.",
        ]
    )


def digits_table(data: dict[str, Any]) -> str:
    """Accuracy by method of training through the quantizer, and what implicit gradients cost."""
    rows = {(r["model"], r["method"]): r for r in data["rows"]}
    models = list(dict.fromkeys(r["model"] for r in data["rows"]))
    lines = [
        row(
            "method",
            [f"{m}: {head}" for m in models for head in ("bits", "untrained", "trained")],
        ),
        "|---|" + "---|" * (3 * len(models)),
    ]
    for method in dict.fromkeys(r["method"] for r in data["rows"]):
        cells = []
        for model in models:
            r = rows[model, method]
            bits = f"{fmean(r['bits']):.2f}" if "bits" in r else "dense"
            cells += [bits, *(f"{fmean(r[key]):.1f}" for key in ("before", "after"))]
        lines.append(row(method, cells))
    train, test = data["images"]
    changed = sum(sum(r.get("changed", [])) for r in data["rows"])
    head = (
        f"Training through the quantizer on scikit-learn's digits: test accuracy in %, mean of "
        f"{len(data['seeds'])} seeds, {train} images for training and {test} for testing. {about(data)} Bits are "
        "stored bits per quantized weight; k-means, integers without activations, DKM and IDKM quantize every layer, "
        "the others all but the first and the last. The packed model runs `lowbit.linear`, or `lowbit.binary.linear` "
        f"for XNOR: its weights equal the trained ones bit for bit, and {changed} predictions differ."
    )
    saved = data["saved_bytes"]
    counts = list(saved["implicit"])
    gradients = "; ".join(
        f"tau {g['tau']:g}: {g['implicit_error']:.0e}, {g['jfb_cosine']:.3f}"
        for g in data["gradients"]
    )
    memory = "; ".join(
        f"{mode} {' / '.join(f'{by[c] / 1e6:.1f}' for c in counts)}" for mode, by in saved.items()
    )
    tail = (
        f"Soft k-means: relative error of the implicit gradient against the unrolled one, and cosine of the "
        f"Jacobian-free one to it: {gradients}. MB saved for backward (10000 weights, 16 centers) with "
        f"{' / '.join(counts)} iterations: {memory}."
    )
    return "\n".join([head, "", *lines, "", tail])


SCORES = {
    "cosine": ("cosine", "{:.4f}"),
    "spearman": ("Spearman", "{:.4f}"),
    "perplexity": ("perplexity", "{:.4g}"),
    "kl": ("KL", "{:.3g}"),
    "agreement": ("first class as fp32", "{:.1%}"),
}


def methods_tables(data: dict[str, Any]) -> str:
    """Every quantization method on one model after the other."""
    parts = [
        "Quantization methods on real models ([error over bits](benchmarks/results/methods.png)). Groups of 64 with "
        "fp16 scales, or a table per row. Errors are squared and relative, mean over layers, of the weights and of the "
        "outputs on the text or images of the test; every tensor has run through `lowbit.linear` on a fast kernel with "
        "rows of the identity as x, bit for bit. AWQ divides the inputs by its scales outside of the layer."
    ]
    for model in data.values():
        dense = model["dense"].get("perplexity")
        own = "" if dense is None else f" Perplexity of the dense model: {dense:.4g}."
        caption = f"{model['title']}; {model['note']}.{own} {about(model)}"
        parts += [caption, methods_table(model)]
    return "\n\n".join(parts)


def methods_table(model: dict[str, Any]) -> str:
    """One line per method: size, and by bits the errors and what the model says."""
    rows = {(r["method"], r["bits"]): r for r in model["rows"]}
    widths = sorted({bits for _, bits in rows}, reverse=True)
    score = " / ".join(SCORES[s][0] for s in model["scores"])
    heads = [
        "bits per weight",
        *(h for b in widths for h in (f"{b} bits: weights, %", "outputs, %", score)),
    ]
    lines = [row("method", heads), "|---|" + "---|" * len(heads)]
    for method in dict.fromkeys(m for m, _ in rows):
        found = [rows.get((method, b)) for b in widths]
        cells = [" / ".join(f"{r['bits_per_weight']:.2f}" for r in found if r)]
        for r in found:
            cells += (
                [f"{100 * r[e]:.3g}" for e in ("weight_error", "output_error")] if r else 2 * [""]
            )
            cells.append(
                " / ".join(SCORES[s][1].format(r[s]) for s in model["scores"]) if r else ""
            )
        lines.append(row(method, cells))
    return "\n".join(lines)


def peers_tables(data: dict[str, Any]) -> tuple[str, str]:
    """The summary for README.md, and the table of every format and M for a file beside the results."""
    found = ratios(data)
    shapes = ", ".join(f"{n}x{k}" for n, k in sorted({r.shape for r in found}))
    caption = (
        "Time of the fastest rival over our time (above 1: we are faster; bold: the target on 1 / 2 threads is met). "
        f"{about(data)} Linears of {shapes}; exact bf16 activations unless said; candidates take turns, weights rotate "
        "through more than twice the last-level cache, and each result is first checked against float64. "
    )
    cost = data["overhead"]
    own = (
        f"A call on a {cost['n']}x{cost['k']} layer takes {cost['op_ns'] / 1e3:.1f} us, an empty torch op with "
        f"the same arguments {cost['empty_ns'] / 1e3:.1f} us (target: at most {cost['target_ns'] / 1e3:g} us more). "
    )
    where = "Every format and M: [peers.md](benchmarks/results/peers.md)."
    note = "The worst shape is named with the rival that won there."
    full = f"# Side by side\n\n{caption}{note}\n\n{full_table(found)}\n"
    names = ("time_over_m", "bandwidth", "speed_over_bits")
    plots = "\n".join(f"![{n.replace('_', ' ')}](benchmarks/results/peers_{n}.png)" for n in names)
    return f"{caption}{own}{where}\n\n{summary_table(found)}\n\n{plots}", full


def main() -> None:
    """Rewrites README.md, peers.md and the plots, or with --check fails if a text differs from the result files."""
    readme, full = ROOT / "README.md", ROOT / "benchmarks" / "results" / "peers.md"
    text = readme.read_text()
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    peers = load("peers")
    summary, every = peers_tables(peers)
    # Without the file, methods.py has not been run.
    methods = [load("methods")] if (full.parent / "methods.json").exists() else []
    parts = (
        model_table(load("model")),
        peers_model_table(load("peers_model")),
        kernel_table(load("kernels")),
        summary,
        *(fp8_table(isa) for isa in ("avx512bf16", "avx2")),
        training_table(load("fp8_training")),
        digits_table(load("digits")),
        quantizers_table(load("quantizers")),
        *(methods_tables(data) for data in methods),
        *report_gpu.tables(load("gpu") if (full.parent / "gpu.json").exists() else None),
    )
    new = head + BEGIN + "\n\n".join(parts) + "\n" + END + tail
    if "--check" in sys.argv[1:]:
        for path, expected in ((readme, new), (full, every)):
            if path.read_text() != expected:
                raise SystemExit(
                    f"{path.name} differs from benchmarks/results: run benchmarks/report.py"
                )
        return
    readme.write_text(new)
    full.write_text(every)
    from plots import draw, draw_methods  # matplotlib is in the peers' environment alone

    draw(peers, full.parent)
    for data in methods:
        draw_methods(data, full.parent)


if __name__ == "__main__":
    main()
