"""Folders of transformers: loaded dense, with tokens to calibrate them, and quantized ones.

A quantized folder holds the configuration and the tokenizer of the dense one and a checkpoint of
`lowbit.save` or `quantize_file`. Nothing is downloaded, and no code in a folder is run.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel

from lowbit.files import staged, write_atomically
from lowbit.integrations.configuration import (
    LOADS_HERE,
    check_counts,
    empty_model,
    errors_of,
    model_class,
    quiet,
    read_config,
)
from lowbit.io.foreign import (
    CONFIG_KEYS,
    CONFIG_NAME,
    OWN_FILES,
    read_json,
    refuse_quantized,
)
from lowbit.io.match import Match
from lowbit.io.readers.native import NativeReader
from lowbit.io.safetensors_file import FILE_NAME, INDEX_NAME, SafetensorsFile, tensor_files
from lowbit.io.save_load import load, save
from lowbit.io.shards import parse_size
from lowbit.nn.conv import CONVOLUTIONS
from lowbit.nn.names import Selection
from lowbit.nn.stand_ins import stand_ins
from lowbit.ptq import Report
from lowbit.ptq.file import check_target, copy_rest
from lowbit.ptq.model import plan_layers

_METHOD = "lowbit"
_GENERATION = "generation_config.json"
_SHOWN = 8  # names in an error message


def load_dense(folder: str | os.PathLike[str], dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Loads the model of a folder in the class that its config.json names.

    Args:
        folder: with a config.json and a dense checkpoint.
        dtype: of the weights; None takes that of config.json, or of the checkpoint.

    Raises:
        FileNotFoundError: there is no config.json.
        ValueError: the checkpoint is quantized already, lacks weights of the model, or transformers
            cannot load it.
    """
    return load_dense_and_rest(folder, dtype)[0]


def load_dense_and_rest(
    folder: str | os.PathLike[str], dtype: torch.dtype | None = None
) -> tuple[PreTrainedModel, list[str]]:
    """As `load_dense`; also the names in the checkpoint that are no part of the model."""
    path = Path(folder)
    refuse_quantized(path)
    config = read_config(path)
    check_counts(path, config)
    kind = model_class(path, config)
    with errors_of(f"{path}: transformers cannot load the model"), quiet():
        model, info = kind.from_pretrained(
            str(path), dtype=dtype or "auto", output_loading_info=True, **LOADS_HERE
        )
    name = kind.__name__
    for key, what in (("missing_keys", "lacks"), ("mismatched_keys", "has other shapes of")):
        if names := sorted(map(str, info[key])):
            shown = ", ".join(names[:_SHOWN])
            raise ValueError(f"{path}: {what} {len(names)} weights of a {name}: {shown:.1000}")
    if model._hf_peft_config_loaded:
        raise ValueError(
            f"{path}: holds an adapter of PEFT: merge it into the model, or take its "
            "adapter_config.json away"
        )
    return model.eval(), sorted(info["unexpected_keys"])


def save_folder(
    model: nn.Module,
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    finish: Callable[[Path], object] | None = None,
    *,
    max_shard_size: int | str | None = None,
) -> Path:
    """Writes a model that was loaded from the folder `source` and quantized to the folder `target`. If
    anything raises, `target` is as it was.

    Args:
        model, source, target: as above.
        finish: as in `lowbit.ptq.file.quantize_file`.
        max_shard_size: as in `lowbit.save`.

    Returns:
        The path of its model.safetensors, or of the index.

    Raises:
        ValueError: as `check_folders`; `max_shard_size` is no size.
    """
    check_folders(source, target, max_shard_size)
    with staged(target, FILE_NAME if max_shard_size is None else INDEX_NAME) as place:
        copy_rest(Path(source), place)
        forget_quantization(place)
        name_lowbit(place)
        written = save(model, place, max_shard_size=max_shard_size)
        if finish is not None:
            finish(place)
    return Path(target) / written.name


