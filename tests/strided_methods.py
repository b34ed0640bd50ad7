"""Cases of `test_strides.py`: every method of quantization, and what writes tensors to files."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from strided import Case, case
from strided_products import random_weight
from torch import Tensor

import lowbit
from lowbit.formats import Format, parse
from lowbit.io import compressed, imatrix
from lowbit.io.save_load import load_tensors
from lowbit.weights.pruned import PrunedTensor
from lowbit.weights.quantized import QuantTensor

N, K = 6, 64
PRUNED = Format.lut(bits=3, group=None, scale=None)

# Methods with the formats that take different ways, and what each is given beside the weight.
METHODS: dict[str, tuple[tuple[str | Format, ...], tuple[str, ...]]] = {
    "rtn": (
        ("int4", "uint4_zfloat", "nf4_g64_dq8", "int3_g64_o2", "mxfp4", "nvfp4", "q4_k", "binary"),
        (),
    ),
    "kmeans": (("kmeans3", "kmeans3_pr"), ("weights",)),
    "lloyd": (("kmeans3",), ("weights",)),
    "search": (("km4", "km3x2", "int4_g32"), ("weights",)),
    "gptq": (("km4", "int3_g32"), ("hessian",)),
    "caldera": (("int2_g24_r3",), ("hessian",)),
    "vq": (("vq4_d2",), ("hessian",)),
    "lattice": (("e8p",), ("hessian",)),
    "trellis": (("trellis2",), ("hessian",)),
    "prune": ((PRUNED,), ("weights",)),
    "hqq": (("uint4_zfloat",), ()),
    "kde": (("kmeans3_row",), ()),
    "distq": (("kmeans3_row",), ()),
    "nuuq": (("kmeans3_row",), ()),
    "multibit": (("kmeans3_row",), ("weights",)),
    "twn": (("ternary",), ()),
    "bitnet": (("ternary",), ()),
}
assert set(METHODS) == set(lowbit.methods.METHODS)

for method, (formats, others) in [*METHODS.items(), ("vq", (("vq4_d4",), ("weights",)))]:
    for format in formats:

        @case(f"{method} {format if isinstance(format, str) else format.name}")
        def _(
            m: int,
            method: str = method,
            format: str | Format = format,
            others: tuple[str, ...] = others,
        ) -> Case:
            def call(weight: Tensor, **given: Tensor) -> Any:
                h = given.get("hessian")
                if h is not None and not torch.equal(h, h.t()):  # of repeated rows: not positive
                    given["hessian"] = torch.eye(K)
                return list(lowbit.quantize(weight, format, method, **given).tensors.values())

            x = torch.randn(200, K)
            known = {"weights": torch.rand(N, K) + 0.5, "hessian": x.t() @ x}
            return Case(
                call, {"weight": torch.randn(N, K), **{name: known[name] for name in others}}
            )


def written(save: Callable[[Path], Any], load: Callable[[Path], Any]) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "written.safetensors"
        save(path)
        return load(path)


for name in ("nf4", "uint4_zfloat", "nf4_g64_dq8", "mxfp4", "int3_g64_o2", "int2_g24_r3"):

    @case(f"saved {name}")
    def _(m: int, name: str = name) -> Case:
        qt = random_weight(parse(name), N, K)

        def call(**tensors: Tensor) -> Any:
            given = QuantTensor(qt.format, qt.shape, {**qt.tensors, **tensors})
            back = written(lambda path: lowbit.save({"w": given}, path), load_tensors)["w"]
            return [*back.tensors.values()]

        given = {key: t for key, t in qt.tensors.items() if key != "outlier_columns"}
        return Case(call, given)


@case("saved tensors")
def _(m: int) -> Case:
    given = {
        f"t{i}": torch.randn(m, 3, 4).to(d) for i, d in enumerate((torch.float32, torch.bfloat16))
    }
    given["ids"], given["one"] = torch.arange(m), torch.tensor(3.0)

    def call(**tensors: Tensor) -> Any:
        return [*written(lambda path: lowbit.save(tensors, path), load_tensors).values()]

    return Case(call, given, ("t0", "t1", "ids"))


@case("saved pruned weights")
def _(m: int) -> Case:
    qt = lowbit.quantize(torch.randn(N, K), PRUNED, "prune", density=0.2)

    def call(codes: Tensor, table: Tensor, bias: Tensor) -> Any:
        given = QuantTensor(qt.format, qt.shape, {"codes": codes, "table": table})
        pruned = PrunedTensor.of(given)
        tensors = {"w": pruned, "bias": bias}
        back = written(lambda p: compressed.save_pruned(p, tensors), compressed.load_pruned)
        return [back["w"].dequantize(), back["bias"], pruned.dequantize()]

    return Case(call, {**qt.tensors, "bias": torch.randn(N)})


@case("saved importance")
def _(m: int) -> Case:
    def call(sums: Tensor, counts: Tensor) -> Any:
        entry = imatrix.Entry(sums, counts, "w")
        back = written(lambda p: imatrix.write(p, imatrix.Imatrix({"w": entry})), imatrix.read)
        return [back.entries["w"].sums, back.entries["w"].counts]

    return Case(call, {"sums": torch.rand(m, K), "counts": torch.rand(m) + 1})
