"""Runs `lowbit bench` and `lowbit run --compare` and writes benchmarks/results/{kernels,model}.json.

Each file holds the machine, the versions, the commit and the JSON that the command printed. Run it on an idle machine.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
FORMATS = ("int4", "nf4", "kmeans3", "int2", "int8")
ROWS = (1, 16, 128)


def lowbit(*arguments: str) -> dict[str, Any]:
    """The JSON that a `lowbit` command prints."""
    command = [sys.executable, "-m", "lowbit.cli", *arguments, "--json"]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def machine(packages: Iterable[str] = ("lowbit", "torch", "transformers")) -> dict[str, Any]:
    """The CPU, the versions of packages and the commit."""
    cpu = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = (line.partition(":") for line in info.read_text().splitlines())
        cpu = next((value.strip() for key, _, value in lines if key.strip() == "model name"), cpu)
    return {
        "cpu": cpu,
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
        "commit": commit(),
    }


def commit() -> str:
    """The commit, and "-dirty" after it if anything has changed but what benchmarks write themselves."""
    root = RESULTS.parents[1]

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", *arguments], cwd=root, check=True, capture_output=True, text=True
        )
        return done.stdout.strip()

    name = git("describe", "--always", "--abbrev=10")
    written = (":(exclude)README.md", ":(exclude)benchmarks/results")
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", *written)
    return f"{name}-dirty" if changed else name


def main() -> None:
    """Measures everything, then writes the files."""
    arguments = [a for f in FORMATS for a in ("--format", f)]
    arguments += [a for m in ROWS for a in ("--m", str(m))]
    arguments += ["--seconds", "0.1"]
    kernels = [lowbit("bench", *arguments, "--threads", str(threads)) for threads in (1, 2)]
    models = [lowbit("run", "--compare", *extra) for extra in ((), ("--format", "nf4"))]
    about = machine()
    RESULTS.mkdir(exist_ok=True)
    for name, runs in (("kernels", kernels), ("model", models)):
        text = json.dumps({"machine": about, "runs": runs}, indent=1, sort_keys=True)
        (RESULTS / f"{name}.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
