"""Tables of checkpoints{,_speed}.json: real GGUF files as stored, beside transformers and llama.cpp."""

from __future__ import annotations

from typing import Any

from report_cpu import about
from report_gpu import row

DECODE_TARGET, PREFILL_TARGET, CACHE_TARGET, CACHE_KL = 1.3, 2.0, 1.3, 0.002


def tables(data: dict[str, Any], speed: dict[str, Any]) -> tuple[str, ...]:
    """What is the same, how good it is, how fast it is, and what the dtype of the cache does."""
    return quality(data), caches(data, speed), speeds(speed)


def quality(data: dict[str, Any]) -> str:
    """Equal tokens, bits, perplexity and KL of each model."""
    models = data["results"]
    names = [m["model"] for m in models]

    def line(what: str, cell: Any) -> str:
        return row(what, [cell(m) for m in models])

    def text(engine: str) -> str:
        return line(
            f"perplexity / KL, {engine}",
            lambda m: f"{m['text'][engine]['perplexity']:.3f} / {m['text'][engine]['kl']:.2g}",
        )

    lines = [
        row("", names),
        "|---|" + "---|" * len(names),
        line("types of the file", lambda m: ", ".join(f"{n} {t}" for t, n in m["types"].items())),
        line(
            "bits per weight in memory / in the file",
            lambda m: f"{m['bits_in_memory']:.3f} / {m['bits_in_file']:.3f}",
        ),
        line(
            "prompts with the same greedy tokens",
            lambda m: f"{m['greedy']['same_tokens']} of {m['greedy']['prompts']}",
        ),
        line(
            "largest difference of a logit / largest logit",
            lambda m: (
                f"{m['greedy']['largest_logit_difference']:.2g} / {m['greedy']['largest_logit']:.3g}"
            ),
        ),
        *(text(engine) for engine in models[0]["text"]),
        line(
            f"{models[0]['export']['format']} exported: perplexity here / in llama.cpp, KL",
            lambda m: (
                f"{m['export']['perplexity']:.3f} / {m['export']['llama.cpp perplexity']:.3f}, "
                f"{m['export']['kl']:.2g}"
            ),
        ),
    ]
    caption = (
        f"{models[0]['greedy']['tokens_each']} tokens a prompt with fp32 activations, beside transformers' model "
        f"of the dequantized weights in fp32; KL in nats to that model over {data['text_tokens']} tokens of "
        "Python's manual. llama.cpp rounds activations to int8. An exported model is one whose linears were quantized "
        f"anew, and its KL that of llama.cpp's logits to ours. {about(data)}"
    )
    return "\n".join([caption, "", *lines])


def caches(data: dict[str, Any], speed: dict[str, Any]) -> str:
    """KL and speed by the dtype of keys and values."""
    lines = ["| model | activations, cache | KL |", "|---|---|---|"]
    for m in data["results"]:
        for what, kl in m["cache_kl"].items():
            aim = f", target {CACHE_KL}" if "int8" in what else ""
            lines.append(f"| {m['model']} | {what} | {kl:.2g}{aim} |")
    late = [
        r for r in speed["results"] if r["prompt"] == max(x["prompt"] for x in speed["results"])
    ]
    lines += ["", "| model | tokens | bf16 cache | int8 cache | ratio |", "|---|---|---|---|---|"]
    for model in dict.fromkeys(r["model"] for r in late):
        own = {r["library"]: r["decode_late"] for r in late if r["model"] == model}
        plain, int8 = own["lowbit"], own["lowbit, int8 cache"]
        lines.append(
            f"| {model} | {late[0]['prompt']} | {plain:.0f} | {int8:.0f} | {int8 / plain:.2f}x, "
            f"target {CACHE_TARGET}x |"
        )
    caption = (
        "KL in nats to the same model with activations and cache in fp32; decoded tokens per second after a long "
        f"prompt, two threads. {about(speed)}"
    )
    return "\n".join([caption, "", *lines])


def speeds(data: dict[str, Any]) -> str:
    """Tokens per second beside llama.cpp."""
    results = data["results"]
    short = min(r["prompt"] for r in results)
    heads = (f"prompt of {short}", f"decode after {data['short']}", f"decode after {short}")
    lines = [f"| model | here | threads | {' | '.join(heads)} |", "|---|---|---|---|---|---|"]
    for own in results:
        if own["prompt"] != short or own["library"] == "llama.cpp":
            continue
        key = ("model", "threads", "prompt")
        peer = next(
            r for r in results if r["library"] == "llama.cpp" and all(r[k] == own[k] for k in key)
        )
        cells = []
        for kind in ("prefill", "decode", "decode_late"):
            target = PREFILL_TARGET if kind == "prefill" else DECODE_TARGET
            ratio = own[kind] / peer[kind]
            text = f"**{ratio:.2f}x**" if ratio >= target else f"{ratio:.2f}x"
            cells.append(f"{own[kind]:.0f} / {peer[kind]:.0f}: {text}")
        what = own["library"].removeprefix("lowbit").removeprefix(", ") or "bf16 activations"
        lines.append(f"| {own['model']} | {what} | {own['threads']} | {' | '.join(cells)} |")
    caption = (
        "Tokens per second here / in llama.cpp with the same file. Targets: "
        f"{PREFILL_TARGET:g}x for the prompt, {DECODE_TARGET:g}x for decoding; bold where they are met. {about(data)}"
    )
    return "\n".join([caption, "", *lines])
