"""Tables of the accuracy that quantization, and training with it, keep; see report.py."""

from __future__ import annotations

from statistics import fmean
from typing import Any

from report_cpu import about
from report_gpu import row

SCORES = {
    "cosine": ("cosine", "{:.4f}"),
    "spearman": ("Spearman", "{:.4f}"),
    "perplexity": ("perplexity", "{:.4g}"),
    "kl": ("KL", "{:.3g}"),
    "agreement": ("first class as fp32", "{:.1%}"),
}


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
        "([loss curves](fp8_training.png)). "
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


# What the papers' tables say: the first is above the second.
VIT_ORDER = (
    ("FQ-ViT, everything", "min-max, everything"),
    ("OMSE, everything", "min-max, everything"),
    ("PTQ4ViT", "min-max, products alone"),
    ("RepQ-ViT", "min-max, products alone"),
    ("RepQ-ViT", "PTQ4ViT"),
)


def vit_table(data: dict[str, Any]) -> str:
    """Accuracy of integer vision transformers by method and bits, and whether the papers' order holds."""
    rows = {(r["method"], r["bits"]): r for r in data["rows"]}
    widths = sorted({bits for _, bits in rows} - {32}, reverse=True)
    exact = fmean(rows["float", 32]["accuracy"])
    lines = [row("method", [f"W{b}A{b}: accuracy, % (error, %)" for b in widths])]
    lines.append("|---|" + "---|" * len(widths))
    for method in dict.fromkeys(m for m, _ in rows if m != "float"):
        found = [rows.get((method, b)) for b in widths]
        cells = [
            f"{fmean(r['accuracy']):.2f} ({100 * fmean(r['error']):.1f})" if r else ""
            for r in found
        ]
        lines.append(row(method, cells))
    train, test = data["images"]
    model = data["model"]
    head = (
        "Vision transformers in integers, after training, on scikit-learn's digits: a transformer of "
        f"{model['blocks']} blocks of width {model['width']} on patches of 2 x 2; "
        f"test accuracy and the relative error of scores against "
        f"float, mean of {len(data['seeds'])} seeds, {train} images for training, {test} for testing (an image is "
        f"{100 / test:.2f} points), {data['calibration']} for calibration. Float: {exact:.2f} %. {about(data)} "
        "With everything quantized, all results have the bits of the column; with products alone, those that no "
        "product takes have 16 (12 before GELU); so do the last three methods."
    )
    gap = fmean(rows["I-ViT", 8]["accuracy"]) - exact
    verdicts = []
    for better, worse in VIT_ORDER:
        gaps = {b: [fmean(rows[m, b]["accuracy"]) for m in (better, worse)] for b in widths}
        states = ", ".join(
            f"{b} bits {a - c:+.2f}{'' if a >= c else ', which is against it'}"
            for b, (a, c) in gaps.items()
        )
        verdicts.append(f"{better} over {worse}: {states}")
    tail = (
        f"I-ViT in 8 bits is {gap:+.2f} points from float (target: 0.3 below it at most). The order of the papers' "
        f"tables, as points of accuracy: {'; '.join(verdicts)}."
    )
    return "\n".join([head, "", *lines, "", tail])


def methods_tables(data: dict[str, Any]) -> str:
    """Every quantization method on one model after the other."""
    parts = [
        "Quantization methods on real models ([error over bits](methods.png)). Groups of 64 with "
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


# KL with importance, and error of weights without data, of the types of ik_llama.cpp, which no package carries: commit
# 8337e4cd of it, measured once on another cut of the same text, 16 windows, SmolLM2 permuted likewise (for errors: down
# projections 3, 15 and 27). On that cut ggml's IQ4_XS had IQ4_XS_THERE.
IK = (("IQ4_K", 4.5, 0.0430), ("IQ4_KS", 4.27, 0.0587), ("IQ3_K", 3.44, 0.2079), ("IQ3_KS", 3.2, 0.3171),
      ("IQ2_KL", 2.7, 0.6743), ("IQ2_K", 2.38, 1.3294))  # fmt: skip
IQ4_XS_THERE = 0.0856
KL_DATA = {"none": "no data", "importance": "importance", "gptq": "GPTQ"}


def kl_tables(data: dict[str, Any]) -> str:
    """Errors of single matrices, then one table for each model."""
    parts = [
        "KL(dense || quantized) on text that no method has seen, in nats per token, over bits "
        "([plot](kl.png)). All linears but the head are quantized; ggml's types are made by libggml-python, rows put "
        "together where a row is no whole number of blocks. Importance is the mean square of every input feature, "
        "on the other half of the text."
    ]
    if rows := data["weights"].get("rows"):
        names = list(rows[0]["errors"])
        lines = [
            row("squared error of weights, %", ["bits", *names]),
            "|---|" + "---|" * (1 + len(names)),
        ]
        for r in sorted(rows, key=lambda r: -r["bits_per_weight"]):
            cells = [f"{100 * r['errors'][name]:.3g}" for name in names]
            lines.append(row(r["format"], [f"{r['bits_per_weight']:.2f}", *cells]))
        parts.append(f"Without data, 192 rows each. {about(data['weights'])}")
        parts.append("\n".join(lines))
    for model in data["models"].values():
        calibration, test = model["windows"]
        parts.append(
            f"{model['title']}: {test} windows of 512 tokens, the second half of each, calibrated on {calibration}; "
            f"perplexity of the dense model {model['dense']['perplexity']:.4g}. {about(model)}"
        )
        parts.append(kl_table(model))
    listing = ", ".join(f"{name} ({bits:g} bits) {kl:.3g}" for name, bits, kl in IK)
    parts.append(
        f"Beside it, KL of types of ik_llama.cpp with importance, on another cut of the text, SmolLM2 permuted, where "
        f"ggml's IQ4_XS had {IQ4_XS_THERE}: {listing}."
    )
    return "\n\n".join(parts)


def kl_table(model: dict[str, Any]) -> str:
    """One line for each format; a cell for each kind of data: KL, perplexity and seconds of the CPU."""
    rows = {(r["format"], r["data"]): r for r in model["rows"]}
    bits = {r["format"]: r["bits_per_weight"] for r in model["rows"]}
    heads = ["bits", *(f"{what}: KL / perplexity / CPU s" for what in KL_DATA.values())]
    lines = [row("format", heads), "|---|" + "---|" * len(heads)]
    for name in sorted(bits, key=lambda name: -bits[name]):
        cells = []
        for kind in KL_DATA:
            r = rows.get((name, kind))
            cells.append(
                f"{r['kl']:.3g} / {r['perplexity']:.4g} / {r['cpu_seconds']:.0f}" if r else ""
            )
        lines.append(row(name, [f"{bits[name]:.2f}", *cells]))
    return "\n".join(lines)
