"""The tables of vLLM: tokens a second over concurrent requests, and greedy tokens against transformers."""

from __future__ import annotations

from typing import Any

import report_cpu
from report_gpu import row


def tables(data: dict[str, Any]) -> tuple[str, ...]:
    """What benchmarks/vllm_serving.py found."""
    return (speeds(data), agreement(data)) if "check" in data else (speeds(data),)


def speeds(data: dict[str, Any]) -> str:
    """A line a case, a column a number of requests."""
    found = {(r["case"], r["concurrent"]): r for r in data["summary"]}
    concurrent = sorted({n for _, n in found})
    settings, loads = data["settings"], [r["load"] for r in data["runs"]]
    names = list(dict.fromkeys(r["case"] for r in data["summary"]))
    heads = [f"{n} request{'s' if n > 1 else ''}, tokens/s" for n in concurrent]
    lines = [row("", heads), "|---|" + "---|" * len(heads)]
    for name in names:
        cells = []
        for n in concurrent:
            r = found[name, n]
            over = f" ({r['over_vllm_int4']:.2f}x)" if "over_vllm_int4" in r else ""
            cells.append(f"{r['tokens_per_second']:.1f}{over}")
        lines.append(row(found[name, concurrent[0]]["title"], cells))
    how = "without torch.compile" if settings["eager"] else "with torch.compile"
    text = (
        f"{settings['model']} over HTTP, bf16 activations, {how}, on an {report_cpu.about(data)[:-1]}. Prompts have "
        f"{settings['prompt_tokens']} tokens, and {settings['tokens']} are generated for each; medians of "
        f"{settings['rounds']} rounds in which every server has its turn. In brackets: over vLLM's own int4 in that "
        f"round. The load of the machine was {min(loads):.1f} to {max(loads):.1f}."
    )
    return "\n".join([text, "", *lines])


def agreement(data: dict[str, Any]) -> str:
    """Greedy tokens of vLLM and of transformers on the same packed folder."""
    check = data["check"]
    gaps = check["logit_gaps_where_they_part"]
    text = (
        f"{check['requests']} requests at once, {check['tokens']} greedy tokens each, in fp32 against transformers on "
        f"the same packed folder: {check['same_answers']} answers are the same"
    )
    if gaps:
        text += f"; where the others part, the two tokens' logits differ by at most {max(gaps):.2g}"
    return text + "."
