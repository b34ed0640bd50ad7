"""load_model: a GGUF file or a folder of transformers, dense or quantized by anyone, as a transformers model."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from lowbit.formats import Format, as_format
from lowbit.integrations.configuration import LOADS_HERE, errors_of, quiet
from lowbit.integrations.dense import cast_dense, values_of
from lowbit.integrations.filling import Found, fill, packed_share
from lowbit.integrations.inexact import Inexact, as_inexact
from lowbit.integrations.pretrained import load_dense, load_folder, put, read_generation
from lowbit.integrations.quantizer import mark
from lowbit.integrations.quantizing import dequantize_modules
from lowbit.io.foreign import CONFIG_NAME
from lowbit.io.readers.folder import FolderReader
from lowbit.io.readers.native import NativeReader
from lowbit.io.readers.registry import open_checkpoint
from lowbit.methods import quantize
from lowbit.nn import PackedModule, QuantEmbedding, QuantLinear, set_activations
from lowbit.nn.stand_ins import stand_ins
from lowbit.nn.surgery import replace
from lowbit.ptq import quantize_model

_logger = logging.getLogger("lowbit")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def load_model(
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    format: Format | str | None = None,
    inexact: Format | str | None = None,
    activations: str | None = None,
) -> PreTrainedModel:
    """Loads a model whose weights stay packed as they are stored.

    Takes a GGUF file, or a folder of transformers (config.json and safetensors, sharded or not, heads tied or not):
    dense, of lowbit, or quantized by another program that `lowbit.io.readers.registry` knows. Linears become
    `QuantLinear`, embeddings that are quantized `QuantEmbedding`, experts `QuantExperts`; what the checkpoint holds
    dense stays dense. Layers are read one at a time, so is each of the experts that share a tensor. The logger "lowbit"
    says in one line, at level INFO, what was found and what became of it; what no format holds exactly is quantized
    anew or dense, and a warning says so.

    Args:
        path: the file or the folder. Nothing is downloaded and no code in it is run.
        dtype: of what is dense, and of activations: fp32, bf16 or fp16; by default that of config.json (bf16 of a
            GGUF file).
        device: where the model shall run.
        format: quantize the linears anew to this format, one by one; heads and embeddings stay as stored.
        inexact: what becomes of weights that no format holds exactly: a format to quantize them to, or "dense", which
            keeps their values. None: int8_g32 for types of GGUF and for HQQ with axis 0, of which whole checkpoints
            are, and dense for others.
        activations: "int8" or "int8_b32" lets the packed linears but for the head quantize their inputs, per row or
            per 32 values of one, as `lowbit.nn.set_activations`; None takes them as the checkpoint's formats say.

    Raises:
        FileNotFoundError: there is no such file or folder, or a part of it is missing.
        ImportError: accelerate is not installed, or gguf for a GGUF file.
        ValueError: something is damaged or contradicts itself; the message names file, tensor and value. Or a layer
            cannot have such activations.
        NotImplementedError: transformers computes another thing with the weights than a linear, or fuses them in
            another way than it does those of experts.

    Example:
        >>> model = lowbit.load_model("Qwen2.5-0.5B-Instruct-GPTQ-Int4")  # doctest: +SKIP
    """
    if dtype is not None and dtype not in _DTYPES:
        raise ValueError(f"dtype must be float32, bfloat16 or float16, got {dtype}")
    target = None if format is None else as_format(format)
    model = _load(Path(path), dtype, device, target, as_inexact(inexact))
    if activations is not None:
        head = model.get_output_embeddings()
        heads = [f"^{re.escape(name)}$" for name, module in model.named_modules() if module is head]
        set_activations(model, activations, skip=heads)
    if any(isinstance(module, PackedModule) for module in model.modules()):
        mark(model)
    return model


def _load(
    where: Path,
    dtype: torch.dtype | None,
    device: torch.device | str,
    target: Format | None,
    nearest: Inexact,
) -> PreTrainedModel:
    if where.is_dir() and not any(where.glob("*.safetensors")):
        return _load_dense(where, dtype, device, target)  # what transformers alone reads
    reader = open_checkpoint(where, mmap=False)
    if reader.name == "gguf":
        return _moved(_load_gguf(where, dtype, target, nearest)[0], device)
    if not where.is_dir():
        raise ValueError(
            f"{where}: must be a folder with a {CONFIG_NAME} and this file, or a GGUF file"
        )
    if isinstance(reader, NativeReader):
        return _load_native(where, dtype, device, target)
    if not isinstance(reader, FolderReader):
        return _load_dense(where, dtype, device, target)
    return _load_stored(reader, dtype, device, target, nearest)[0]


def load_as_stored(
    path: str | os.PathLike[str], dtype: torch.dtype | None = None
) -> tuple[PreTrainedModel, Found]:
    """As `load_model(inexact="dense")` of a GGUF file, or of a folder that another program quantized; also what became
    of it.

    Raises:
        ValueError: another program has not.
    """
    reader = open_checkpoint(path, mmap=False)
    if reader.name == "gguf":
        return _load_gguf(Path(path), dtype, None, "dense")
    if not isinstance(reader, FolderReader):
        raise ValueError(
            f"{path}: must be a folder that another program quantized, this one is {reader.name}"
        )
    return _load_stored(reader, dtype, "cpu", None, "dense")


def _load_gguf(
    path: Path, dtype: torch.dtype | None, format: Format | None, inexact: Inexact
) -> tuple[PreTrainedModel, Found]:
    from lowbit.integrations.transformers import load_gguf

    model: PreTrainedModel = load_gguf(
        path, dtype=dtype or torch.bfloat16, format=format, inexact=inexact
    )
    found = _survey(model, "gguf", format)
    _say(path, found)
    return model, found


def _load_stored(
    reader: FolderReader,
    dtype: torch.dtype | None,
    device: torch.device | str,
    format: Format | None,
    inexact: Inexact,
) -> tuple[PreTrainedModel, Found]:
    model, found = fill(reader, dtype, device, format, inexact)
    read_generation(model, reader.path)
    _say(reader.path, found)
    return model.eval(), found


def keep_stored(model: PreTrainedModel, path: str | os.PathLike[str]) -> dict[str, str]:
    """Gives a model of `load_decoded` back what the checkpoint holds packed of the layers that are dense and unchanged.

    Returns:
        Their formats by their names.
    """
    if isinstance(open_checkpoint(path, mmap=False), NativeReader):
        stored = _load_native(Path(path), model.dtype, "cpu", None)
    else:
        stored, _ = load_as_stored(path, model.dtype)
    packed = {n: m for n, m in stored.named_modules() if isinstance(m, PackedModule)}
    kept: dict[str, str] = {}
    # Experts, and halves of a linear, are layers of their own there.
    with stand_ins(model, packed):
        modules = dict(model.named_modules())
        for name, module in packed.items():
            dense = modules.get(name)
            if not (isinstance(dense, nn.Linear) or type(dense) is nn.Embedding):
                continue
            weight = dense.get_parameter("weight")
            if torch.equal(values_of(module).to(weight.dtype), weight):
                kept[name] = module.format.name
        for name in kept:
            replace(model, name, stored.get_submodule(name))
    return kept


def load_tokenizer(path: str | os.PathLike[str]) -> PreTrainedTokenizerFast:
    """The tokenizer of a GGUF file or of a folder.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: there is no tokenizer, or transformers cannot make it.
    """
    where = Path(path)
    if not where.is_dir():
        from lowbit.integrations.transformers import load_tokenizer as of_gguf

        return of_gguf(where)
    with errors_of(f"{where}: transformers cannot make its tokenizer"), quiet():
        made: Any = AutoTokenizer.from_pretrained(str(where), **LOADS_HERE)
    tokenizer: PreTrainedTokenizerFast = made
    return tokenizer


def load_decoded(path: str | os.PathLike[str], dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Loads the dense model with the values that the weights of a GGUF file or a folder stand for.

    Args:
        path, dtype: as of `load_model`.

    Raises:
        As `load_model`; NotImplementedError: a layer of lowbit is neither a linear nor an embedding.
    """
    where = Path(path)
    if where.is_dir() and not any(where.glob("*.safetensors")):
        return load_dense(where, dtype)
    reader = open_checkpoint(where, mmap=False)
    if reader.name == "gguf":
        from lowbit.integrations.transformers import load_gguf_decoded

        decoded: PreTrainedModel = load_gguf_decoded(where, dtype or torch.bfloat16)
        return decoded
    if isinstance(reader, FolderReader):
        return fill(reader, dtype, "cpu", None, "dense", decoded=True)[0].eval()
    if not isinstance(reader, NativeReader):
        return load_dense(where, dtype)
    model = load_folder(path)
    try:
        dequantize_modules(model, None)
    except NotImplementedError as e:
        raise NotImplementedError(f"{path}: {e}") from e
    if dtype is not None:
        cast(model, dtype)
    return model


