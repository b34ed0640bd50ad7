"""Plants the faults of `mutations/` one by one in a copy of the tree and runs the tests that should see
them; prints who survived. Not run by CI: `python tests/mutants.py [--family NAME] [--list]`.

A fault whose text is no longer in its file exactly once is stale, and so an error.
"""

from __future__ import annotations

import argparse
import importlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from mutations import Mutant

ROOT = Path(__file__).parents[1]
FAMILIES = ("weights", "quantizers", "fp8", "int8", "files", "training")
SECONDS = 900  # of the tests of one mutant; a hang counts as seen
STALE, SURVIVED, KILLED = "stale", "SURVIVED", "killed"


def copy_tree(target: Path) -> None:
    """The files that git knows, and the compiled modules."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout.splitlines()  # fmt: skip
    modules = [str(p.relative_to(ROOT)) for p in (ROOT / "python" / "lowbit").glob("_*.so")]
    for name in [*listed, *modules]:
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)


def run_python(tree: Path, mutant: Mutant) -> bool:
    """Whether the tests fail."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(tree / "python"),
        "OMP_WAIT_POLICY": "passive",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *mutant.tests]
    try:
        ended = subprocess.run(
            command, cwd=tree, env=environment, capture_output=True, text=True, timeout=SECONDS
        )
    except subprocess.TimeoutExpired:
        return True
    if ended.returncode in (3, 4, 5):
        raise RuntimeError(f"{' '.join(command)}:\n{ended.stdout[-2000:]}{ended.stderr[-2000:]}")
    return ended.returncode != 0


def run_cpp(tree: Path, mutant: Mutant) -> bool:
    """Whether the test binary fails, built with -O1; the build folder is kept between mutants."""
    build = tree / "build" / "mutants"
    if not (build / "build.ninja").exists():
        options = ["-DCMAKE_CXX_FLAGS=-O1", "-DLOWBIT_CPP_TESTS=ON", "-DLOWBIT_CUDA=OFF"]
        command = ["cmake", "-G", "Ninja", "-S", str(tree), "-B", str(build), "-DSKBUILD=2"]
        subprocess.run([*command, *options], check=True, stdout=subprocess.DEVNULL)
    (target,) = mutant.tests
    subprocess.run(
        ["cmake", "--build", str(build), "--target", target], check=True, stdout=subprocess.DEVNULL
    )
    environment = {**os.environ, **({"LOWBIT_ISA": mutant.isa} if mutant.isa else {})}
    try:
        ended = subprocess.run(
            [str(build / target)], env=environment, capture_output=True, timeout=SECONDS
        )
    except subprocess.TimeoutExpired:
        return True
    return ended.returncode != 0


def outcome(tree: Path, mutant: Mutant) -> str:
    """Plants the fault, runs its tests, and takes it away again."""
    file = tree / mutant.path
    text = file.read_text()
    if text.count(mutant.old) != 1 or mutant.old == mutant.new:
        return STALE
    file.write_text(text.replace(mutant.old, mutant.new))
    try:
        failed = {"python": run_python, "cpp": run_cpp}[mutant.kind](tree, mutant)
    finally:
        file.write_text(text)
    return KILLED if failed else SURVIVED


def describe(mutant: Mutant) -> str:
    """One line."""
    old, new = (" ".join(text.split()) for text in (mutant.old, mutant.new))
    return f"{mutant.path}: {old}  ->  {new}"


def main() -> int:
    """Runs the command line; the status is 1 if a mutant survived or is stale."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--family", choices=FAMILIES, action="append", help="may be repeated")
    parser.add_argument("--match", default="", help="only mutants whose line holds this text")
    parser.add_argument("--list", action="store_true", help="print the mutants and stop")
    arguments = parser.parse_args()
    bad = 0
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        if not arguments.list:
            copy_tree(tree)
        for family in arguments.family or FAMILIES:
            mutants: list[Mutant] = importlib.import_module(f"mutations.{family}").MUTANTS
            chosen = [m for m in mutants if arguments.match in describe(m)]
            if arguments.list:
                print(*(f"{family}: {describe(m)}" for m in chosen), sep="\n")
                continue
            counts = dict.fromkeys((KILLED, SURVIVED, STALE), 0)
            for mutant in chosen:
                start = time.monotonic()
                found = outcome(tree, mutant)
                counts[found] += 1
                print(
                    f"{found:8} {time.monotonic() - start:4.0f} s  {describe(mutant)}", flush=True
                )
            rate = 100 * counts[KILLED] / max(1, counts[KILLED] + counts[SURVIVED])
            print(f"{family}: {rate:.0f} % of {len(chosen)} killed, {counts}", flush=True)
            bad += counts[SURVIVED] + counts[STALE]
    return int(bad > 0)


if __name__ == "__main__":
    raise SystemExit(main())
