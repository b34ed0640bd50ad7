"""Threads beside a busy process."""

from __future__ import annotations

from mutations import cpp

MUTANTS = [
    *cpp("core/crowd.cpp", "tests/backends/test_crowd.py")(
        ("if (waited_ns < kLongWait || waited_ns < worked_ns / 2) return;", "if (waited_ns < kLongWait) return;"),
        ("if (waited_ns < kLongWait || waited_ns < worked_ns / 2) return;", "if (waited_ns < worked_ns / 2) return;"),
        ("total += waited;", "total += ran;"),
        ("crowd.missing.store(0, std::memory_order_relaxed);", ""),
        ("crowd.missing.fetch_add(1, std::memory_order_relaxed);", ""),
        ("return std::max(1, threads - missing);", "return threads - missing;"),
        ("crowd.seen_waited = waited;", ""),
    ),
]  # fmt: skip
