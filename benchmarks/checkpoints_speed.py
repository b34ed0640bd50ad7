"""Real GGUF files as stored, here and in llama.cpp: writes benchmarks/results/checkpoints_speed.json.

Run it on an idle machine, with the Python that `make peers` made; report.py makes the table.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import real_models
from model_speed import DECODED, PROMPT, SHORT, measure
from record import RESULTS, machine
from shapes import THREADS

from lowbit.integrations.load import load_tokenizer

ENGINES = ("lowbit", "lowbit, int8 activations", "llama.cpp")
# A long context, where keys and values are most of what a token reads.
LONG = 4032
CACHES = ("lowbit", "lowbit, int8 cache", "llama.cpp")


def main() -> None:
    """Measures every model on every number of threads and writes the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", action="append", help="only this one; by default all")
    parser.add_argument("--out", type=Path, default=RESULTS / "checkpoints_speed.json")
    arguments = parser.parse_args()
    results = []
    for name, path in real_models.files().items():
        if arguments.model and name not in arguments.model:
            continue
        vocab = len(load_tokenizer(path))
        for engines, prompt, many in ((ENGINES, PROMPT, THREADS), (CACHES, LONG, THREADS[-1:])):
            runs = [(engine, "as stored", path) for engine in engines]
            for threads in many:
                results += measure(name, runs, threads, vocab, prompt)
                print(*results[-len(runs) :], sep="\n", file=sys.stderr)
    data = {
        "machine": machine(("lowbit", "torch", "transformers", "llama-cpp-python")),
        "short": SHORT, "decoded": DECODED, "results": results,
    }  # fmt: skip
    arguments.out.write_text(json.dumps(data, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
