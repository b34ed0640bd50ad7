"""The tables of results/gpu.json; see report.py."""

from __future__ import annotations

from typing import Any

FAMILIES = {
    "cuda": "CUDA: mma for few rows on sm_80 and later (TMA from sm_90 on), wgmma on sm_90a; one table per weight, "
    "groups of 16, 32, multiples of 64 or rows",
    "triton": "Triton, sm_80 and later: every format and M",
}
DENSE = "torch dense bf16"


def row(name: str, cells: list[str]) -> str:
    """One line of a table."""
    return f"| {name} | {' | '.join(cells)} |"


def checks_table(data: dict[str, Any]) -> str:
    """Which families of GPU kernels have run on a device, and whether what they computed was right."""
    lines = [row("GPU kernels", ["run on a device"]), "|---|---|"]
    for family, what in FAMILIES.items():
        sums: dict[str, list[int]] = {}
        for c in data["checks"]:
            if family in c["task"][1:2]:
                some = sums.setdefault(c.get("gpu", data["machine"]["gpu"]), [0, 0])
                some[0] += c["passed"]
                some[1] += c["passed"] + c["failed"]
        cells = [
            f"{gpu}: {passed} of {total} checks passed" for gpu, (passed, total) in sums.items()
        ]
        lines.append(row(what, ["; ".join(cells) or "not yet run on a device"]))
    return "\n".join(lines)


def about(data: dict[str, Any]) -> str:
    """The machine in one sentence."""
    m = data["machine"]
    versions = ", ".join(f"{name} {v}" for name, v in m["versions"].items())
    copied = data["copy_bytes_per_second"] / 1e12
    return f"{m['gpu']}, {versions}, commit {m['commit']}; a copy moves {copied:.2f} TB/s."


def products_tables(data: dict[str, Any]) -> str:
    """Times of products with packed weights, a table for each shape."""
    timed = [r for r in data["results"] if "us" in r]
    parts = [
        "Linears on a GPU, bf16 activations: microseconds, and in brackets the time of torch's dense bf16 over it. "
        f"{about(data)} Medians of replays of a CUDA graph in which the weight rotates through "
        "more than three times the L2 cache; each result is checked against float64 first."
    ]
    for n, k in dict.fromkeys((r["n"], r["k"]) for r in timed):
        here = [r for r in timed if (r["n"], r["k"]) == (n, k)]
        found = {(r["name"], r["m"]): r for r in here}
        dense = {r["m"]: r["us"] for r in here if r["name"] == DENSE}
        rows = sorted({m for _, m in found})
        lines = [row(f"{n} x {k}", [f"M = {m}" for m in rows]), "|---|" + "---|" * len(rows)]
        for name in dict.fromkeys(name for name, _ in found):
            cells = []
            for m in rows:
                r = found.get((name, m))
                ratio = dense[m] / r["us"] if r else 0
                cells.append(f"{r['us']:.1f} ({ratio:.2f}x)" if r else "")
            lines.append(row(name, cells))
        parts.append("\n".join(lines))
    failed = dict.fromkeys(
        f"{r['name']} {r['n']}x{r['k']}" for r in data["results"] if "failed" in r
    )
    if failed:
        parts.append("Did not run, or was wrong: " + ", ".join(failed) + ".")
    return "\n\n".join(parts)


def fp8_table(data: dict[str, Any]) -> str:
    """FP8 products by pairing of scales."""
    shapes = list(dict.fromkeys((r["m"], r["n"], r["k"]) for r in data["fp8"]))
    found = {(r["name"], (r["m"], r["n"], r["k"])): r for r in data["fp8"]}
    heads = [f"{m} x {n} x {k}" for m, n, k in shapes]
    lines = [row("FP8, a x b", heads), "|---|" + "---|" * len(heads)]
    for name in dict.fromkeys(r["name"] for r in data["fp8"]):
        cells = []
        for shape in shapes:
            r = found.get((name, shape))
            cells.append(
                ""
                if r is None
                else f"{r['us']:.0f} us, {r['tflops']:.0f}"
                if "us" in r
                else r["failed"]
            )
        lines.append(row(name, cells))
    return "FP8 products M x N x K on the same GPU: microseconds and TFLOP/s.\n\n" + "\n".join(
        lines
    )


def decode_table(data: dict[str, Any]) -> str:
    """Milliseconds for a token of a whole model."""
    models = list(dict.fromkeys(d["model"] for d in data["decode"]))
    kinds = list(dict.fromkeys((d["family"], d["format"]) for d in data["decode"]))
    found = {(d["model"], d["family"]): d["ms"] for d in data["decode"]}
    lines = [row("ms per token", models), "|---|" + "---|" * len(models)]
    for family, format in kinds:
        name = "torch dense bf16" if format is None else f"{family} {format}"
        lines.append(row(name, [f"{found[model, family]:.3f}" for model in models]))
    caption = "One decoded token after 512, random weights, the whole step in one CUDA graph, on the same GPU:"
    return caption + "\n\n" + "\n".join(lines)


def tables(data: dict[str, Any]) -> list[str]:
    """All tables."""
    parts = [checks_table(data), products_tables(data), fp8_table(data)]
    return parts + ([decode_table(data)] if data["decode"] else [])
