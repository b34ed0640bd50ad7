"""The planted faults of mutations/ still stand for text of the product; mutants.py plants them."""

from __future__ import annotations

import importlib
from collections import Counter

import pytest
from mutants import FAMILIES, ROOT, describe


@pytest.mark.parametrize("family", FAMILIES)
def test_planted_faults_are_not_stale(family):
    faults = importlib.import_module(f"mutations.{family}").MUTANTS
    stale = [describe(m) for m in faults if (ROOT / m.path).read_text().count(m.old) != 1]
    idle = [describe(m) for m in faults if m.old == m.new]
    twice = [describe(m) for m, n in Counter(faults).items() if n > 1]
    assert not stale, "not exactly once in the file: " + "\n".join(stale)
    assert not idle, "changes nothing: " + "\n".join(idle)
    assert not twice, "planted twice: " + "\n".join(twice)