def forget_quantization(folder: Path) -> None:
    """Takes what another program said of the tensors of the source out of the folder."""
    for name in OWN_FILES:
        (folder / name).unlink(missing_ok=True)
    content = read_json(folder / CONFIG_NAME)
    parts = [content, *(v for v in content.values() if isinstance(v, dict))]
    found = [part.pop(key, None) for part in parts for key in (*CONFIG_KEYS, "anyprec")]
    if any(found):
        text = json.dumps(content, indent=2).encode()
        write_atomically(folder / CONFIG_NAME, lambda f: f.write(text))


def name_lowbit(folder: Path) -> None:
    """Says in config.json that lowbit quantized the folder."""
    content = {**read_json(folder / CONFIG_NAME), "quantization_config": {"quant_method": _METHOD}}
    text = json.dumps(content, indent=2).encode()
    write_atomically(folder / CONFIG_NAME, lambda f: f.write(text))


def check_folders(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    max_shard_size: int | str | None = None,
) -> None:
    """Raises ValueError if `save_folder` cannot write to `target`: it is `source`, a file, or holds a checkpoint in
    several files (with `max_shard_size`: in one), which would be read instead; or if that is no size.
    """
    if max_shard_size is not None:
        parse_size(max_shard_size)
    name = FILE_NAME if max_shard_size is None else INDEX_NAME
    check_target(Path(source), Path(target), (name,))


def load_folder(folder: str | os.PathLike[str]) -> PreTrainedModel:
    """Loads a folder that `save_folder` or `lowbit.ptq.file.quantize_file` wrote.

    No dense form of a quantized weight is made. Sibling projections compute their products
    together, as `lowbit.quantize_model` leaves them.

    Raises:
        FileNotFoundError: there is no config.json, or no checkpoint.
        ImportError: accelerate is not installed.
        ValueError: as `lowbit.load`; config.json is damaged, or names no model of transformers.
    """
    path = Path(folder)
    model = empty_model(path)
    # Of the folder: what is saved of the model later may be dense, or of another program.
    vars(model.config).pop("quantization_config", None)
    load(model, path)
    read_generation(model, path)
    return model.eval()


def read_generation(model: PreTrainedModel, folder: Path) -> None:
    """Gives a model the generation_config.json of a folder, if there is one; ValueError if it is damaged."""
    if (folder / _GENERATION).exists():
        with errors_of(f"{folder / _GENERATION}: transformers cannot read it"):
            model.generation_config = GenerationConfig.from_pretrained(str(folder))


def check_folder(folder: str | os.PathLike[str]) -> None:
    """Raises what `load_folder` would, but for wrong values in tensors, which are not read."""
    path = Path(folder)
    model, checkpoint = empty_model(path), NativeReader(path)
    with stand_ins(model, checkpoint.header.layers):
        Match(model, checkpoint)


def obstacles(
    folder: str | os.PathLike[str], selection: Selection, dtype: torch.dtype | None = None
) -> dict[str, str] | None:
    """Why modules of a folder's model cannot be quantized, for `quantize_file`.

    None if that does not give what the model is: if transformers renames, fuses or converts tensors
    of the checkpoint as it loads them, or keeps some in another dtype, or if weights to quantize
    are stored transposed or as filters of convolutions. Then the model must be loaded to be quantized.
    """
    model = empty_model(folder)
    shapes = {
        name: shape
        for file in tensor_files(Path(folder))
        for name, (shape, _) in SafetensorsFile(file).specs.items()
    }
    state = model.state_dict(keep_vars=True)
    stored = {id(t) for name, t in state.items() if name in shapes}
    same = all(
        tuple(t.shape) == shapes[name] if name in shapes else id(t) in stored
        for name, t in state.items()
    )
    buffers = [t for name, t in model.named_buffers() if name in state]
    own_dtypes = any(t.is_floating_point() for t in buffers)
    own_dtypes = own_dtypes or bool(model._get_dtype_plan(dtype or model.dtype))
    if not same or not shapes.keys() <= state.keys() or own_dtypes:
        return None
    left = Report()
    with stand_ins(model) as transposed:
        planned = {name for names in plan_layers(model, selection, left) for name in names}
        reordered = any(isinstance(model.get_submodule(name), CONVOLUTIONS) for name in planned)
    return left.left if planned.isdisjoint(transposed) and not reordered else None


