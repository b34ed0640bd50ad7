"""GGUF files as models of transformers whose linears stay packed, and their tokenizers.

The module tree is transformers' own, its parameters on the meta device; each `nn.Linear` is replaced by a
`QuantLinear` and the embedding by a `QuantEmbedding` as their tensors are read, so no dense weight
ever exists.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from lowbit.files import cut
from lowbit.formats import Format, as_format
from lowbit.integrations.gguf_keys import key, token_id
from lowbit.integrations.gguf_models import load
from lowbit.integrations.inexact import as_inexact
from lowbit.io.readers.gguf import GGUFFile
from lowbit.nn import PackedModule


def load_gguf(
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype = torch.bfloat16,
    format: Format | str | None = None,
    inexact: Format | str | None = None,
) -> PreTrainedModel:
    """Loads a GGUF file with its block-quantized weights packed as stored.

    A tied head shares the embedding's packed tensors. Tensors that the file holds dense (F16, BF16,
    F32) stay dense in `dtype`. Frequencies of the rotary embedding are divided by the file's
    factors (`rope_freqs.weight`) if it has them. All is read into memory: the file may change later.
    Linears and embeddings of a type that no format holds are quantized anew, and a warning names
    them. Of bert and nomic-bert it is the encoder, without pooling. Experts are in a `QuantExperts`; gates and
    what they multiply, which the file has apart, are in two of them in layers that have two types, and those of
    granitemoe's shared expert in a `JoinedLinear`.

    Args:
        path: the file, or any part of a split one.
        dtype: of the activations, the norms and the rows that the embedding returns.
        format: requantize the linears of the layers to this format, one by one, of any type that
            package `gguf` knows; the embedding and the head stay as stored.
        inexact: what becomes of weights of a type that no format holds: the format to quantize them
            to (None: int8_g32), or "dense", which keeps their values.

    Raises:
        FileNotFoundError, PermissionError: the file cannot be opened.
        ValueError: the file is damaged, or a part, a tensor or a key is missing.
        ImportError: accelerate is not installed.
        NotImplementedError: the architecture, a tensor type or a feature of the model is not
            supported.
    """
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"dtype must be float32, bfloat16 or float16, got {dtype}")
    target = None if format is None else as_format(format)
    nearest = as_inexact(inexact)
    return load(GGUFFile(path), dtype, target, nearest)


def load_gguf_decoded(
    path: str | os.PathLike[str], dtype: torch.dtype = torch.bfloat16
) -> PreTrainedModel:
    """The dense model of a GGUF file, with the values that it stands for; errors as `load_gguf`."""
    return load(GGUFFile(path), dtype, None, decoded=True)


def load_tokenizer(path: str | os.PathLike[str]) -> PreTrainedTokenizerFast:
    """The tokenizer that a GGUF file carries, with its chat template.

    Bytes of a token that are not UTF-8 become escapes such as \\xff.

    Raises:
        FileNotFoundError, PermissionError: the file cannot be opened.
        ValueError: the file is damaged, has no tokenizer, or one that transformers cannot make.
    """
    file = GGUFFile(path)
    key(file, "tokenizer.ggml.model", str)
    tokens = key(file, "tokenizer.ggml.tokens", list)
    for name in ("bos", "eos", "unknown", "padding"):
        token_id(file, name, len(tokens))
    with tempfile.TemporaryDirectory() as folder:
        source = file.files[0] if file.plain else _plain_copy(file, Path(folder) / "plain.gguf")
        try:
            # Not AutoTokenizer: for the class name alone it parses the header once more, which
            # takes seconds.
            return PreTrainedTokenizerFast.from_pretrained(
                str(source.parent),
                gguf_file=source.name,
                local_files_only=True,
                trust_remote_code=False,
            )
        # Package tokenizers raises Exception itself.
        except Exception as e:
            raise ValueError(
                f"{path}: transformers cannot make its tokenizer: {type(e).__name__}: {cut(str(e))}"
            ) from e


def _plain_copy(file: GGUFFile, path: Path) -> Path:
    """Writes what a tokenizer is made of, without what other readers of GGUF refuse."""
    writer = gguf.GGUFWriter(path, str(file.metadata["general.architecture"]))
    copy_metadata(file, writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def copy_metadata(file: GGUFFile, writer: gguf.GGUFWriter, prefix: str = "tokenizer.") -> None:
    """Gives a writer that has written nothing yet those keys of a file that it has not."""
    for name, value in file.metadata.items():
        if not name.startswith(prefix) or any(name in known for known in writer.kv_data):
            continue
        if isinstance(value, str):
            writer.add_string(name, value)
        elif isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
        elif isinstance(value, np.ndarray):
            writer.add_array(name, value.tolist())
        elif isinstance(value, list) and all(isinstance(v, str) for v in value):
            writer.add_array(name, value)


def packed_modules(model: nn.Module) -> Iterator[tuple[str, PackedModule]]:
    """The modules of a model that hold packed weights, a tied head included."""
    for name, module in model.named_modules():
        if isinstance(module, PackedModule):
            yield name, module
