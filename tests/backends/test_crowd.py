"""A busy process beside this one: regions leave it a core while it needs one, and results stay the same bits."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
import torch
from oracle import normal

import lowbit
from lowbit import _C

MILLISECOND = 1_000_000
LONG_WAIT, ASKED, LONGEST_REST = 20 * MILLISECOND, 0.01, 4.0

pytestmark = pytest.mark.skipif(
    _C.waited_for_cores_ns() < 0, reason="this system does not say how long threads wait for a core"
)


@pytest.fixture
def one_core_for_two() -> Iterator[subprocess.Popen[bytes]]:
    """This thread and a busy process on one core."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as busy:
        try:
            yield busy
        finally:
            busy.kill()
            os.sched_setaffinity(0, before)


def work(seconds: float) -> int:
    """Computes for a while, and returns the nanoseconds that this process waited for a core meanwhile."""
    before, end = _C.waited_for_cores_ns(), time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass
    return _C.waited_for_cores_ns() - before


def wait_for(threads: int, most: float) -> None:
    """Until regions get all of some threads again."""
    end = time.perf_counter() + most
    while _C.uncrowded_threads(threads) < threads:
        assert time.perf_counter() < end
        time.sleep(0.02)


def crowd(threads: int) -> int:
    """How many of some threads regions get when the first long waits have been seen."""
    for _ in range(20):
        work(5 * ASKED)
        _C.note_wait(LONG_WAIT, 0)
        if _C.uncrowded_threads(threads) < threads:
            break
    return _C.uncrowded_threads(threads)


def test_waiting_for_a_core_is_seen(one_core_for_two: subprocess.Popen[bytes]):
    """A thread that never sleeps is on a core or waits for one; here it has most of the core."""
    time.sleep(0.3)
    os.setpriority(os.PRIO_PROCESS, one_core_for_two.pid, 5)
    for _ in range(5):
        start, cpu = time.perf_counter(), time.thread_time()
        waited = work(0.5)
        wall, cpu = time.perf_counter() - start, time.thread_time() - cpu
        if abs(waited / 1e9 - (wall - cpu)) < 0.1 * wall and waited > 10 * MILLISECOND:
            return
    pytest.fail(f"waited {waited / 1e9} of {wall} s, of which {cpu} on a core")


def test_regions_leave_a_core_and_take_it_back(one_core_for_two: subprocess.Popen[bytes]):
    """Two long waits near to each other tell; one in which others worked as long, or a short one, does not."""
    wait_for(4, 2 * LONGEST_REST)
    time.sleep(0.3)
    for waited, worked in ((LONG_WAIT // 100, 0), (LONG_WAIT, 3 * LONG_WAIT)):
        for _ in range(3):
            work(2 * ASKED)
            _C.note_wait(waited, worked)
        assert _C.uncrowded_threads(4) == 4
    for _ in range(2):
        assert crowd(4) == 3
        assert _C.uncrowded_threads(1) == 1
        assert _C.uncrowded_threads(2) == 1
        wait_for(4, 2 * LONGEST_REST)


def test_waits_for_other_things_are_no_crowd():
    """Long waits, but no thread of this process waited for a core."""
    for _ in range(10):
        wait_for(4, 2 * LONGEST_REST)
        time.sleep(2 * ASKED)
        _C.note_wait(LONG_WAIT, 0)  # what is waited for counts from here on
        before = _C.waited_for_cores_ns()
        if _C.uncrowded_threads(4) < 4:
            continue
        for _ in range(2):
            time.sleep(2 * ASKED)
            _C.note_wait(LONG_WAIT, 0)
        if _C.waited_for_cores_ns() - before < MILLISECOND // 2:
            assert _C.uncrowded_threads(4) == 4
            return
    pytest.skip("this machine has no core left")


def test_results_are_the_same_bits(one_core_for_two: subprocess.Popen[bytes]):
    weight, x = lowbit.quantize(normal(2048, 1024), "nf4"), normal(3, 1024, seed=1)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        wait_for(4, 2 * LONGEST_REST)
        y = lowbit.linear(x, weight)
        assert crowd(4) < 4
        assert torch.equal(lowbit.linear(x, weight), y)
    finally:
        torch.set_num_threads(before)
