"""The list of checkpoint formats that lowbit reads, and `open_checkpoint`, which picks one."""

from __future__ import annotations

import os
from pathlib import Path

from lowbit.io.readers.awq import AWQReader
from lowbit.io.readers.base import Reader
from lowbit.io.readers.bitnet import BitNetReader
from lowbit.io.readers.bitsandbytes import BitsAndBytesReader
from lowbit.io.readers.compressed_tensors import CompressedTensorsReader
from lowbit.io.readers.dense import DenseReader
from lowbit.io.readers.fp8 import FP8Reader
from lowbit.io.readers.gguf_reader import GGUFReader
from lowbit.io.readers.gptq import GPTQReader
from lowbit.io.readers.hqq import HQQReader
from lowbit.io.readers.modelopt import ModelOptReader
from lowbit.io.readers.mxfp4 import MXFP4Reader
from lowbit.io.readers.native import NativeReader
from lowbit.io.readers.quanto import QuantoReader
from lowbit.io.readers.tables import AnyPrecisionReader, SqueezeLLMReader
from lowbit.io.readers.torchao import TorchAOReader

# Asked in this order; the last takes what is left and says what it is.
READERS: tuple[type[Reader], ...] = (
    GGUFReader,
    NativeReader,
    GPTQReader,
    AWQReader,
    BitsAndBytesReader,
    CompressedTensorsReader,
    FP8Reader,
    HQQReader,
    BitNetReader,
    SqueezeLLMReader,
    AnyPrecisionReader,
    MXFP4Reader,
    ModelOptReader,
    QuantoReader,
    TorchAOReader,
    DenseReader,
)


def open_checkpoint(path: str | os.PathLike[str], mmap: bool = True) -> Reader:
    """Opens a checkpoint of any format of `READERS`.

    Raises:
        FileNotFoundError: there is no such file, or no checkpoint in the folder.
        ValueError: it is damaged, or another program quantized it, which the message names.
    """
    kind = next(reader for reader in READERS if reader.detect(Path(path)))
    return kind.open(path, mmap)
