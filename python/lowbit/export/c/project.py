"""From a `torch.export` program and inputs to a folder of C99 that computes it in integers."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor
from torch.export import ExportedProgram

from lowbit.export.c import arena, selftest, source
from lowbit.export.c.report import CExport, cycles_of, macs_of, stored_as
from lowbit.files import staged, write_atomically
from lowbit.integer import IntegerGraph, calibrate, quantize_qmn, quantize_tflite, trace
from lowbit.integer.graph import Weighted
from lowbit.integer.weights import CODEBOOK_BITS

SCHEMES = ("qmn", "tflite")
# Samples of the self-test.
_SAMPLES = 8


@torch.no_grad()
def export_c(
    program: ExportedProgram,
    inputs: Tensor,
    folder: str | os.PathLike[str],
    *,
    bits: int = 8,
    scheme: str = "qmn",
    granularity: str | None = None,
    rounding: str | None = None,
    codebook: int | None = None,
    max_ram: int | None = None,
) -> CExport:
    """Writes a network as C: model.h, model.c, weights.h, kernels.h, and main.c, a self-test.

    `gcc folder/*.c -lm` builds the self-test, which exits with 1 if a result differs from what Python computed; with
    -DMODEL_TRACE it compares the result of every node. A program of one's own leaves main.c out, and calls
    model_run(input, output) with int8_t, or int16_t for 16 bits.

    Args:
        program: by torch.export.export, of a module in eval mode (see `lowbit.integer.trace`).
        inputs: (samples, ...) of floating point: they give the ranges of all tensors, and the first of them the
            self-test.
        folder: where the files are to be; it is made if needed. Files of these names are replaced, all or none.
        bits: 8 or 16, of weights and activations.
        scheme: "qmn", powers of two (`integer.quantize_qmn`), or "tflite", that of TFLite-Micro in 8 bits
            (`integer.quantize_tflite`).
        granularity, rounding: of "qmn".
        codebook: store weights as codes of 2, 3 or 4 bits of a table that k-means fits.
        max_ram: bytes that the arena may have.

    Returns:
        What it costs.

    Raises:
        NotImplementedError: an op of the program has no integer form.
        TypeError, ValueError: an argument is none of these, inputs are not finite or of another shape, sums of a
            layer may overflow int32, or the arena is larger than `max_ram`. Nothing is written then.

    Example:
        >>> print(export_c(torch.export.export(model.eval(), (x,)), inputs, "out", bits=16))
    """
    _check(bits, scheme, granularity, rounding, codebook, max_ram)
    real = trace(program)
    ranges = calibrate(real, inputs)
    if scheme == "tflite":
        graph = quantize_tflite(real, ranges, codebook=codebook)
    else:
        graph = quantize_qmn(
            real,
            ranges,
            bits=bits,
            granularity=granularity,
            rounding=rounding or "nearest",
            codebook=codebook,
        )
    inputs = inputs.detach().to("cpu")
    expected = real(inputs)
    error = (graph(inputs) - expected).norm() / expected.norm()
    return write_c(graph, graph.quantize(inputs[:_SAMPLES]), folder, float(error), max_ram)


def write_c(
    graph: IntegerGraph,
    samples: Tensor,
    folder: str | os.PathLike[str],
    error: float,
    max_ram: int | None = None,
) -> CExport:
    """Writes a graph as C with a self-test on integer samples: the last part of `export_c`."""
    places = arena.plan(graph)
    ram = places.size * graph.bits // 8
    if max_ram is not None and ram > max_ram:
        raise ValueError(f"max_ram is {max_ram} bytes, and the arena of this network has {ram}")
    text = source.write(graph, places)
    files = {
        "kernels.h": resources.files("lowbit.export.c").joinpath("kernels.h").read_text(),
        "weights.h": source.weights_h(graph, text),
        "model.h": source.model_h(graph, places),
        "main.c": selftest.main_c(graph, samples),
        "model.c": source.model_c(graph, places, text),
    }
    done = CExport(
        Path(folder),
        graph.scheme,
        graph.bits,
        text.flash,
        ram,
        macs_of(graph),
        cycles_of(graph),
        error,
    )
    for n in graph.nodes:
        if isinstance(n.node, Weighted):
            done.layers[n.node.path or n.node.name] = stored_as(n)
    with staged(folder, "model.c") as place:
        for name, content in files.items():
            write_atomically(place / name, _written(content))
    return done


def _written(content: str) -> Callable[[BinaryIO], object]:
    return lambda file: file.write(content.encode())


def _check(
    bits: int,
    scheme: str,
    granularity: str | None,
    rounding: str | None,
    codebook: int | None,
    max_ram: int | None,
) -> None:
    if scheme not in SCHEMES:
        raise ValueError(f"scheme must be one of {', '.join(SCHEMES)}, got {scheme!r}")
    if bits not in (8, 16):
        raise ValueError(f"bits must be 8 or 16, got {bits}")
    if scheme == "tflite":
        if bits != 8:
            raise ValueError(f"scheme tflite has 8 bits, got {bits}")
        for name, value in (("granularity", granularity), ("rounding", rounding)):
            if value is not None:
                raise ValueError(f"{name} is for scheme qmn, got {value!r} with scheme tflite")
    if codebook is not None and codebook not in CODEBOOK_BITS:
        raise ValueError(f"codebook must be one of {CODEBOOK_BITS} bits, got {codebook}")
    if max_ram is not None and max_ram < 0:
        raise ValueError(f"max_ram must be 0 or more bytes, got {max_ram}")
