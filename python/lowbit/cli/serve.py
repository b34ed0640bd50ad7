"""`lowbit serve`: transformers' server, which speaks OpenAI's protocol, with a model whose weights stay packed."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated

import typer

_NEEDED = ("transformers", "fastapi", "uvicorn", "openai", "pydantic")


def serve(
    context: typer.Context,
    model: Annotated[
        Path,
        typer.Argument(help="A folder that lowbit quantize, lowbit.save or save_pretrained wrote."),
    ],
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "localhost",
    port: Annotated[int, typer.Option(min=1, max=65535, help="The port to listen on.")] = 8000,
) -> None:
    """Serves a model as OpenAI's API: chat completions, completions, responses.

    Options that `transformers serve --help` lists may follow.
    """
    for name in _NEEDED:
        if importlib.util.find_spec(name) is None:
            raise ImportError(
                f"{name} is not installed; a server needs: pip install 'lowbit[cli,models]' 'transformers[serving]'"
            )
    from lowbit.io.readers.native import NativeReader
    from lowbit.io.readers.registry import open_checkpoint

    reader = open_checkpoint(model, mmap=False)
    if not isinstance(reader, NativeReader) or not model.is_dir():
        raise ValueError(
            f"{model}: must be a folder that lowbit wrote, this is {reader.name}: make one by lowbit quantize "
            f"{model} FOLDER, with --quantized keep if it is quantized"
        )
    from transformers.cli.transformers import app  # which importing lowbit told of such folders

    app(["serve", str(model), "--host", host, "--port", str(port), *context.args])
