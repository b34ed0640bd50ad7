"""Blocks of GGUF joined again of what they split into: the very bytes."""

from __future__ import annotations

import numpy as np
import pytest

gguf = pytest.importorskip("gguf")

from gguf import GGMLQuantizationType as GGMLType  # noqa: E402

from gguf_files import random_blocks  # noqa: E402
from lowbit.io.readers.gguf_blocks import BLOCK_TYPES  # noqa: E402


@pytest.mark.parametrize("kind", BLOCK_TYPES, ids=lambda kind: kind.name)
def test_join_gives_the_very_bytes(kind):
    blocks = random_blocks(kind, 200, 1, np.random.default_rng(0))
    if kind == GGMLType.NVFP4:
        # A scale with its sign set, or of 127, stands for another one.
        blocks[:, :4] = blocks[:, :4] % 127
    if kind == GGMLType.TQ1_0:
        # Of the bytes that stand for the same trits a writer takes one.
        values = np.random.default_rng(1).integers(-1, 2, (200, 256)).astype(np.float32)
        blocks = gguf.quantize(values, kind)
    block = BLOCK_TYPES[kind]
    with np.errstate(invalid="ignore"):
        joined = block.join(block.split(blocks))
    assert joined.dtype == np.uint8
    assert np.array_equal(joined, blocks)


@pytest.mark.parametrize(
    ("kind", "field", "value", "expected"),
    [
        (GGMLType.Q2_K, "scales", 16, r"scales must be in \[0, 15\], got 16"),
        (GGMLType.Q2_K, "zeros", -1, r"minima must be in \[0, 15\], got -1"),
        (GGMLType.Q3_K, "scales", 32, r"scales must be in \[-32, 31\], got 32"),
        (GGMLType.Q4_K, "scales", 64, r"scales must be in \[0, 63\], got 64"),
        (GGMLType.Q5_K, "zeros", 64, r"minima must be in \[0, 63\], got 64"),
        (GGMLType.IQ4_XS, "scales", -33, r"scales must be in \[-32, 31\], got -33"),
    ],
)
def test_scales_that_no_block_holds(kind, field, value, expected):
    block = BLOCK_TYPES[kind]
    parts = block.split(random_blocks(kind, 3, 1, np.random.default_rng(0)))
    changed = getattr(parts, field).copy()
    changed[1, 2] = value
    with pytest.raises(ValueError, match=expected):
        block.join(parts._replace(**{field: changed}))
