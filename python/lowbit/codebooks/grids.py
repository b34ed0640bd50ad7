"""The vectors that numbers in GGUF's blocks IQ1_S to IQ3_S stand for: tables of package `gguf`, and how kernels read
them.

A vector has 8 values of up to three levels, or 4 of eight, so that it fits 16 bits: two or three bits a value, the
first one lowest, which number the level. The sign of a value, or what IQ1 adds to it, chooses between two tables of
levels.
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
    """The values by their number, without and with the bit of theirs that lies apart, again and again up to 8."""
    found = np.unique(vectors(codec))
    room = 4 if vectors(codec).shape[1] == 8 else _LEVELS
    filled = np.concatenate([found, np.zeros(room - len(found), np.float32)])
    row = np.tile(filled, _LEVELS // room).astype(np.float32)
    pair = (row + DELTA, row - DELTA) if has_delta(codec) else (row, -row)
    return np.stack(pair).astype(np.float32)


def words(codec: str) -> np.ndarray:  # (E,) uint16
    """The numbers of the levels of every vector."""
    table = vectors(codec)
    numbers = np.searchsorted(np.unique(table), table).astype(np.uint16)
    bits = 2 if table.shape[1] == 8 else 3
    shifts = np.arange(0, bits * table.shape[1], bits, dtype=np.uint16)
    joined: np.ndarray = np.bitwise_or.reduce(numbers << shifts, axis=1)
    return joined
