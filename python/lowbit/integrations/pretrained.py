"""Folders of transformers: loaded dense, with tokens to calibrate them, and quantized ones.

A quantized folder holds the configuration and the tokenizer of the dense one and, as
model.safetensors, a checkpoint of `lowbit.save`. Nothing is downloaded, and no code in a folder is
run.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoTokenizer, GenerationConfig, PreTrainedModel

from lowbit.io.container import INDEX_NAME, Reader
from lowbit.io.convert import check_target, copy_rest
from lowbit.io.safetensors import load, save

_GENERATION = "generation_config.json"


def load_dense(folder: str | os.PathLike[str]) -> PreTrainedModel:
    """Loads the model of a folder in the dtype and the class that its config.json names.

    Raises:
        FileNotFoundError: there is no config.json.
        ValueError: transformers cannot load it.
    """
    path = Path(folder)
    kind = _model_class(_config(path))
    try:
        return kind.from_pretrained(str(path), local_files_only=True, dtype="auto").eval()
    except (OSError, ValueError, KeyError, RuntimeError) as e:
        raise ValueError(f"{path}: transformers cannot load the model: {e}") from e


def save_folder(
    model: nn.Module, source: str | os.PathLike[str], target: str | os.PathLike[str]
) -> Path:
    """Writes a model that was loaded from the folder `source` and quantized to the folder `target`.

    Returns:
        The path of its model.safetensors.

    Raises:
        ValueError: as `check_folders`.
    """
    check_folders(source, target)
    old, new = Path(source), Path(target)
    new.mkdir(parents=True, exist_ok=True)
    copy_rest(old, new)
    return save(model, new)


def check_folders(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    """Raises ValueError if `save_folder` cannot write to `target`: it is `source`, a file, or holds
    a checkpoint in several files, whose index would be read instead.
    """
    check_target(Path(source), Path(target))
    if (index := Path(target) / INDEX_NAME).exists():
        raise ValueError(f"target must hold no other checkpoint, got {index}")


def load_folder(folder: str | os.PathLike[str]) -> PreTrainedModel:
    """Loads a folder that `save_folder` or `lowbit.io.convert.quantize_file` wrote.

    No dense form of a quantized weight is made. Sibling projections compute their products
    together, as `lowbit.quantize_model` leaves them.

    Raises:
        FileNotFoundError: there is no config.json, or no checkpoint.
        ImportError: accelerate is not installed.
        ValueError: as `lowbit.load`.
    """
    try:
        from accelerate import init_empty_weights
    except ModuleNotFoundError:
        raise ImportError(
            "accelerate is not installed; loading a folder needs: pip install 'lowbit[models]'"
        ) from None
    path = Path(folder)
    config = _config(path)
    # Parameters without memory; buffers that no file holds are real.
    with _default_dtype(config.dtype or torch.float32), init_empty_weights(include_buffers=False):
        model = _model_class(config)(config)
    model.tie_weights()
    load(model, path)
    if (path / _GENERATION).exists():
        model.generation_config = GenerationConfig.from_pretrained(str(path))
    return model.eval()


def calibration_tokens(
    file: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    length: int = 512,
    samples: int = 128,
    per_line: bool = False,
    seed: int = 0,
) -> list[Tensor]:
    """Inputs that calibrate the model of a folder.

    Args:
        file: token ids, integers, in a .npy file or as the only tensor of a .safetensors file: rows
            (n, tokens), or one stream of tokens; else UTF-8 text for the folder's tokenizer.
        folder: of the model.
        length: a stream or a text is cut in windows of so many tokens, of which an incomplete last
            one is left out; rows and lines are cut off there. A shorter text is one window.
        samples: how many windows, rows or lines are taken at most, chosen at random.
        per_line: every line of a text that is not blank is a document of its own.
        seed: of the choice.

    Returns:
        (1, tokens) int64 each, in the order of the file.

    Raises:
        FileNotFoundError: `file` or config.json is not there.
        ValueError: the file holds no tokens or something else, or an id that the model has not;
            there is no tokenizer; a number is out of range.
    """
    path, config = Path(file), _config(Path(folder)).get_text_config()
    longest = getattr(config, "max_position_embeddings", None)
    if length < 1 or samples < 1:
        raise ValueError(f"length and samples must be at least 1, got {length} and {samples}")
    if longest is not None and length > longest:
        raise ValueError(
            f"length must be at most {longest}, the positions of the model, got {length}"
        )
    if not path.is_file():
        raise FileNotFoundError(f"calibration must be a file, got {str(path)!r}")
    if path.suffix in (".npy", ".safetensors"):
        if per_line:
            raise ValueError(f"{path}: only text has lines, this holds tokens")
        rows = _stored_tokens(path)
    else:
        rows = _text_tokens(path, Path(folder), per_line)
    if len(rows) == 1 and not per_line:
        rows = list(rows[0].split(length))
        if len(rows) > 1 and len(rows[-1]) < length:
            rows.pop()
    rows = [row[:length] for row in rows if len(row)]
    if not rows:
        raise ValueError(f"{path}: calibration is empty, it holds no tokens")
    for row in rows:
        low, high = int(row.min()), int(row.max())
        if low < 0 or high >= config.vocab_size:
            wrong = low if low < 0 else high
            raise ValueError(f"{path}: token {wrong} is not in [0, {config.vocab_size})")
    if len(rows) > samples:
        seeded = torch.Generator("cpu").manual_seed(seed)
        order = torch.randperm(len(rows), generator=seeded, dtype=torch.int64, device="cpu")
        rows = [rows[i] for i in sorted(order[:samples].tolist())]
    return [row[None] for row in rows]


def _stored_tokens(path: Path) -> list[Tensor]:
    if path.suffix == ".npy":
        try:
            array = np.load(path, allow_pickle=False)
        except (ValueError, EOFError) as e:
            raise ValueError(f"{path}: not a .npy file of numbers: {e}") from e
        if not np.issubdtype(array.dtype, np.integer):
            raise ValueError(f"{path}: token ids must be integers, got {array.dtype}")
        tokens = torch.from_numpy(array.astype(np.int64))
    else:
        reader = Reader(path)
        if len(reader.specs) != 1:
            raise ValueError(f"{path}: must hold one tensor of token ids, got {len(reader.specs)}")
        tokens = reader.tensor(next(iter(reader.specs)))
        if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
            raise ValueError(f"{path}: token ids must be integers, got {tokens.dtype}")
    if tokens.dim() not in (1, 2):
        raise ValueError(f"{path}: token ids must be (n, tokens) or (tokens,), got {tokens.shape}")
    return list(tokens.long().view(-1, tokens.shape[-1]).unbind()) if tokens.numel() else []


def _text_tokens(path: Path, folder: Path, per_line: bool) -> list[Tensor]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise ValueError(f"{path}: not a text in UTF-8: {e}") from e
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, KeyError) as e:
        raise ValueError(
            f"{folder}: there is no tokenizer to read the text {path}; give token ids instead: {e}"
        ) from e
    documents = [line for line in text.splitlines() if line.strip()] if per_line else [text]
    # Not verbose: the whole text may be longer than the model's window.
    return [
        torch.tensor(
            tokenizer(document, verbose=False)["input_ids"], dtype=torch.int64, device="cpu"
        )
        for document in documents
    ]


def _config(folder: Path) -> Any:
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder}: must be a folder of transformers, with a config.json")
    return AutoConfig.from_pretrained(str(folder), local_files_only=True)


def _model_class(config: Any) -> Any:
    """The class that the configuration names; else the headless model of its kind."""
    name = (config.architectures or [""])[0]
    return getattr(transformers, name, None) or AutoModel._model_mapping[type(config)]


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
