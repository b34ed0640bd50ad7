"""The glue of the CUDA kernels with a launch that only looks at what it is given: CPU tensors stand for a GPU's."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import lowbit
from lowbit import float8, layouts, reference
from lowbit.backends import available
from lowbit.backends.cuda import CUDA
from lowbit.backends.cuda import fp8_matmul as matmul_cuda
from lowbit.backends.cuda import weights as backend
from lowbit.formats import FORMATS, parse
from lowbit.layouts import M16, m16
from weights import random_weight


class Launch:
    """Stands for `lowbit._cuda.Weight`: keeps the arguments, checks x and writes zeros."""

    num_groups = 3

    def __init__(self, family: str, splits: int, float_zero: bool, x: torch.Tensor) -> None:
        self.family, self.splits, self.float_zero, self.x = family, splits, float_zero, x
        self.given: dict[str, Any] = {}

    def choose(
        self, m: int, architecture: int, code: int, sms: int
    ) -> tuple[str, int, int, int, int, int, bool]:
        return self.family, 1, self.splits, 1, 0, 4, True

    def linear(self, device: int, stream: int, config: Any, type: str, m: int, x: int, x_stride: int, codes: int,
               scales: int, zeros: int, table: int, x_sums: int, bias: int, bias_type: str, out: int, out_type: str,
               parts: int) -> None:  # fmt: skip
        self.given = {k: v for k, v in locals().items() if k != "self"}
        assert x % 16 == 0
        assert m == 1 or (x_stride % 8 == 0 and x_stride >= self.x.shape[1])
        size = self.x.element_size()
        for row in range(m):
            columns = self.x.shape[1]
            got = ctypes.string_at(x + row * x_stride * size, -(-columns // 64) * 64 * size)
            assert (
                got[: columns * size]
                == self.x[row].contiguous().view(torch.uint8).numpy().tobytes()
            )
            assert not any(got[columns * size :])


@pytest.fixture(autouse=True)
def _device(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = type("Stream", (), {"cuda_stream": 7})()
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: stream)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(available, "_PROBED", {0: (None, 90)})


def launch(
    monkeypatch: pytest.MonkeyPatch, name: str, x: torch.Tensor, family: str = "mma", splits: int = 1, **kwargs: Any
) -> tuple[Launch, torch.Tensor]:  # fmt: skip
    qt = random_weight(parse(name), 40, x.shape[1])
    w = layouts.to_operands(qt, M16)
    fake = Launch(family, splits, w.format.zero in ("float", "min"), x)
    monkeypatch.setattr(backend, "weight", lambda *_: fake)
    y = CUDA.linear(x, w, kwargs.pop("bias", None), **kwargs)
    return fake, y


BASE = torch.randn(9, 200)


@pytest.mark.parametrize(
    "x",
    (
        BASE[:5, :64],
        BASE[:, :70],
        BASE[:1, :70],
        BASE[:, 1:65],
        BASE.t()[:64, :8].t(),
        BASE[::2, :64],
        BASE[:1, :64].expand(5, 64),
        BASE.flatten().unfold(0, 64, 8)[:9],
        BASE[:1, :70].expand(5, 70),
    ),
    ids=(
        "rows",
        "odd k",
        "one row",
        "misaligned",
        "transposed",
        "every other row",
        "one row for all",
        "overlapping rows",
        "one row for all, odd k",
    ),
)
def test_x_is_what_the_kernels_can_read(x: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        typed = BASE.to(dtype).as_strided(x.shape, x.stride(), x.storage_offset())
        fake, y = launch(monkeypatch, "nf4", typed)
        assert (y.shape, y.dtype) == ((x.shape[0], 40), dtype)
        name = "bf16" if dtype == torch.bfloat16 else "fp16"
        assert fake.given["type"] == fake.given["out_type"] == name
        assert fake.given["stream"] == 7
        assert not fake.given["parts"]
        assert not fake.given["x_sums"]


def test_workspaces_are_there_where_they_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(4, 96, dtype=torch.bfloat16)
    bias = torch.randn(40, dtype=torch.float16)
    fake, y = launch(monkeypatch, "q4_1", x, splits=3, bias=bias, dtype=torch.float32)
    assert fake.given["parts"] and fake.given["x_sums"]  # noqa: PT018
    assert (fake.given["bias"], fake.given["bias_type"]) == (bias.data_ptr(), "fp16")
    assert y.dtype == torch.float32
    assert fake.given["out_type"] == "fp32"


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_a_decoded_copy_multiplies_where_no_kernel_does(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(6, 96, dtype=dtype)
    qt = random_weight(FORMATS["nf4"], 40, 96)
    monkeypatch.setattr(CUDA, "rows", lambda *args: reference.dequantize(qt, args[-1]))
    fake, y = launch(monkeypatch, "nf4", x, "mma" if dtype == torch.float32 else "decode")
    assert not fake.given
    exact = x.double() @ reference.dequantize(qt).double().T
    # bf16: the weight and y round by 2^-9 each (0.2 % rms at most).
    assert float((y.double() - exact).norm() / exact.norm()) <= (
        1e-6 if dtype == torch.float32 else 0.004
    )


def rows_of_operands(indices: None, w: layouts.Operands, dtype: torch.dtype) -> torch.Tensor:
    """What the kernel decodes."""
    layout = layouts.find(M16)
    for name, (shape, _) in layout.specs(w.format, w.n, w.k).items():
        t = getattr(w, name)
        assert tuple(t.shape) == shape, name
        assert t.is_contiguous()
        assert t.data_ptr() % 16 == 0
    assert w.table is not None
    values = w.table[m16.unpack_fragments(w.codes, w.format.bits, w.n, w.k).long()]
    scales, zeros = (
        None if t is None else layout.to_rows(t, w.n).float() for t in (w.scales, w.zeros)
    )
    return reference.apply_scales(values, w.format, scales, zeros).to(dtype)


@pytest.mark.parametrize("with_bias", (False, True))
@pytest.mark.parametrize("x_dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("name", ("nf4", "uint3_g32", "q4_1", "int8_row"))
def test_a_large_weight_is_decoded_in_slices(
    name: str, x_dtype: torch.dtype, with_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    n, k = 300, 96
    qt = random_weight(parse(name), n, k)
    w = layouts.to_operands(qt, M16)
    x = torch.randn(5, k).to(x_dtype)
    bias = torch.randn(n) if with_bias else None
    fake = Launch("decode", 1, False, x)
    monkeypatch.setattr(backend, "weight", lambda *_: fake)
    given: list[int] = []

    def rows(indices: None, w: layouts.Operands, dtype: torch.dtype) -> torch.Tensor:
        given.append(w.n)
        return rows_of_operands(indices, w, dtype)

    monkeypatch.setattr(CUDA, "rows", rows)
    whole = CUDA.linear(x, w, bias, torch.float32)
    assert given == [n]
    monkeypatch.setattr(backend, "_DECODED_ROWS", 32)
    monkeypatch.setattr(backend, "_DECODED_BYTES", n * k * x_dtype.itemsize // 3)
    given.clear()
    sliced = CUDA.linear(x, w, bias, torch.float32)
    assert given == [128, 128, 44]
    same_dtype = CUDA.linear(x, w, bias)
    assert same_dtype.dtype == x_dtype
    decoded = qt.dequantize().to(x_dtype).double()
    exact = x.double() @ decoded.T
    if bias is not None:
        exact += bias.to(x_dtype).double()
    tolerance = 1e-6 if x_dtype == torch.float32 else 0.004  # y of torch's product in bf16
    for y in (whole, sliced, same_dtype):
        assert float((y.double() - exact).norm() / exact.norm()) <= tolerance


def test_slices_bound_what_is_decoded() -> None:
    for n, k, dtype in (
        (128256, 4096, torch.bfloat16),
        (28672, 8192, torch.float32),
        (100, 64, torch.float16),
    ):
        parts = backend.slices(n, k, dtype)
        assert [p.start for p in parts] == [0, *(p.stop for p in parts[:-1])]
        assert parts[-1].stop == n
        assert all(p.start % 256 == 0 for p in parts)
        most = max((p.stop - p.start) * k * dtype.itemsize for p in parts)
        assert most <= (1 << 28) + 256 * k * dtype.itemsize
    assert backend.slices(8192, 8192, torch.float32) == [slice(0, 8192)]


def test_no_rows_need_no_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    fake, y = launch(monkeypatch, "nf4", torch.randn(0, 96, dtype=torch.bfloat16))
    assert y.shape == (0, 40)
    assert not fake.given


def test_int8_activations_take_canonical_operands() -> None:
    qt = random_weight(parse("uint4_g32_a8"), 40, 96)
    w = layouts.to_operands(qt, M16)
    x = torch.randn(3, 96)
    y = CUDA.linear(x, w, None)
    assert torch.equal(y, lowbit.linear(x, layouts.to_operands(qt, layouts.CANONICAL)))


@pytest.mark.parametrize("k", (96, 100))
@pytest.mark.parametrize("granularity", ("tensor", "row", "1x128", "128x128"))
def test_fp8_operands_are_what_the_kernel_can_read(
    granularity: str, k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {}

    def fp8_scaled_mm(
        device: int, stream: int, a: Any, b: Any, m: int, n: int, k: int, *rest: Any
    ) -> None:
        for name, (pointer, stride, e5m2, scales, kind), rows, want in (
            ("a", a, m, qa),
            ("b", b, n, qb),
        ):
            assert (pointer % 16, stride % 16, kind) == (0, 0, granularity), name
            assert e5m2 == (want[0].dtype == torch.float8_e5m2)
            for row in range(rows):
                got = ctypes.string_at(pointer + row * stride, k)
                assert got == bytes(want[0][row].view(torch.uint8).tolist())
            got = ctypes.string_at(scales, want[1].numel() * 4)
            assert got == want[1].numpy().tobytes()
        given["rest"] = rest

    x = torch.randn(7, k)
    qa = lowbit.fp8.quantize(x, granularity=granularity)
    qb = lowbit.fp8.quantize(torch.randn(9, k), torch.float8_e5m2, granularity)
    monkeypatch.setitem(sys.modules, "lowbit._cuda", SimpleNamespace(fp8_scaled_mm=fp8_scaled_mm))
    monkeypatch.setattr(lowbit, "_cuda", sys.modules["lowbit._cuda"], raising=False)
    g = float8.find_granularity(granularity)
    y = matmul_cuda.scaled_mm(float8.Scaled(*qa, g), float8.Scaled(*qb, g), None, torch.float16)
    assert (y.shape, y.dtype) == ((7, 9), torch.float16)
    assert given["rest"] == (0, "fp32", y.data_ptr(), "fp16")


def test_overlapping_fp8_rows_are_copied() -> None:
    base = torch.randn(400).to(torch.float8_e4m3fn)
    bits = base.view(torch.uint8)
    one, overlapping = bits[:64].expand(5, 64), bits.unfold(0, 64, 16)[:7]
    for t in (one, overlapping, one[:1], bits[:70].expand(3, 70)):
        made = matmul_cuda._aligned(t.view(torch.float8_e4m3fn))
        assert torch.equal(made.view(torch.uint8), t)
        assert made.stride(0) >= t.shape[1]
        assert made.stride(0) % 16 == made.data_ptr() % 16 == 0
    apart = bits[:384].view(6, 64).view(torch.float8_e4m3fn)
    assert matmul_cuda._aligned(apart) is apart
