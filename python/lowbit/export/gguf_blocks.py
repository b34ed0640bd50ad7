"""Which GGUF type holds a weight, and its bytes as one."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from lowbit.formats import Format
from lowbit.io.readers.gguf_blocks import BLOCK_TYPES, Array, Parts
from lowbit.packing import is_blocks
from lowbit.strides import contiguous
from lowbit.weights.quantized import QuantTensor

# What a weight can be quantized to: those of one level of scales, without a factor of the whole tensor, and not blocks
# of vectors, for which there is no method.
REQUANTIZED = {
    kind.name: kind
    for kind, block in BLOCK_TYPES.items()
    if block.format.scale2 is None and block.format.scale != "e4m3" and not is_blocks(block.format)
}


def block_type(format: Format, k: int) -> GGMLQuantizationType | None:
    """The type that holds every weight of a format with K columns, value for value; None if there is none.

    A scale that many weights share is written once for every block of them. How a format treats activations and
    fits its scales is not part of a file.
    """
    for kind, block in BLOCK_TYPES.items():
        own = block.format
        if own.codec != format.codec:
            continue
        one_level = format.scale2 is None
        alike = dataclasses.replace(
            format,
            name=own.name,
            scale_rule=own.scale_rule,
            activation=None,
            activation_group=None,
            group=own.group if one_level else format.group,
        )
        shared = not one_level or own.group is None or (format.group or k) % own.group == 0
        if alike == own and shared and k % GGML_QUANT_SIZES[kind][0] == 0:
            return kind
    return None


def to_blocks(weight: QuantTensor, kind: GGMLQuantizationType) -> Array:
    """The bytes of a weight (N, K) of a format for which `block_type` is `kind`: (N, row bytes) uint8.

    Raises:
        ValueError: scales are none that the type can hold; the message says which.
    """
    n, k = weight.shape
    block, size = BLOCK_TYPES[kind], GGML_QUANT_SIZES[kind][0]
    if block.format.scale == "e4m3":
        factor = float(weight.tensors["scales2"])
        if factor != 1:
            raise ValueError(f"{kind.name} has no factor of the whole tensor, got {factor:g}")
    fields: dict[str, Any] = {}
    for name, t in weight.tensors.items():
        if name == "codes" or (name == "scales2" and block.format.scale == "e4m3"):
            continue
        values = t
        if name in ("scales", "zeros"):
            group = block.format.group
            assert group is not None
            repeat = (weight.format.group or k) // group
            values = t.repeat_interleave(repeat, 1)[:, : k // group]
        raw = contiguous(values)
        if raw.dtype.is_floating_point and raw.dtype.itemsize == 1:
            raw = raw.view(torch.uint8)
        fields[name] = raw.numpy().reshape(n * k // size, -1)
    codes = weight.unpack().numpy().reshape(n * k // size, -1)
    return np.ascontiguousarray(block.join(Parts(codes, **fields)).reshape(n, -1))