def _load_dense(
    path: Path, dtype: torch.dtype | None, device: torch.device | str, format: Format | None
) -> PreTrainedModel:
    model = load_dense(path, dtype)
    if format is not None:
        quantize_model(model, format, progress=False)
    _say(path, _survey(model, "not quantized", format))
    return _moved(model, device)


def _load_native(
    path: Path, dtype: torch.dtype | None, device: torch.device | str, format: Format | None
) -> PreTrainedModel:
    model = load_folder(path)
    if format is not None:
        head = model.get_output_embeddings()
        for name, module in list(model.named_modules()):
            if isinstance(module, QuantLinear) and module is not head:
                weight = quantize(values_of(module), format)
                made = QuantLinear.from_quant_tensor(weight, module._parameters["bias"])
                put(model, name, made)
    if dtype is not None:
        cast(model, dtype)
    _say(path, _survey(model, "lowbit", format))
    return _moved(model, device)


def cast(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """As `cast_dense`; the configuration says so."""
    cast_dense(model, dtype)
    model.config.dtype = dtype


def _moved(model: PreTrainedModel, device: torch.device | str) -> PreTrainedModel:
    moved: PreTrainedModel = model.to(device)  # type: ignore[arg-type]
    return moved


def _survey(model: nn.Module, kind: str, format: Format | None) -> Found:
    """What the layers of a model are that another loader made."""
    found = Found(kind, packed_share(model))
    for name, module in model.named_modules():
        if isinstance(module, PackedModule):
            again = module.format == format and not isinstance(module, QuantEmbedding)
            (found.requantized if again else found.packed)[name] = module.format.name
        elif isinstance(module, nn.Linear | nn.Embedding):
            found.dense.append(name)
    return found


def _say(path: Path, found: Found) -> None:
    _logger.info("%s: %s", path, found)
