"""The read ceiling: as many bytes as a weight has, read once."""

from __future__ import annotations

import ctypes
import functools
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from adapters.base import Candidate, num_copies

_SOURCE = Path(__file__).parent.parent / "read.cpp"


@functools.cache
def _library() -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "read.so"
        flags = ["-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"]
        subprocess.run(["c++", *flags, str(_SOURCE), "-o", str(path)], check=True)
        library = ctypes.CDLL(str(path))
    library.read_bytes.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_bool)
    library.read_bytes.restype = ctypes.c_uint64
    return library


def read(like: Candidate, threads: int, prefetches: bool) -> Candidate:
    """Reads the bytes of another candidate's weight; its product is not computed, so there is no result to check."""
    n, k = like.weight.shape
    nbytes = int(like.bits * n * k / 8)
    buffers = [np.ones(nbytes // 8, np.uint64) for _ in range(num_copies(nbytes))]
    library = _library()

    def prepare(x: Tensor) -> Callable[[], object]:
        def run() -> None:
            for b in buffers:
                library.read_bytes(b.ctypes.data, b.nbytes, threads, prefetches)

        return run

    return Candidate(
        f"{'prefetched ' * prefetches}read of {like.name}",
        like.bits,
        "none",
        torch.empty(n, k, device="meta"),
        len(buffers),
        prepare,
        lambda: [],
    )
