"""`lowbit export`: a model in the files of another program."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from lowbit.text import as_json, printable

KINDS = ("gguf", "gptq", "compressed-tensors")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


def export(
    model: Annotated[
        Path, typer.Argument(help="A GGUF file, or a folder of transformers that is quantized.")
    ],
    out: Annotated[Path, typer.Argument(help="The GGUF file, or the folder, to write.")],
    to: Annotated[str, typer.Option(help=f"{', '.join(KINDS[:-1])} or {KINDS[-1]}.")],
    requantize: Annotated[
        str | None,
        typer.Option(
            help="What layers become whose format has no place there: a GGUF type (Q8_0), or a format (int4_g128). "
            "Without it they are an error."
        ),
    ] = None,
    pre: Annotated[
        str | None,
        typer.Option(help="llama.cpp's name of how the tokenizer splits text, if it is not known here."),
    ] = None,
    json_output: Annotated[
        bool, typer.Option("--json", help="Print one JSON object and nothing else.")
    ] = False,
) -> None:  # fmt: skip
    """Writes a model for llama.cpp (gguf), or for programs that read GPTQ or compressed-tensors."""
    if to not in KINDS:
        raise ValueError(f"--to must be one of {', '.join(KINDS)}, got {to!r}")
    if pre is not None and to != "gguf":
        raise ValueError(f"--pre is for --to gguf, got --to {to}")
    done = _export(model, out, to, requantize, pre)
    if json_output:
        print(as_json({**dataclasses.asdict(done), "path": str(done.path), "to": to}))
        return
    print(printable(f"{done.path}: {to}, {done}"))
    for what, layers in (("quantized anew", done.requantized), ("decoded", done.decoded)):
        if layers:
            print(printable(f"{what}: {', '.join(layers)}"))


def _export(source: Path, out: Path, to: str, requantize: str | None, pre: str | None) -> Any:
    import torch

    from lowbit.integrations.load import load_model, load_tokenizer

    is_folder = source.is_dir()
    has_tokenizer = not is_folder or any((source / name).is_file() for name in _TOKENIZER_FILES)
    if to == "gguf":
        from lowbit.export.gguf import to_gguf
        from lowbit.io.readers.gguf import GGUFFile

        # What is dense is rounded once, if at all.
        model = load_model(source, dtype=torch.float32)
        tokenizer: Any = None
        if has_tokenizer:
            tokenizer = load_tokenizer(source) if is_folder else GGUFFile(source)
        return to_gguf(model, out, tokenizer=tokenizer, requantize=requantize, pre=pre)
    from lowbit.export.compressed_tensors import to_compressed_tensors
    from lowbit.export.gptq import to_gptq

    write = to_gptq if to == "gptq" else to_compressed_tensors
    return write(
        load_model(source),
        out,
        source=source if is_folder else None,
        tokenizer=None if is_folder else load_tokenizer(source),
        requantize=requantize,
    )
