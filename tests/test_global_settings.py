"""Global settings of torch change nothing: default dtype and device, deterministic algorithms, flushed denormals."""

from __future__ import annotations

import ast
import functools
import inspect
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _device

import lowbit
from lowbit import qat, reference
from lowbit.ptq import OBSERVERS, allocate, fisher_diagonal, output_fisher, plots, smooth
from lowbit.reference import fp8 as fp8_reference

PACKAGE = Path(lowbit.__file__).parent
# torch's own list of the functions that obey its default device, by dotted name below torch.
FACTORIES = {f.__name__.removeprefix("fft_") for f in _device._device_constructors()}


def missing_keywords(tree: ast.Module) -> Iterator[tuple[int, str, list[str]]]:
    """Calls of torch's factories, and of modules of torch.nn that have parameters, that leave dtype or device open."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        owner, name = ast.unparse(node.func.value), node.func.attr
        given = {keyword.arg for keyword in node.keywords}
        if owner in ("torch", "torch.fft", "torch.random"):
            asked = {"dtype", "device"} if name in FACTORIES else set()
        elif owner == "nn":
            known = inspect.signature(getattr(nn, name)).parameters
            asked = {"dtype", "device"} if "dtype" in known else set()
        else:
            asked = set()
        if asked - given:
            yield node.lineno, f"{owner}.{name}", sorted(asked - given)


def test_factories_say_dtype_and_device() -> None:
    found = [
        f"{path.relative_to(PACKAGE)}:{line}: {name} without {missing}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for line, name, missing in missing_keywords(ast.parse(path.read_text()))
    ]
    assert found == []


def test_the_walk_sees_what_it_looks_for() -> None:
    source = """
