"""to_gptq: a folder that AutoGPTQ, GPTQModel, transformers and vLLM read, in GPTQ's layout, version 2."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lowbit.export.folders import Integers, Kind, common, obstacle, words, write_folder
from lowbit.export.layers import Exported
from lowbit.formats import Format
from lowbit.io.safetensors_file import Specs
from lowbit.weights.quantized import QuantTensor

_BITS = (2, 3, 4, 8)


def to_gptq(
    model: PreTrainedModel,
    folder: str | os.PathLike[str],
    *,
    source: str | os.PathLike[str] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    requantize: Format | str | None = None,
) -> Exported:
    """Writes a model of transformers with packed weights as a folder of GPTQ (checkpoint_format "gptq_v2").

    Linears of 2, 3, 4 or 8 bits with one level of scales and integer zero points, or none, are written value for
    value, scales in the dtype of their format; embeddings are decoded to their own dtype. Layers may differ: the
    folder's `dynamic` rules say so. What a format says of activations is not written. Nothing is written if anything
    raises.

    Args:
        model: as `lowbit.load_model` or `lowbit.quantize_model` makes it.
        folder: made if needed; it must hold no other checkpoint.
        source: the folder that the model was loaded from, whose configuration and tokenizer are copied; None
            writes those of the model and of `tokenizer`.
        tokenizer: of transformers, written beside the weights.
        requantize: the format of linears that have another one, as in "int4_g128". None: they are an error.

    Raises:
        ValueError: the layout does not hold a layer; the message names it and its format.
        NotImplementedError: a layer computes something else than a product with its weight.

    Example:
        >>> to_gptq(lowbit.load_model("model"), "model-gptq", source="model")  # doctest: +SKIP
    """
    return write_folder(_KIND, model, folder, source, tokenizer, requantize)


def _obstacle(how: Integers) -> str | None:
    if why := obstacle(how, _BITS):
        return why
    for size, what in ((how.k, "in"), (how.n, "out")):
        if size * how.bits % 32:
            return f"has {size} {what} features, in {how.bits} bits no whole words of 32"
    if how.bits == 3 and how.k % 32:
        return f"has {how.k} in features, no multiple of 32 in 3 bits"
    return None


def _specs(how: Integers) -> Specs:
    specs: Specs = {
        "qweight": ((how.k * how.bits // 32, how.n), torch.int32),
        "qzeros": ((how.groups, how.n * how.bits // 32), torch.int32),
        "scales": ((how.groups, how.n), how.scale_dtype),
        "g_idx": ((how.k,), torch.int32),
    }
    return specs


def _tensors(
    how: Integers, codes: Tensor, weight: QuantTensor, index: Tensor | None
) -> dict[str, Tensor]:
    zeros = weight.zeros
    if zeros is None:
        shape = (how.n, how.groups)
        zeros = torch.full(shape, 1 << how.bits - 1, dtype=torch.uint8, device="cpu")
    if index is None:
        index = torch.arange(how.k, dtype=torch.int32, device="cpu") // (how.format.group or how.k)
    return {
        "qweight": words(codes, how.bits).t(),
        "qzeros": words(zeros.t(), how.bits),
        "scales": weight.tensors["scales"].t(),
        "g_idx": index.to(torch.int32),
    }


def _config(layers: Mapping[str, Integers], dense: list[str]) -> dict[str, Any]:
    bits, group = common(layers)
    symmetric = all(how.symmetric for how in layers.values())
    rules: dict[str, dict[str, Any]] = {f"-:^{re.escape(name)}$": {} for name in dense}
    for name, how in layers.items():
        own = {"bits": how.bits, "group_size": how.group, "sym": how.symmetric}
        if own != {"bits": bits, "group_size": group, "sym": symmetric}:
            rules[f"+:^{re.escape(name)}$"] = own
    return {
        "quant_method": "gptq",
        "checkpoint_format": "gptq_v2",
        "bits": bits,
        "group_size": group,
        "sym": symmetric,
        "desc_act": any(how.reordered for how in layers.values()),
        "lm_head": "lm_head" in layers,
        "pack_dtype": "int32",
        "dynamic": rules,
    }


_KIND = Kind("GPTQ", _obstacle, _specs, _tensors, _config)
