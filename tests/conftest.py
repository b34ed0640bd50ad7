"""Every test: a seed that is printed when it fails, memory of torch.empty that is poisoned, two threads.

LOWBIT_SEED=n repeats a run; without it the seed is 0.
"""

from __future__ import annotations

import importlib.util
import os
import random
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

# Read when Triton is imported, which torch does for some tests: its kernels then run in its interpreter, on the CPU.
os.environ["TRITON_INTERPRET"] = "1"

import torch

from lowbit import _C

if importlib.util.find_spec("triton"):
    import triton.language
    from triton.runtime import interpreter

    _interpreted_call = interpreter.InterpretedFunction.__call__

    def _call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if triton.language in self.fn.__globals__.values():
            return self.rewrite()(*args, **kwargs)
        return _interpreted_call(self, *args, **kwargs)  # a function of Triton's own

    # More than half of the interpreter's time: each call of a device function patches triton.language again, which the
    # launch has done, and each sum of indices is computed twice to see an overflow that small shapes do not have.
    interpreter.InterpretedFunction.__call__ = _call
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(
        sanitize_overflow=False
    )

# `torch.device` as a context keeps the list of the functions that it is for from its first use, and would keep those
# of _poisoned_memory, which it then never sees: models "on the meta device" would be on the CPU.
with torch.device("meta"):
    assert torch.empty(1, dtype=torch.uint8).is_meta

SEED = int(os.environ.get("LOWBIT_SEED", "0"))


@pytest.fixture(scope="session", autouse=True)
def _two_threads() -> None:
    torch.set_num_threads(2)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For thousands of operations on a few hundred numbers: a second thread only waits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _seed() -> None:
    random.seed(SEED)
    torch.manual_seed(SEED)


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    """torch.compile gives up on code that was compiled too often, by all tests of a process together."""
    if "torch._dynamo" in sys.modules and torch._dynamo.utils.counters["frames"]:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Any:
    report = yield
    if report.failed:
        report.sections.append(("seed", f"LOWBIT_SEED={SEED}"))
    return report


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """An element that a kernel forgets to write is NaN, or 0xFF in an integer tensor; so is what it reads of its own
    memory without having written it, which ends at a page that must not be touched."""
    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch.Tensor, "new_empty"),
    ):
        monkeypatch.setattr(owner, name, _poisoning(getattr(owner, name)))
    _C.poison_outputs(True)
    _C.poison_scratch(True)


def _poisoning(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        t = make(*args, **kwargs)
        if t.device.type == "cpu" and t.dim() and t.is_contiguous() and t.numel():
            # All bits set: NaN in every float dtype that has one of that pattern.
            t.detach().view(torch.uint8).fill_(0xFF)
        return t

    return poisoned
