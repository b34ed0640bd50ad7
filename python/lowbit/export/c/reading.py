"""The files that an export starts from: a program by torch.export.save, and a tensor by torch.save."""

from __future__ import annotations

import os
import pickle
import warnings
import zipfile
from pathlib import Path

import torch
from torch import Tensor
from torch.export import ExportedProgram

from lowbit.files import InputFile, kind_of


def load_program(path: str | os.PathLike[str]) -> ExportedProgram:
    """A program that torch.export.save wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds something else, or a program that this torch cannot read.
    """
    file = InputFile(path)
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} must be a program by torch.export.save{kind_of(file)}")
    try:
        with warnings.catch_warnings():
            # torch's own, about itself.
            warnings.simplefilter("ignore", FutureWarning)
            return torch.export.load(Path(path))
    # A damaged archive, or one of another kind, may raise anything.
    except Exception as e:
        raise ValueError(
            f"{path} must be a program by torch.export.save, reading it raises {type(e).__name__}: {e}"
        ) from e


def load_inputs(path: str | os.PathLike[str]) -> Tensor:
    """A tensor that torch.save wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds something else.
    """
    file = InputFile(path)
    try:
        found = torch.load(file.name, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, KeyError, ValueError) as e:
        raise ValueError(f"{path} must be a tensor by torch.save{kind_of(file)}") from e
    if not isinstance(found, Tensor):
        raise ValueError(f"{path} must hold a tensor, got {type(found).__name__}")
    return found
