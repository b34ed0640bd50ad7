"""to_compressed_tensors: a folder that transformers and vLLM read, packed integers of compressed-tensors."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lowbit.export.folders import Integers, Kind, obstacle, words, write_folder
from lowbit.export.layers import Exported
from lowbit.formats import Format
from lowbit.io.safetensors_file import Specs
from lowbit.weights.quantized import QuantTensor

_BITS = (2, 3, 4, 5, 6, 8)


def to_compressed_tensors(
    model: PreTrainedModel,
    folder: str | os.PathLike[str],
    *,
    source: str | os.PathLike[str] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    requantize: Format | str | None = None,
) -> Exported:
    """Writes a model of transformers with packed weights as a folder of compressed-tensors (format "pack-quantized").

    As `lowbit.export.gptq.to_gptq`, for 2, 3, 4, 5, 6 and 8 bits; layers that differ are groups of the
    configuration. Codes of 3, 5 and 6 bits are streams, as versions from 0.18 on read them.

    Args:
        model, folder, source, tokenizer, requantize: as there.

    Raises:
        ValueError, NotImplementedError: as there.

    Example:
        >>> to_compressed_tensors(lowbit.load_model("model"), "model-w4a16", source="model")  # doctest: +SKIP
    """
    return write_folder(_KIND, model, folder, source, tokenizer, requantize)


def _obstacle(how: Integers) -> str | None:
    if why := obstacle(how, _BITS):
        return why
    for size, what in ((how.k, "in"), (how.n, "out")):
        if 32 % how.bits and size % 32:
            # Versions before 0.18 have another layout, which such a size would not tell from this one.
            return f"has {size} {what} features, no multiple of 32 in {how.bits} bits"
    return None


def _specs(how: Integers) -> Specs:
    specs: Specs = {
        "weight_packed": ((how.n, -(-how.k * how.bits // 32)), torch.int32),
        "weight_scale": ((how.n, how.groups), how.scale_dtype),
        "weight_shape": ((2,), torch.int64),
    }
    if not how.symmetric:
        specs["weight_zero_point"] = ((-(-how.n * how.bits // 32), how.groups), torch.int32)
    if how.reordered:
        specs["weight_g_idx"] = ((how.k,), torch.int32)
    return specs


def _tensors(
    how: Integers, codes: Tensor, weight: QuantTensor, index: Tensor | None
) -> dict[str, Tensor]:
    made = {
        "weight_packed": words(codes, how.bits),
        "weight_scale": weight.tensors["scales"],
        "weight_shape": torch.tensor((how.n, how.k), dtype=torch.int64, device="cpu"),
    }
    if weight.zeros is not None:
        made["weight_zero_point"] = words(weight.zeros.t(), how.bits).t()
    if index is not None:
        made["weight_g_idx"] = index
    return made


def _config(layers: Mapping[str, Integers], dense: list[str]) -> dict[str, Any]:
    groups: dict[tuple[int, int, bool, bool], list[str]] = {}
    for name, how in layers.items():
        key = how.bits, how.group, how.symmetric, how.reordered
        groups.setdefault(key, []).append(name)
    # The largest group is all linears that no other one names.
    ranked = sorted(groups.items(), key=lambda item: -len(item[1]))
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": dense,
        "kv_cache_scheme": None,
        "config_groups": {
            f"group_{i}": {
                "targets": names if i else ["Linear"],
                "weights": _scheme(*key),
                "input_activations": None,
                "output_activations": None,
            }
            for i, (key, names) in enumerate(ranked)
        },
    }


def _scheme(bits: int, group: int, symmetric: bool, reordered: bool) -> dict[str, Any]:
    return {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "channel" if group == -1 else "group",
        "group_size": None if group == -1 else group,
        "actorder": "group" if reordered else None,
        "dynamic": False,
    }


_KIND = Kind("compressed-tensors", _obstacle, _specs, _tensors, _config)