torch.zeros(3)
torch.ones((), dtype=torch.float32)
torch.tensor([1.0], device="cpu")
torch.arange(4, dtype=torch.int64, device=x.device)
torch.fft.rfftfreq(8)
nn.Linear(2, 3, device="meta")
nn.ReLU()
x.new_zeros(3)
"""
    names = [(name, missing) for _, name, missing in missing_keywords(ast.parse(source))]
    both = ["device", "dtype"]
    assert names == [
        ("torch.zeros", both),
        ("torch.ones", ["device"]),
        ("torch.tensor", ["dtype"]),
        ("torch.fft.rfftfreq", both),
        ("nn.Linear", ["dtype"]),
    ]


N, K, GROUP = 16, 64, 32
Work = Callable[[Tensor, Tensor], Any]  # of x (5, K) and w (N, K)
FP32: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}


def linear(w: Tensor) -> nn.Linear:
    made = nn.Linear(K, N, **FP32)
    made.weight.data.copy_(w)
    made.bias.data.copy_(w[:, 0])
    return made


def model(w: Tensor) -> nn.Sequential:
    return nn.Sequential(linear(w), nn.ReLU())


def on_model(change: Callable[[nn.Module, Tensor], object]) -> Work:
    def work(x: Tensor, w: Tensor) -> Tensor:
        made = model(w)
        change(made, x)
        return made(x)

    return work


def quantized(format: str, method: str | None = None, **options: Any) -> Work:
    return lambda x, w: lowbit.quantize(w, format, method, **options).tensors


def second_moment(x: Tensor) -> Tensor:
    return x.T @ x + torch.eye(K, **FP32)


def trained(optimizer: Callable[..., torch.optim.Optimizer], dtype: torch.dtype) -> Work:
    def work(x: Tensor, w: Tensor) -> Tensor:
        p = nn.Parameter(w.to(dtype, copy=True))
        steps = optimizer([p], lr=0.1)
        for _ in range(2):
            p.grad = w.to(dtype)
            steps.step()
        return p.detach()

    return work


def with_gradients(of: Callable[[Tensor, Tensor], Tensor]) -> Work:
    def work(x: Tensor, w: Tensor) -> list[Tensor | None]:
        x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
        y = of(x, w)
        return [y, *torch.autograd.grad(y.square().sum(), (x, w), allow_unused=True)]

    return work


def observed(name: str) -> Work:
    def work(x: Tensor, w: Tensor) -> list[Any]:
        observer = OBSERVERS[name]()
        for part in (x, 3 * x):
            observer.update(part)
        return [observer.grid(8, symmetric) for symmetric in (True, False)]

    return work


def state_dict_of(format: str) -> Work:
    def work(x: Tensor, w: Tensor) -> Tensor:
        made = lowbit.nn.QuantLinear.from_linear(linear(w), format)
        other = lowbit.nn.QuantLinear(K, N, format=format, **FP32)
        other.load_state_dict(made.state_dict())
        return other(x)

    return work


def fp8_training(granularity: str) -> Callable[[Tensor, Tensor], Tensor]:
    def of(x: Tensor, w: Tensor) -> Tensor:
        layer = lowbit.nn.FP8Linear.from_linear(linear(w.detach()), granularity)
        layer.weight.requires_grad_(False)
        return layer(x) + w.sum()

    return of


def quantized_aware(weight: Any, activation: Any = None) -> Work:
    def change(made: nn.Module, x: Tensor) -> None:
        qat.prepare(made, qat.Spec(weight, activation))
        made(x).square().sum().backward()
        qat.convert(made)

    return on_model(change)


def histogram(x: Tensor, w: Tensor) -> list[Tensor]:
    made = plots.histogram(w, lowbit.quantize(w, "nf4"))
    return [made.edges, made.density, made.values]


fitted = ("kmeans", "lloyd", "kde", "distq", "multibit", "nuuq")
WORK: dict[str, Work] = {
    **{
        f"quantize {f}": quantized(f)
        for f in (
            "int8_row",
            "int4",
            "uint4",
            "uint4_zfloat",
            "q4_1",
            "nf4",
            "nf4_g64_dq8",
            "mxfp4",
            "nvfp4",
            "e4m3",
            "kmeans3_pr",
            "binary",
            "ternary",
            "int3_g64_o4",
        )
    },
    **{f"quantize {m}": quantized("kmeans3_pr", m) for m in fitted if m != "nuuq"},
    **{
        f"lloyd {i}": quantized("kmeans3_pr", "lloyd", init=i)
        for i in ("forgy", "kmeans++", "linear", "density")
    },
    "nuuq": quantized("kmeans3", "nuuq"),
    "hqq": quantized("uint4_zfloat", "hqq"),
    "twn": quantized("ternary", "twn"),
    "bitnet": quantized("ternary", "bitnet"),
    "kmeans of outliers": quantized("kmeans3_o2"),
    **{
        f"rtn {c}": quantized("int4_row", clipping=c, granularity="tensor")
        for c in ("percentile", "mse", "kl")
    },
    "rtn stochastic": quantized("int4_row", rounding="stochastic"),
    **{
        f"gptq {f}": lambda x, w, f=f: (
            lowbit.quantize(w, f, "gptq", hessian=second_moment(x)).tensors
        )
        for f in ("int4_g32", "nf4", "kmeans3_pr")
    },
    **{
        f"product {f}": lambda x, w, f=f: lowbit.linear(x, lowbit.quantize(w, f))
        for f in (
            "nf4",
            "int4",
            "uint4",
            "mxfp4",
            "nvfp4",
            "kmeans3_pr",
            "int4_g32_a8",
            "nf4_a8t",
            "int3_g64_o4",
        )
    },
    "product in bf16": lambda x, w: lowbit.linear(x.bfloat16(), lowbit.quantize(w, "nf4")),
    "reference int8": lambda x, w: reference.linear(x, lowbit.quantize(w, "int4_g32_a8")),
    "reference nf4": lambda x, w: reference.linear(x, lowbit.quantize(w, "nf4")),
    "epilogue": lambda x, w: lowbit.linear(x, lowbit.quantize(w, "int4"), activation="silu"),
    "many": lambda x, w: lowbit.linear_many(x, [lowbit.quantize(w, "nf4")] * 2),
    "gradient": with_gradients(lambda x, w: lowbit.linear(x, lowbit.quantize(w.detach(), "nf4"))),
    "embedding": lambda x, w: lowbit.nn.QuantEmbedding.from_embedding(
        nn.Embedding(N, K, _weight=w), "int4"
    )(torch.arange(7, dtype=torch.int64, device="cpu")),
    "conv": lambda x, w: lowbit.nn.QuantConv2d.from_conv(nn.Conv2d(4, 5, 3, **FP32), "int4_row")(
        x[0].reshape(1, 4, 4, 4)
    ),
    **{f"state dict {f}": state_dict_of(f) for f in ("nf4", "int3_g64_o4", "nvfp4")},
    "model": on_model(lambda m, x: lowbit.quantize_model(m, "nf4", progress=False)),
    "model gptq": on_model(
        lambda m, x: lowbit.quantize_model(
            m, "int4_g32", method="gptq", calibration=[x], progress=False
        )
    ),
    "model kmeans": on_model(
        lambda m, x: lowbit.quantize_model(
            m, "kmeans3_pr", method="kmeans", calibration=[x], progress=False
        )
    ),
    **{
        f"model observer {o}": on_model(
            lambda m, x, o=o: lowbit.quantize_model(
                m, "int8_row_a8", observer=o, calibration=[x], progress=False
            )
        )
        for o in OBSERVERS
    },
    "llm_int8": on_model(
        lambda m, x: lowbit.quantize_llm_int8(m, calibration=[5 * x], progress=False)
    ),
    **{
        f"fp8 {g}": lambda x, w, g=g: lowbit.fp8.quantize(x, granularity=g)
        for g in ("tensor", "row", "1x128", "128x128", "1x16", "mx")
    },
    "fp8 stochastic": lambda x, w: lowbit.fp8.quantize(x, rounding="stochastic", seed=3),
    "fp8 reference noise": lambda x, w: fp8_reference.noise(5, 3, 4, torch.device("cpu")),
    "fp8 product": lambda x, w: lowbit.fp8.scaled_mm(
        *(t[0] for t in (lowbit.fp8.quantize(x), lowbit.fp8.quantize(w))),
        *(t[1] for t in (lowbit.fp8.quantize(x), lowbit.fp8.quantize(w))),
    ),
    **{f"FP8Linear {g}": with_gradients(fp8_training(g)) for g in ("tensor", "row", "128x128")},
    "fp8_silu": with_gradients(lambda x, w: lowbit.nn.fp8_silu(x)),
    "fp8_rms_norm": with_gradients(lambda x, w: lowbit.nn.fp8_rms_norm(x, (K,), w[0])),
    **{f"FP8AdamW {d}": trained(lowbit.optim.FP8AdamW, d) for d in (torch.float32, torch.bfloat16)},
    "FP8AdamW of a tensor lr": trained(
        lambda p, lr: lowbit.optim.FP8AdamW(p, lr=torch.full((), lr, **FP32)), torch.float32
    ),
    "binary": lambda x, w: lowbit.binary.linear(
        *lowbit.binary.quantize(x), lowbit.quantize(w, "binary_row")
    ),
    "dyadic": lambda x, w: [lowbit.int8.dyadic(0.3), lowbit.int8.dyadic(w.abs())],
    "qat int4": quantized_aware("int4_row_fp32"),
    "qat LSQ": quantized_aware(
        functools.partial(qat.LSQ, format="int4_row_fp32"), functools.partial(qat.LSQActivation, 4)
    ),
    "qat PACT": quantized_aware(qat.TTQ, functools.partial(qat.PACT, 4)),
    "qat BWN": quantized_aware(qat.BWN, qat.XNORActivation),
    "qat BitNet": quantized_aware(qat.BitNet, qat.Int8Activation),
    "qat soft k-means": quantized_aware(functools.partial(qat.SoftKMeans, bits=2)),
    **{f"observer {name}": observed(name) for name in OBSERVERS},
    "smooth": lambda x, w: [
        smooth.smooth_scales(x.abs().amax(0), [w]),
        smooth.awq_scales(x.abs().mean(0), second_moment(x), [w], "int4_g32"),
    ],
    "plots": histogram,
    "allocate": lambda x, w: (
        allocate(model(w), ("nf4", "int8"), 5.0, calibration=[x], progress=False).frontier
    ),
    "fisher": lambda x, w: [
        output_fisher(model(w), ["0"], [x])["0"].inputs,
        fisher_diagonal(model(w), [x], ["0"], loss=lambda y, _: y.square().mean()),
    ],
}


def flat(value: Any) -> list[Any]:
    """Tensors and plain values of a result, in order."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [leaf for item in value for leaf in flat(item)]
    return [value.detach() if isinstance(value, Tensor) else value]


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if a.dtype != b.dtype or a.shape != b.shape or a.device != b.device:
            return False
        a, b = (t.contiguous().flatten().view(torch.uint8) for t in (a, b))
        return torch.equal(a, b)
    return bool(a == b)


