"""torch's operators in the child of a fork: the threads of its OpenMP pool are gone there, and a parallel region would
wait for them for ever. The compiled kernels run on one thread in such a child (csrc/core/parallel.h).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

from lowbit import late

P = ParamSpec("P")
R = TypeVar("R")


def forked() -> bool:
    """Whether this process is the child of a fork that happened after lowbit was imported."""
    return late.usable_threads(2) == 1


def alone_after_fork(function: Callable[P, R]) -> Callable[P, R]:
    """Lets the torch operators of a function run on one thread, without the pool, in the child of a fork."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling() or not forked():
            return function(*args, **kwargs)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return function(*args, **kwargs)
        finally:
            torch.set_num_threads(threads)

    return call
