"""lowbit::conv: against the decoded weight by torch, bit for bit against products of patches, and in modes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import lowbit
from lowbit.layouts import to_kernel
from lowbit.ops.conv import conv
from lowbit.reference import patches, to_filters, to_rows
from lowbit.reference.convolution import Geometry

FORMATS = [
    "nf4",
    "int4_g32",
    "uint4_g16",
    "kmeans3_row",
    "kmeans4_pr",
    "int8_row",
    "ternary_row_fp32",
    "nf4_g64_dq8",
    "mxfp4",
    "int8_a8",
    "int4_g32_a8b32",
    "nf4_row_a8t",
]
WINDOWS = {
    "3x3": {"kernel_size": (3, 3), "padding": 1},
    "uneven": {
        "kernel_size": (2, 3),
        "padding": (0, 1, 2, 0),
        "stride": (2, 1),
        "dilation": (1, 2),
    },
    "1x1": {"kernel_size": (1, 1)},
    "1x1 strided": {"kernel_size": (1, 1), "stride": 3},
}
CHANNELS, FILTERS = 37, 70


def weight_of(format: str, window: dict[str, object], groups: int = 1) -> lowbit.QuantTensor:
    torch.manual_seed(0)
    kernel: tuple[int, int] = window["kernel_size"]  # type: ignore[assignment]
    return lowbit.quantize(to_rows(torch.randn(FILTERS, CHANNELS // groups, *kernel)), format)


def geometry_of(window: dict[str, object], groups: int = 1) -> Geometry:
    def pair(value: object) -> tuple[int, ...]:
        return value if isinstance(value, tuple) else (value, value)  # type: ignore[return-value]

    padding = pair(window.get("padding", 0))
    padding = padding if len(padding) == 4 else tuple(p for p in padding for _ in range(2))
    return Geometry(
        pair(window["kernel_size"]),
        pair(window.get("stride", 1)),
        padding,
        pair(window.get("dilation", 1)),
        groups,
    )


def inputs(dtype: torch.dtype, last: bool = True) -> Tensor:
    torch.manual_seed(1)
    x = torch.randn(3, CHANNELS, 9, 10).to(dtype)
    return x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("format", FORMATS)
def test_tiles_are_the_product_of_the_patches(format: str, window: str, dtype: torch.dtype) -> None:
    """The same kernel adds in the same order: not a bit differs."""
    qt, x, bias = weight_of(format, WINDOWS[window]), inputs(dtype), torch.randn(FILTERS)
    rows = patches(x, geometry_of(WINDOWS[window])).squeeze(-2)
    expected = lowbit.linear(rows, qt, bias).movedim(-1, 1)
    y = conv(x, qt, bias, **WINDOWS[window])
    assert torch.equal(y, expected)
    assert y.stride(1) == 1
    contiguous = conv(inputs(dtype, last=False), qt, bias, **WINDOWS[window])
    assert contiguous.is_contiguous()
    assert torch.equal(contiguous, expected)


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("format", ["nf4", "int8_a8"])
def test_threads_change_nothing(format: str, threads: int) -> None:
    qt, x = weight_of(format, WINDOWS["3x3"]), inputs(torch.float32)
    before = torch.get_num_threads()
    expected = conv(x, qt, **WINDOWS["3x3"])
    try:
        torch.set_num_threads(threads)
        assert torch.equal(conv(x, qt, **WINDOWS["3x3"]), expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("activation", [None, "relu", "silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("groups", [1, 37])
def test_activations_follow_in_fp32(groups: int, activation: str | None) -> None:
    window, x = WINDOWS["uneven"], inputs(torch.bfloat16)
    torch.manual_seed(0)
    filters = FILTERS if groups == 1 else 2 * groups
    qt = lowbit.quantize(torch.randn(filters, 6 * CHANNELS // groups), "nf4")
    bias = torch.randn(filters)
    y = conv(x, qt, bias, groups=groups, activation=activation, **window)
    weight = to_filters(qt.dequantize(), (2, 3)).double()
    dense = F.conv2d(
        F.pad(x.double(), (2, 0, 0, 1)), weight, bias.double(), (2, 1), 0, (1, 2), groups
    )
    expected = lowbit.reference.apply_epilogue(dense, activation, None, None)
    # One rounding to bf16.
    assert (y.double() - expected).abs().max() <= 2**-8 * expected.abs().max()


def test_canonical_layout_is_torch_with_the_decoded_weight() -> None:
    qt, x = weight_of("nf4", WINDOWS["3x3"]), inputs(torch.float32)
    w = to_kernel(qt, "canonical")
    y = conv(x, w.operands, **WINDOWS["3x3"])
    expected = F.conv2d(x, to_filters(qt.dequantize(), (3, 3)).contiguous(), padding=1)
    assert torch.equal(y, expected)
    torch.testing.assert_close(conv(x, qt, **WINDOWS["3x3"]), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("groups", [1, 37])
def test_infinities_and_nan_stay_where_they_are(groups: int) -> None:
    window, x = WINDOWS["3x3"], inputs(torch.float32)
    x[0, 5, 4, 4], x[1, 5, 4, 4] = float("nan"), float("inf")
    filters = FILTERS if groups == 1 else groups
    qt = lowbit.quantize(torch.randn(filters, 9 * CHANNELS // groups), "uint4_g16")
    y = conv(x, qt, groups=groups, **window)
    weight = to_filters(qt.dequantize(), (3, 3)).contiguous()
    expected = F.conv2d(x, weight, padding=1, groups=groups)
    assert torch.equal(y.isfinite(), expected.isfinite())
    assert y[2].isfinite().all()


# What torch itself does for derivatives of its convolution.
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_more_terms_and_transforms() -> None:
    window, x = WINDOWS["3x3"], inputs(torch.float32)
    weight = to_rows(torch.randn(FILTERS, CHANNELS, 3, 3))
    for format in ("nf4_o8", "nf4_r4"):
        qt = lowbit.quantize(weight, format)
        expected = F.conv2d(x, to_filters(qt.dequantize(), (3, 3)).contiguous(), padding=1)
        torch.testing.assert_close(conv(x, qt, **window), expected, rtol=1e-4, atol=1e-3)
    qt = lowbit.quantize(weight, "nf4")
    plain = conv(x, qt, **window)
    mapped = torch.func.vmap(lambda t: conv(t[None], qt, **window)[0])(x)
    torch.testing.assert_close(mapped, plain, rtol=1e-4, atol=1e-4)
    _, tangent = torch.func.jvp(lambda t: conv(t, qt, **window), (x,), (x,))
    torch.testing.assert_close(tangent, plain, rtol=1e-4, atol=1e-4)
    compiled = torch.compile(lambda t: conv(t, qt, **window), backend="eager")
    assert torch.equal(compiled(x), plain)


def test_wrong_arguments_are_named() -> None:
    qt, x = weight_of("nf4", WINDOWS["3x3"]), inputs(torch.float32)
    for match, changed in {
        r"stride must be 2 numbers of at least 1, got \(0, 0\)": {"stride": 0},
        "padding must have 2 or 4 numbers": {"padding": (1, 1, 1)},
        "groups must divide the 70 filters, got 3": {"groups": 3},
        "weight must have columns for each of the 4 taps": {"kernel_size": (2, 2)},
        "activation must be one of": {"activation": "tanh"},
        r"x must have shape \(B, 37, H, W\), got": {"x": x[:, :3]},
    }.items():
        given = {"x": x, "kernel_size": (3, 3), **changed}
        with pytest.raises(ValueError, match=match):
            conv(given.pop("x"), qt, **given)
    with pytest.raises(NotImplementedError, match="takes activations as they are"):
        conv(x, lowbit.quantize(torch.randn(74, 9), "int8_a8"), kernel_size=(3, 3), groups=37)
    with pytest.raises(ValueError, match=r"bias must have shape \(70,\)"):
        conv(x, qt, torch.zeros(3), kernel_size=(3, 3))
