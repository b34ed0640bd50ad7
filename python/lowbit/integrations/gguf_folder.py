"""What a folder of transformers has beside the weights, made of a GGUF file: a configuration and a tokenizer."""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from transformers import GenerationConfig

from lowbit.integrations.gguf_models import configured
from lowbit.integrations.transformers import load_tokenizer
from lowbit.io.readers.gguf import GGUFFile
from lowbit.io.readers.gguf_reader import GGUFReader

_logger = logging.getLogger("lowbit")


def quantized_types(path: str | os.PathLike[str]) -> list[str]:
    """The names of the block types that a GGUF file holds; none of a dense one."""
    return sorted({t.format for t in GGUFReader(path).describe() if t.quantized})


@contextlib.contextmanager
def folder_of(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary folder with the config.json, generation_config.json and tokenizer of a GGUF file.

    A tokenizer that transformers cannot make is left out, with a warning.

    Raises:
        ValueError, NotImplementedError: as `lowbit.load_model` of the file.
    """
    file = GGUFFile(path)
    with tempfile.TemporaryDirectory() as made:
        _, config = configured(file)
        config.save_pretrained(made)
        GenerationConfig.from_model_config(config).save_pretrained(made)
        try:
            load_tokenizer(path).save_pretrained(made)
        except ValueError as e:
            _logger.warning("%s: the folder gets no tokenizer: %s", path, e)
        yield Path(made)