def put(model: nn.Module, name: str, module: nn.Module) -> None:
    """Puts a module in the place of one that nothing is attached to."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def set_dtype(folder: str | os.PathLike[str], dtype: torch.dtype) -> None:
    """Makes `dtype` that of config.json, as transformers writes it."""
    path = Path(folder) / CONFIG_NAME
    content = read_json(path)
    name = str(dtype).removeprefix("torch.")
    for part in (content, *(v for v in content.values() if isinstance(v, dict))):
        if part is content or "dtype" in part or "torch_dtype" in part:
            part.pop("torch_dtype", None)
            part["dtype"] = name
    write_atomically(path, lambda f: f.write(json.dumps(content, indent=2).encode()))


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
    path, config = Path(file), read_config(Path(folder)).get_text_config()
    vocabulary = getattr(config, "vocab_size", None)
    if not isinstance(vocabulary, int):
        raise ValueError(
            f"{folder}: calibration is for models of tokens, vocab_size is {vocabulary!r}"
        )
    longest = getattr(config, "max_position_embeddings", None)
    if length < 1 or samples < 1:
        raise ValueError(f"length and samples must be at least 1, got {length} and {samples}")
    if isinstance(longest, int) and length > longest:
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
        if low < 0 or high >= vocabulary:
            wrong = low if low < 0 else high
            raise ValueError(f"{path}: token {wrong} is not in [0, {vocabulary})")
    if len(rows) > samples:
        seeded = torch.Generator("cpu").manual_seed(seed)
        order = torch.randperm(len(rows), generator=seeded, dtype=torch.int64, device="cpu")
        rows = [rows[i] for i in sorted(order[:samples].tolist())]
    return [row[None] for row in rows]


def _stored_tokens(path: Path) -> list[Tensor]:
    if path.suffix == ".npy":
        with errors_of(f"{path}: not a .npy file of numbers"):
            # Mapped: a damaged header may promise more than there is memory for.
            array = np.load(path, mmap_mode="r", allow_pickle=False)
            if not isinstance(array, np.ndarray):
                raise TypeError(f"it holds a {type(array).__name__}")
        if not np.issubdtype(array.dtype, np.integer):
            raise ValueError(f"{path}: token ids must be integers, got {array.dtype}")
        tokens = torch.from_numpy(array.astype(np.int64))
    else:
        reader = SafetensorsFile(path)
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
    missing = f"{folder}: there is no tokenizer to read the text {path}; give token ids instead"
    with errors_of(missing), quiet():
        tokenizer: Any = AutoTokenizer.from_pretrained(str(folder), **LOADS_HERE)
    documents = [line for line in text.splitlines() if line.strip()] if per_line else [text]
    with errors_of(f"{folder}: the tokenizer cannot read the text {path}"):
        # Not verbose: the whole text may be longer than the model's window.
        return [
            torch.tensor(
                tokenizer(document, verbose=False)["input_ids"], dtype=torch.int64, device="cpu"
            )
            for document in documents
        ]


def unhooked(module: nn.Module) -> None:
    """Takes from a module that is to be replaced what transformers' tensor parallelism has given it."""
    own = vars(module)
    own.pop("_is_hooked", None)
    own.pop("forward", None)
    for key, p in module._parameters.items():
        if hasattr(p, "full_tensor"):  # a DTensor
            whole = p.full_tensor()  # type: ignore[union-attr, operator]
            module._parameters[key] = nn.Parameter(whole, requires_grad=p.requires_grad)  # type: ignore[union-attr]
