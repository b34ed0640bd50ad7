"""Small faults of the product, by family, that its tests must see; `tests/mutants.py` plants them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """One fault.

    Attributes:
        path: the file, from the root of the tree.
        old: what stands in it, exactly once.
        new: what takes its place.
        tests: Python: files in tests/ that should see it, and a `-k` expression if given behind "::".
            C++: the ninja target of the test binary.
        kind: "python" or "cpp".
        isa: C++: the instruction set that the binary runs with (LOWBIT_ISA).
    """

    path: str
    old: str
    new: str
    tests: tuple[str, ...]
    kind: str = "python"
    isa: str = ""


def python(path: str, *tests: str) -> _File:
    """Mutants of a file of the package, seen by test files named without "test_" and ".py"."""
    return _File(f"python/lowbit/{path}", tuple(f"tests/test_{name}.py" for name in tests))


@dataclass(frozen=True)
class _File:
    path: str
    tests: tuple[str, ...]

    def __call__(self, *changes: tuple[str, str]) -> list[Mutant]:
        return [Mutant(self.path, old, new, self.tests) for old, new in changes]
