"""Plants the faults of `mutations/` one by one in a copy of the tree and runs the tests that should see
them; prints who survived. Not run by CI: `python tests/mutants.py [--family NAME] [--list]`.

A fault whose text is no longer in its file exactly once is stale, and one whose test fails without it proves nothing
(BROKEN): both are errors.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from mutations import Mutant
from mutations.rebuild import Build

ROOT = Path(__file__).parents[1]
FAMILIES = (
    "weights", "quantizers", "fp8", "int8", "files", "training",
    "cpp_core", "cpp_fp8", "cpp_int8", "cpp_weights", "cpp_outliers", "cpp_adamw", "cpp_decoder",
)  # fmt: skip
SECONDS = 900  # of the tests of one mutant; a hang counts as seen
STALE, BROKEN, SURVIVED, KILLED = "stale", "BROKEN", "SURVIVED", "killed"


def copy_tree(target: Path) -> None:
    """The files that git knows, the compiled modules, and the Triton kernels where an installation has them."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout.splitlines()  # fmt: skip
    modules = [str(p.relative_to(ROOT)) for p in (ROOT / "python" / "lowbit").glob("_*.so")]
    for name in [*listed, *modules]:
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    (target / "python" / "lowbit" / "triton_kernels").symlink_to(target / "kernels")


def run_python(tree: Path, isa: str, tests: tuple[str, ...]) -> tuple[str, ...]:
    """The first of `tests` that fails, or none."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(tree / "python"),
        "OMP_WAIT_POLICY": "passive",
        "PYTHONDONTWRITEBYTECODE": "1",
        **({"LOWBIT_ISA": isa} if isa else {}),
    }
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    try:
        ended = subprocess.run(
            command, cwd=tree, env=environment, capture_output=True, text=True, timeout=SECONDS
        )
    except subprocess.TimeoutExpired:
        return tests
    if ended.returncode in (3, 4, 5):
        raise RuntimeError(f"{' '.join(command)}:\n{ended.stdout[-2000:]}{ended.stderr[-2000:]}")
    if ended.returncode == 0:
        return ()
    found = re.search(r"^(?:FAILED|ERROR) (\S+\.py.*?)(?: - |$)", ended.stdout, re.MULTILINE)
    return (found[1],) if found else tests  # a process that died names none


def run_cpp(build: Build, mutant: Mutant, tests: tuple[str, ...]) -> tuple[str, ...]:
    """The test binary, or the first test of the module, that fails when the units that see the fault are rebuilt."""
    (target,) = mutant.tests
    module = target.endswith(".py")
    name = f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    try:
        build.rebuild(mutant.path, mutant.isa, name if module else target, mutant.isa != "scalar")
        if module:
            shutil.copy2(build.folder / name, build.tree / "python" / "lowbit" / name)
            return run_python(build.tree, mutant.isa, tests)
        return () if passes(build.folder / target, mutant.isa) else tests
    finally:
        build.restore()


def passes(binary: Path, isa: str) -> bool:
    """Whether all C++ tests pass; ends them at the first line that says otherwise."""
    environment = {
        **os.environ,
        "OMP_WAIT_POLICY": "passive",
        **({"LOWBIT_ISA": isa} if isa else {}),
    }
    command = ["timeout", str(SECONDS), "stdbuf", "-oL", str(binary)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as running:
        if any(line.startswith("FAIL") for line in running.stdout or ()):
            running.terminate()
            return False
    return running.returncode == 0


def outcome(
    tree: Path, mutant: Mutant, built: Callable[[], Build], sound: dict[tuple[str, ...], bool]
) -> str:
    """Plants the fault, runs its tests, and the one that fails once more without it, which `sound` remembers."""
    build = built() if mutant.kind == "cpp" else None

    def failed(tests: tuple[str, ...]) -> tuple[str, ...]:
        return run_cpp(build, mutant, tests) if build else run_python(tree, mutant.isa, tests)

    file = tree / mutant.path
    text = file.read_text()
    if text.count(mutant.old) != 1 or mutant.old == mutant.new:
        return STALE
    file.write_text(text.replace(mutant.old, mutant.new))
    try:
        tests = failed(mutant.tests)
    finally:
        file.write_text(text)
    if not tests:
        return SURVIVED
    # What is rebuilt belongs to the test: it has less optimization, and fewer widths.
    key = (*tests, mutant.isa, mutant.path if build else "")
    if key not in sound:
        sound[key] = not failed(tests)
    return KILLED if sound[key] else BROKEN


def describe(mutant: Mutant) -> str:
    """One line."""
    old, new = (" ".join(text.split()) for text in (mutant.old, mutant.new))
    return f"{mutant.path}: {old}  ->  {new}"


def main() -> int:
    """Runs the command line; the status is 1 unless all mutants were killed."""
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
        build = functools.cache(lambda: Build(tree))
        sound: dict[tuple[str, ...], bool] = {}
        for family in arguments.family or FAMILIES:
            mutants: list[Mutant] = importlib.import_module(f"mutations.{family}").MUTANTS
            chosen = [m for m in mutants if arguments.match in describe(m)]
            if arguments.list:
                print(*(f"{family}: {describe(m)}" for m in chosen), sep="\n")
                continue
            counts = dict.fromkeys((KILLED, SURVIVED, BROKEN, STALE), 0)
            for mutant in chosen:
                start = time.monotonic()
                found = outcome(tree, mutant, build, sound)
                counts[found] += 1
                print(
                    f"{found:8} {time.monotonic() - start:4.0f} s  {describe(mutant)}", flush=True
                )
            rate = 100 * counts[KILLED] / max(1, counts[KILLED] + counts[SURVIVED])
            print(f"{family}: {rate:.0f} % of {len(chosen)} killed, {counts}", flush=True)
            bad += len(chosen) - counts[KILLED]
    return int(bad > 0)


if __name__ == "__main__":
    raise SystemExit(main())
