"""Runs tasks in several processes that share a GPU; one that crashes or hangs costs its task alone."""

from __future__ import annotations

import contextlib
import json
import queue
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

_WORKER = Path(__file__).parent / "gpu_checks.py"


def run(
    tasks: list[list[Any]], processes: int, seconds: float, limit: float
) -> list[dict[str, Any]]:
    """The results of all tasks.

    Not ok is the result of a task that takes longer than `seconds`, whose process dies, or that has not begun after
    `limit` seconds of all.
    """
    waiting: queue.SimpleQueue[list[Any]] = queue.SimpleQueue()
    results: list[dict[str, Any]] = []
    for task in tasks:
        waiting.put(task)
    arguments = (waiting, results, seconds, time.monotonic() + limit)
    threads = [threading.Thread(target=_serve, args=arguments) for _ in range(processes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sorted(results, key=lambda r: json.dumps(r["task"]))


def _serve(
    waiting: queue.SimpleQueue[list[Any]],
    results: list[dict[str, Any]],
    seconds: float,
    end: float,
) -> None:
    worker = None
    while True:
        try:
            task = waiting.get_nowait()
        except queue.Empty:
            break
        if time.monotonic() > end:
            results.append({"task": task, "ok": False, "failed": "not begun in time"})
            continue
        worker = worker or _Worker()
        answer = worker.ask(task, seconds)
        if answer is None:
            error = worker.end()
            worker = None
            results.append({"task": task, "ok": False, "failed": error})
        else:
            results.extend({"task": task, **r} for r in answer)
            if any("CUDA error" in r.get("failed", "") for r in answer):  # the context is lost
                worker.end()
                worker = None
    if worker:
        worker.end()


class _Worker:
    """A process that answers a line of JSON with another."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(_WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._errors: list[str] = []
        self._reader = threading.Thread(target=self._read_errors)
        self._reader.start()

    def _read_errors(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self._errors.append(line)

    def ask(self, task: list[Any], seconds: float) -> list[dict[str, Any]] | None:
        """The answer to a task, None if the process ended or took too long."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        late = threading.Timer(seconds, self._process.kill)
        late.start()
        try:
            self._process.stdin.write(json.dumps(task) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            late.cancel()
        answer: list[dict[str, Any]] | None = json.loads(line) if line else None
        return answer

    def end(self) -> str:
        """Waits for the end, or kills; the last lines that the process wrote as errors."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self._reader.join()
        self._process.stdout.close()
        self._process.stderr.close()
        return f"exit {self._process.wait()}: " + "".join(self._errors)[-1500:]
