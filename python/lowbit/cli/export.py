"""`lowbit export`: a model in the files of another program, or as C for a microcontroller."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from lowbit.text import as_json, printable

KINDS = ("gguf", "gptq", "compressed-tensors", "c")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


def export(
    model: Annotated[
        Path,
        typer.Argument(
            help="A GGUF file, a folder of transformers that is quantized, or for C a program by torch.export.save "
            "(.pt2)."
        ),
    ],
    out: Annotated[Path, typer.Argument(help="The GGUF file, or the folder, to write.")],
    to: Annotated[
        str | None,
        typer.Option(help=f"{', '.join(KINDS[:-1])} or {KINDS[-1]}; a .pt2 file becomes c."),
    ] = None,
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
    calibrate: Annotated[
        Path | None,
        typer.Option(help="C: a tensor of inputs (samples, ...) by torch.save, for ranges and the self-test."),
    ] = None,
    bits: Annotated[
        int | None, typer.Option(help="C: 8 or 16, of weights and activations; 8 if not given.")
    ] = None,
    scheme: Annotated[
        str | None,
        typer.Option(help="C: qmn, scales that are powers of two, or tflite, TFLite-Micro's int8; qmn if not given."),
    ] = None,
    granularity: Annotated[
        str | None,
        typer.Option(
            help="C, qmn: a scale per network, layer or filter; layer for 8 bits and network (Q7.9) for 16 if not "
            "given."
        ),
    ] = None,
    rounding: Annotated[
        str | None, typer.Option(help="C, qmn: nearest or floor; nearest if not given.")
    ] = None,
    codebook: Annotated[
        int | None, typer.Option(help="C: store weights as codes of 2, 3 or 4 bits of a k-means table.")
    ] = None,
    max_ram: Annotated[
        int | None, typer.Option(help="C: an error if the arena has more bytes.")
    ] = None,
    json_output: Annotated[
        bool, typer.Option("--json", help="Print one JSON object and nothing else.")
    ] = False,
) -> None:  # fmt: skip
    """Writes a model for llama.cpp (gguf), for programs that read GPTQ or compressed-tensors, or a program of
    torch.export as C99 that computes it in integers.
    """
    if to is None and model.suffix == ".pt2":
        to = "c"
    if to not in KINDS:
        raise ValueError(f"--to must be one of {', '.join(KINDS)}, got {to!r}")
    settings = {
        "bits": bits,
        "scheme": scheme,
        "granularity": granularity,
        "rounding": rounding,
        "codebook": codebook,
        "max_ram": max_ram,
    }
    if to == "c":
        for name, value in (("--requantize", requantize), ("--pre", pre)):
            if value is not None:
                raise ValueError(f"{name} is for models of transformers, got --to c")
        _export_c(model, out, calibrate, settings, json_output)
        return
    for name, given in {"calibrate": calibrate, **settings}.items():
        if given is not None:
            raise ValueError(f"--{name.replace('_', '-')} is for --to c, got --to {to}")
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


def _export_c(
    program: Path,
    out: Path,
    calibrate: Path | None,
    settings: dict[str, Any],
    json_output: bool,
) -> None:
    if calibrate is None:
        raise ValueError("--calibrate INPUTS is needed for C: a tensor of inputs by torch.save")
    from lowbit.export.c.project import export_c
    from lowbit.export.c.reading import load_inputs, load_program

    given = {name: value for name, value in settings.items() if value is not None}
    done = export_c(load_program(program), load_inputs(calibrate), out, **given)
    if json_output:
        print(as_json({**dataclasses.asdict(done), "path": str(done.path), "to": "c"}))
        return
    print(printable(f"{done.path}: c, {done}"))
    for name, how in done.layers.items():
        print(printable(f"{name}: {how}"))


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