@functools.cache
def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator("cpu").manual_seed(5)
    x, w = (torch.randn(n, K, generator=generator, **FP32) for n in (5, N))
    return x, w


@functools.cache
def expected(name: str) -> list[Any]:
    torch.manual_seed(0)
    return flat(WORK[name](*(t.clone() for t in inputs())))


# What sets a global setting, and what undoes it. "meta" stands in for any device that is not that of the operands.
SETTINGS: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
    "bfloat16": (
        lambda: torch.set_default_dtype(torch.bfloat16),
        lambda: torch.set_default_dtype(torch.float32),
    ),
    "float64": (
        lambda: torch.set_default_dtype(torch.float64),
        lambda: torch.set_default_dtype(torch.float32),
    ),
    "meta": (lambda: torch.set_default_device("meta"), lambda: torch.set_default_device(None)),
    "deterministic, denormals flushed": (
        lambda: (torch.use_deterministic_algorithms(True), torch.set_flush_denormal(True)),
        lambda: (torch.use_deterministic_algorithms(False), torch.set_flush_denormal(False)),
    ),
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", WORK)
def test_results_do_not_depend_on(setting: str, name: str) -> None:
    x, w = (t.clone() for t in inputs())
    before = expected(name)
    reference.weights.dynamic_values.cache_clear()
    torch.manual_seed(0)
    change, undo = SETTINGS[setting]
    change()
    try:
        after = flat(WORK[name](x, w))
    finally:
        undo()
    assert len(after) == len(before)
    assert [i for i, pair in enumerate(zip(after, before, strict=True)) if not same(*pair)] == []


def test_dynamic_map_is_that_of_bitsandbytes() -> None:
    """Dettmers' map, stated once more in float64: seven decades, decade i with 2^i means."""
    values = [0.0, 1.0]
    for i in range(7):
        edges = [0.1 + 0.9 * j / 2**i for j in range(2**i + 1)]
        values += [
            s * 10.0 ** (i - 6) * (a + b) / 2 for a, b in itertools.pairwise(edges) for s in (1, -1)
        ]
    reference.weights.dynamic_values.cache_clear()
    torch.set_default_dtype(torch.bfloat16)
    try:
        made = reference.dynamic_map()
    finally:
        torch.set_default_dtype(torch.float32)
    assert made.dtype == torch.float32
    torch.testing.assert_close(
        made.double(), torch.tensor(sorted(values), dtype=torch.float64), rtol=1e-6, atol=0
    )


def test_a_first_use_under_inference_mode_leaves_nothing_behind() -> None:
    reference.weights.dynamic_values.cache_clear()
    with torch.inference_mode():
        reference.dynamic_map()
    assert not reference.dynamic_map().is_inference()
