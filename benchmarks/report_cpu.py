"""Tables of times on the CPU: linears, FP8 products, a whole model, other libraries; see report.py."""

from __future__ import annotations

from typing import Any

from cases import MODEL_TARGETS
from evaluate import full_table, ratios, summary_table
from report_gpu import row

MIB = 1 << 20


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


def conv_table(data: dict[str, Any]) -> str:
    """Convolutions by layer and batch, as ratios of times in the same turns."""
    heads = {
        "codebook, bf16 x, to torch bf16": ("torch_bf16", "codebook_bf16"),
        "codebook, fp32 x, to torch fp32": ("torch_fp32", "codebook_fp32"),
        "int8 to torch fp32": ("torch_fp32", "int8"),
        "int8 to onnxruntime int8": ("onnxruntime_int8", "int8"),
    }
    lines = [row("layer", ["batch", "torch fp32", *heads]), "|---|" + "---|" * (2 + len(heads))]
    for r in data["rows"]:
        ms = r["ms"]
        cells = [f"{ms[a] / ms[b]:.2f}x" if a in ms else "" for a, b in heads.values()]
        lines.append(row(r["layer"], [str(r["batch"]), f"{ms['torch_fp32']:.2f} ms", *cells]))
    caption = (
        f"Convolutions in channels_last memory, {data['threads']} threads: how many times faster than dense ones "
        "(below 1: slower), by medians of calls in turns. The codebook is NF4 with a scale for each filter and x as it "
        "is; int8 has static scales of activations, but for depthwise layers, which take x as it is. "
        f"{about(data)}"
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


def fp8_table(isa: str, data: dict[str, Any]) -> str:
    """Ratio of `fp8.scaled_mm` to torch's dense bf16, by pair of granularities, M and threads."""
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


def peers_tables(data: dict[str, Any]) -> str:
    """The ratios to the fastest rival: by case, then by format and M."""
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
    note = "By format and M; the worst shape is named with the rival that won there:"
    names = ("time_over_m", "bandwidth", "speed_over_bits")
    plots = "\n".join(f"![{n.replace('_', ' ')}](peers_{n}.png)" for n in names)
    return "\n\n".join((caption + own, summary_table(found), plots, note, full_table(found)))
