"""Huffman codes of small symbols, by constriction. A code is stored as the length of each symbol's word, in a byte."""

from __future__ import annotations

from types import ModuleType

import numpy as np

ABSENT = 255  # the length of a symbol that does not occur
_MOST = 64


def _library() -> ModuleType:
    try:
        from constriction import symbol
    except ImportError as e:
        raise ImportError(
            "entropy coding needs constriction: pip install lowbit[compression]"
        ) from e
    return symbol  # type: ignore[no-any-return]


def encode(symbols: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Symbols below `size`, at least one, as the lengths of the code, (size,) uint8, and words, (W,) uint32."""
    lengths = _lengths(np.bincount(symbols, minlength=size))
    words = _encoded(_ranks(lengths)[symbols], lengths)
    return lengths, words


def decode(lengths: np.ndarray, words: np.ndarray, count: int) -> np.ndarray:  # (count,) uint8
    """Inverse of `encode`.

    Raises:
        ValueError: the lengths are those of no Huffman code, or the words do not hold exactly so many symbols.
    """
    _check(lengths)
    symbol = _library()
    tree = symbol.huffman.DecoderHuffmanTree(_probabilities(lengths))
    present = np.flatnonzero(lengths != ABSENT).astype(np.uint8)
    decoder = symbol.QueueDecoder(np.ascontiguousarray(words, np.uint32))
    ranks = np.empty(count, np.int64)
    try:
        for i in range(count):
            ranks[i] = decoder.decode_symbol(tree)
    except ValueError as e:
        raise ValueError(f"the words end after {i} of {count} symbols") from e
    bits = int(lengths[present][ranks].astype(np.int64).sum())
    if -(-bits // 32) != len(words):
        raise ValueError(f"{count} symbols take {-(-bits // 32)} words, got {len(words)}")
    return present[ranks]


def _lengths(counts: np.ndarray) -> np.ndarray:
    """The length of each symbol's word in the best code; the only one has length 0."""
    symbol = _library()
    lengths = np.full(len(counts), ABSENT, np.uint8)
    present = np.flatnonzero(counts)
    tree = symbol.huffman.EncoderHuffmanTree((counts[present] / counts.sum()).astype(np.float32))
    for rank, at in enumerate(present):
        encoder = symbol.QueueEncoder()
        encoder.encode_symbol(rank, tree)
        lengths[at] = encoder.get_compressed()[1]
    return lengths


def _check(lengths: np.ndarray) -> None:
    given = lengths[lengths != ABSENT].astype(np.int64)
    if not len(given) or given.max() > _MOST:
        raise ValueError(f"lengths must be some of 0 to {_MOST}, got {sorted(set(given.tolist()))}")
    # Kraft's sum of a complete code is 1.
    total = sum(1 << (_MOST - int(length)) for length in given)
    if total != 1 << _MOST:
        raise ValueError(
            f"the lengths are those of no Huffman code: Kraft's sum is {total / 2**_MOST:g}, not 1"
        )


def _probabilities(lengths: np.ndarray) -> np.ndarray:
    """Those whose Huffman code has exactly these lengths: 2^-length, exact in fp32."""
    return np.exp2(-lengths[lengths != ABSENT].astype(np.float32))


def _ranks(lengths: np.ndarray) -> np.ndarray:
    """The place of each symbol among those that occur."""
    return np.cumsum(lengths != ABSENT) - 1


def _encoded(ranks: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    symbol = _library()
    tree, encoder = (
        symbol.huffman.EncoderHuffmanTree(_probabilities(lengths)),
        symbol.QueueEncoder(),
    )
    for rank in ranks.tolist():
        encoder.encode_symbol(rank, tree)
    words: np.ndarray = encoder.get_compressed()[0]
    return words
