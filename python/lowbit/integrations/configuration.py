"""What the config.json of a folder of transformers says: a configuration, a class, an empty model.

Nothing is downloaded, no code in a folder is run, and nothing is asked.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoConfig, AutoModel, PreTrainedModel
from transformers.utils import logging

from lowbit.io.foreign import CONFIG_NAME, read_json
from lowbit.io.safetensors_file import SafetensorsFile, tensor_files

# Of every from_pretrained.
LOADS_HERE: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
# Keys that count modules, and how many are made without a question.
_COUNTS, _ANY_COUNT = re.compile("layer|expert|depth"), 1024


def read_config(folder: Path) -> Any:
    """The configuration of a folder.

    Raises:
        FileNotFoundError: there is no config.json.
        ValueError: transformers cannot read it, or only with code of the folder.
    """
    file = folder / CONFIG_NAME
    if not file.is_file():
        raise FileNotFoundError(f"{folder}: must be a folder of transformers, with a config.json")
    kind = read_json(file).get("model_type")
    if isinstance(kind, str) and kind not in CONFIG_MAPPING:
        raise ValueError(
            f"{file}: model_type must be a model of transformers {transformers.__version__}, got "
            f"{kind!r:.100}; no code of a folder is run: quantize its .safetensors files by name"
        )
    with errors_of(f"{file}: not a configuration that transformers reads"), quiet():
        return AutoConfig.from_pretrained(str(folder), **LOADS_HERE)


def model_class(folder: Path, config: Any) -> Any:
    """The class that the configuration of a folder names; without a name the headless model of its
    kind.

    Raises:
        ValueError: transformers has none, or the name is that of something else.
    """
    file, names = folder / CONFIG_NAME, config.architectures
    if not names:
        if type(config) not in AutoModel._model_mapping:
            raise ValueError(f"{file}: transformers has no model for a {type(config).__name__}")
        return AutoModel._model_mapping[type(config)]
    name = names[0] if isinstance(names, list) else names
    kind = getattr(transformers, name, None) if isinstance(name, str) else None
    # The base class of all models has no configuration.
    if not (isinstance(kind, type) and issubclass(kind, PreTrainedModel) and kind.config_class):
        raise ValueError(
            f"{file}: architectures must name a model class of transformers "
            f"{transformers.__version__}, got {name!r:.100}"
        )
    return kind


def empty_model(
    folder: str | os.PathLike[str], dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """The model that config.json describes, its parameters on the meta device, in the dtype that is asked for or
    that config.json names.

    Raises:
        FileNotFoundError, ImportError, ValueError: as `load_folder` of `pretrained`.
    """
    path = Path(folder)
    config = read_config(path)
    if dtype is not None:
        config.dtype = dtype
    check_counts(path, config)
    kind = model_class(path, config)
    return without_weights(
        kind, config, f"{path / CONFIG_NAME}: transformers cannot make a {kind.__name__} of it"
    )


def without_weights(kind: type[PreTrainedModel], config: Any, what: str) -> PreTrainedModel:
    """The model of a configuration, its parameters on the meta device and its buffers real.

    Raises:
        ImportError: accelerate is not installed.
        ValueError: transformers cannot make it, with `what` in front.
    """
    try:
        from accelerate import init_empty_weights
    except ModuleNotFoundError:
        raise ImportError(
            "accelerate is not installed; loading a model needs: pip install 'lowbit[models]'"
        ) from None
    with errors_of(what), quiet(), _default_dtype(config.dtype or torch.float32):
        # Parameters without memory; buffers that no file holds are real.
        with init_empty_weights(include_buffers=False):
            model: PreTrainedModel = kind(config)
        model.tie_weights()
    return model


def check_counts(folder: Path, config: Any) -> None:
    """Raises ValueError if config.json asks for far more layers or experts than the checkpoint has
    tensors: making them would take hours before anything is compared.
    """
    stored = 0
    if any(folder.glob("*.safetensors")):
        stored = sum(len(SafetensorsFile(file).specs) for file in tensor_files(folder))
    most = max(stored, _ANY_COUNT)
    parts = [config.to_dict()]
    while parts:
        for key, value in parts.pop().items():
            if isinstance(value, dict):
                parts.append(value)
            elif isinstance(value, int) and value > most and _COUNTS.search(str(key)):
                raise ValueError(
                    f"{folder / CONFIG_NAME}: {key} must be at most {most}, as the checkpoint holds "
                    f"{stored} tensors, got {value}"
                )


@contextlib.contextmanager
def errors_of(what: str) -> Iterator[None]:
    """Turns whatever transformers and the libraries below it raise at damaged files, types that
    nobody documents, into a ValueError that starts with `what`.
    """
    try:
        yield
    except ImportError:
        raise  # a package that the model needs: nothing is damaged
    except Exception as e:
        cause = " ".join(str(e).split())
        raise ValueError(f"{what}: {type(e).__name__}: {cause:.500}") from e


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps transformers from printing names in a folder: what matters of them is an error here."""
    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
