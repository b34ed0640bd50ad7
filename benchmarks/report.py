"""Writes what was measured: a few numbers into README.md, every table into benchmarks/results/*.md, and the plots.

All of it comes from benchmarks/results/*.json; --check only compares. A result file counts if it was measured at a
commit and written by its script: one of changed sources, or put together by hand, is an error.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import report_checkpoints
import report_cpu
import report_gpu
import report_quality
import report_serving
from report_gpu import row

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- results -->\n", "<!-- /results -->"
BY_HAND = re.compile(r"put together|by hand|hand-written", re.IGNORECASE)
# The documents and the result files that each needs; without one of them there is no document.
TOPICS = {
    "checkpoints": ("checkpoints", "checkpoints_speed"),
    "conv": ("conv",),
    "cpu": ("kernels", "model"),
    "digits": ("digits",),
    "fp8": ("fp8_avx512bf16", "fp8_avx2"),
    "gpu": ("gpu",),
    "kl": ("kl",),
    "methods": ("methods",),
    "peers": ("peers", "peers_model"),
    "quantizers": ("quantizers",),
    "training": ("fp8_training",),
    "vit": ("vit",),
    "vllm": ("vllm",),
}
# README names these where it says what they are of.
NAMED_IN_TEXT = {"vllm"}
ABOUT = {
    "checkpoints": "real GGUF files as stored",
    "conv": "convolutions on the CPU",
    "cpu": "linears and a whole model on the CPU",
    "digits": "training through the quantizer",
    "fp8": "FP8 products on the CPU",
    "gpu": "checks and times on a GPU",
    "kl": "divergence of quantized language models over bits",
    "methods": "quantization methods on three models",
    "peers": "other libraries side by side",
    "quantizers": "time and error of each quantizer",
    "training": "training in FP8",
    "vit": "vision transformers in integers",
    "vllm": "a model served by vLLM",
}


def load(path: Path) -> dict[str, Any]:
    """One result file.

    Raises:
        ValueError: it was measured on changed sources, names no commit, or says that it was put together by hand.
    """
    data = json.loads(path.read_text())
    commits, notes = list(_values(data, "commit")), list(_values(data, "note"))
    if not commits:
        raise ValueError(f"{path.name}: no commit is named; expected the one that was measured")
    for commit in commits:
        if commit.endswith("-dirty"):
            raise ValueError(
                f"{path.name}: commit is {commit!r}; expected a clean one: commit the sources, then measure"
            )
    for note in notes:
        if BY_HAND.search(note):
            raise ValueError(
                f"{path.name}: its note is {note[:80]!r}; expected a file as its benchmark writes it"
            )
    return data


def _values(data: Any, key: str) -> Iterator[str]:
    """What stands under a key, at any depth."""
    if isinstance(data, dict):
        for name, value in data.items():
            if name == key:
                yield str(value)
            yield from _values(value, key)
    elif isinstance(data, list):
        for value in data:
            yield from _values(value, key)


def load_all(folder: Path) -> dict[str, dict[str, Any]]:
    """Every result file of a folder, by name."""
    return {path.stem: load(path) for path in sorted(folder.glob("*.json"))}


def readme_table(kernels: dict[str, Any], model: dict[str, Any]) -> str:
    """A line for each claim that a reader looks for first, and one for where dense bf16 is faster."""
    last = kernels["runs"][-1]
    threads = last["threads"]
    run = model["runs"][0]
    lines = [row("", ["lowbit", "dense bf16", "ratio"]), "|---|---|---|---|"]
    for kind in ("decode", "prefill"):
        own, dense = (r[f"{kind}_tokens_per_second"] for r in (run, run["dense"]))
        name = f"SmolLM2-135M from GGUF Q4_1, {kind}, tokens/s"
        lines.append(
            row(name, [f"{own:.0f}", f"{dense:.0f} (transformers)", f"{own / dense:.1f}x"])
        )
    first = [r for r in last["results"] if r["m"] == 1 and r["format"] in ("int4", "nf4")]
    for r in (*first, min(last["results"], key=lambda r: r["speedup"])):
        lost = ", where we lose" if r["speedup"] < 1 else ""
        name = f"{r['n']} x {r['k']} linear, {r['format']}, M = {r['m']}{lost}"
        cells = [f"{r['us']:.0f} us", f"{r['dense_us']:.0f} us (torch)", f"{r['speedup']:.2f}x"]
        lines.append(row(name, cells))
    caption = (
        f"{threads} threads of an {report_cpu.about(kernels)[:-1]}; bf16 activations, fp32 sums."
    )
    return "\n".join([*lines, "", caption])


def readme_links(found: dict[str, dict[str, Any]]) -> str:
    """Which documents there are, and what makes those that there are not."""
    there = [t for t, names in TOPICS.items() if all(name in found for name in names)]
    listed = [t for t in there if t not in NAMED_IN_TEXT]
    links = "; ".join(f"[{ABOUT[t]}](benchmarks/results/{t}.md)" for t in listed)
    missing = [
        f"{what} are made by `make {target}`"
        for topic, what, target in (
            ("peers", "comparisons with other libraries", "bench"),
            ("gpu", "times on a GPU", "gpu"),
        )
        if topic not in there
    ]
    text = f"All tables: {links}."
    if missing:
        listing = " and ".join(missing)
        text += f"\n{listing[0].upper()}{listing[1:]}; none are recorded for this commit."
    return text


def documents(found: dict[str, dict[str, Any]]) -> dict[str, str]:
    """The text of every document whose result files are there."""
    makers = {
        "checkpoints": lambda data, speed: report_checkpoints.tables(data, speed),
        "conv": lambda data: (report_cpu.conv_table(data),),
        "cpu": lambda kernels, model: (
            report_cpu.model_table(model), report_cpu.kernel_table(kernels),
        ),
        "digits": lambda data: (report_quality.digits_table(data),),
        "fp8": lambda *data: tuple(
            report_cpu.fp8_table(isa, d)
            for isa, d in zip(("avx512bf16", "avx2"), data, strict=True)
        ),
        "gpu": lambda data: report_gpu.tables(data),
        "kl": lambda data: (report_quality.kl_tables(data),),
        "methods": lambda data: (report_quality.methods_tables(data),),
        "peers": lambda peers, model: (
            report_cpu.peers_model_table(model), report_cpu.peers_tables(peers),
        ),
        "quantizers": lambda data: (report_quality.quantizers_table(data),),
        "training": lambda data: (report_quality.training_table(data),),
        "vit": lambda data: (report_quality.vit_table(data),),
        "vllm": lambda data: report_serving.tables(data),
    }  # fmt: skip
    texts = {}
    for topic, names in TOPICS.items():
        if all(name in found for name in names):
            parts = makers[topic](*(found[name] for name in names))
            title = f"# {ABOUT[topic][0].upper()}{ABOUT[topic][1:]}"
            texts[topic] = "\n\n".join([title, "Generated by benchmarks/report.py.", *parts]) + "\n"
    return texts


def filled(readme: str, found: dict[str, dict[str, Any]]) -> str:
    """README.md with its generated parts: the table, then the links."""
    parts = iter((readme_table(found["kernels"], found["model"]), readme_links(found)))
    pieces = readme.split(BEGIN)
    if len(pieces) != 3:
        raise ValueError(f"README.md has {len(pieces) - 1} lines {BEGIN.strip()!r}; expected 2")
    ends = [piece.partition(END)[2] for piece in pieces[1:]]
    return pieces[0] + "".join(f"{BEGIN}{next(parts)}\n{END}{end}" for end in ends)


def main() -> None:
    """Rewrites README.md, the documents and the plots; --check fails if a text differs from the result files."""
    try:
        found = load_all(RESULTS)
        expected = {ROOT / "README.md": filled((ROOT / "README.md").read_text(), found)}
    except ValueError as e:
        raise SystemExit(f"report.py: {e}") from None
    expected |= {RESULTS / f"{topic}.md": text for topic, text in documents(found).items()}
    stale = set(RESULTS.glob("*.md")) - expected.keys()
    if "--check" in sys.argv[1:]:
        for path in sorted(stale):
            raise SystemExit(f"{path.name} has no result files: run benchmarks/report.py")
        for path, text in expected.items():
            if not path.exists() or path.read_text() != text:
                raise SystemExit(
                    f"{path.name} differs from benchmarks/results: run benchmarks/report.py"
                )
        return
    for path in stale:
        path.unlink()
    for path, text in expected.items():
        path.write_text(text)
    import plots  # matplotlib is not needed for --check

    if "peers" in found:
        plots.draw(found["peers"], RESULTS)
    if "kl" in found:
        plots.draw_kl(found["kl"], RESULTS)
    if "methods" in found:
        plots.draw_methods(found["methods"], RESULTS)


if __name__ == "__main__":
    main()
