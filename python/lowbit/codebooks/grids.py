"""The vectors that numbers in GGUF's blocks IQ1_S to IQ3_S stand for: tables of package `gguf`, and how kernels read
them.

A vector has 8 values of three levels, or 4 of eight. To kernels a value is a nibble, the first one lowest: three bits
that number its level, and the highest one for its sign, or for what IQ1 adds to it.
"""

from __future__ import annotations

import functools
import importlib

import numpy as np

# What is added to, or taken from, all 8 values of a vector of IQ1.
DELTA = 0.125
_LEVELS = 8


@functools.cache
def vectors(codec: str) -> np.ndarray:  # (E, 8) or (E, 4) fp32
    """The vectors of a codec of `structured.BLOCK_BYTES`.

    Raises:
        ModuleNotFoundError: package `gguf` is not installed.

    Example:
        >>> vectors("iq3_xxs").shape
        (256, 4)
    """
    try:
        module = importlib.import_module("gguf.quants")
    except ModuleNotFoundError as e:
        raise ModuleNotFoundError(
            f"weights in format {codec!r} need package gguf, which holds its vectors: pip install gguf",
            name=e.name,
        ) from e
    kind = getattr(module, codec.upper())
    kind.init_grid()
    grid: np.ndarray = kind.grid.reshape(kind.grid_shape).astype(np.float32)
    return grid


def has_delta(codec: str) -> bool:
    """Whether bits apart choose `DELTA` or its negative for vectors, and not signs of values."""
    return codec.startswith("iq1")


def levels(codec: str) -> np.ndarray:  # (2, 8) fp32
    """The values of nibbles, without and with the highest bit; zeros where there is no level."""
    found = np.unique(vectors(codec))
    pair = [found + DELTA, found - DELTA] if has_delta(codec) else [found, -found]
    return np.stack([np.pad(row, (0, _LEVELS - len(found))) for row in pair]).astype(np.float32)


def words(codec: str) -> np.ndarray:  # (E,) uint32
    """The numbers of the levels of every vector, a nibble each."""
    table = vectors(codec)
    numbers = np.searchsorted(np.unique(table), table).astype(np.uint32)
    shifts = np.arange(0, 4 * table.shape[1], 4, dtype=np.uint32)
    joined: np.ndarray = np.bitwise_or.reduce(numbers << shifts, axis=1)
    return joined
