"""Small faults of the product, by family, that its tests must see; `tests/mutants.py` plants them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

TESTS = Path(__file__).parents[1]


@dataclass(frozen=True)
class Mutant:
    """One fault.

    Attributes:
        path: the file, from the root of the tree.
        old: what stands in it, exactly once.
        new: what takes its place.
        tests: Python: files in tests/ that should see it, and a `-k` expression if given behind "::".
            C++: the ninja target of a test binary, or a file in tests/ that tests the module.
        kind: "python" or "cpp".
        isa: C++: the instruction set whose units are rebuilt and that caps the run (LOWBIT_ISA); "" for files of none.
    """

    path: str
    old: str
    new: str
    tests: tuple[str, ...]
    kind: str = "python"
    isa: str = ""


def python(path: str, *tests: str) -> _File:
    """Mutants of a file of the package, seen by test files named without "test_" and ".py"."""
    found = {name: list(TESTS.rglob(f"test_{name}.py")) for name in tests}
    if missing := [name for name, files in found.items() if len(files) != 1]:
        raise ValueError(f"each test must be the name of one file, got {missing}")
    files = (str(path.relative_to(TESTS.parent)) for (path,) in found.values())
    return _File(f"python/lowbit/{path}", tuple(files))


@dataclass(frozen=True)
class _File:
    path: str
    tests: tuple[str, ...]
    kind: str = "python"
    isa: str = ""

    def __call__(self, *changes: tuple[str, str]) -> list[Mutant]:
        return [
            Mutant(self.path, old, new, self.tests, self.kind, self.isa) for old, new in changes
        ]


def cpp(path: str, test: str, isa: str = "") -> _File:
    """Mutants of a file of csrc/, seen by a C++ test on one instruction set."""
    return _File(f"csrc/{path}", (test,), "cpp", isa)
