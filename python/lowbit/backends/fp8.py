"""Which backend serves FP8 and AdamW with FP8 states: the kernels of the CPU, those in CUDA and Triton, or plain torch.

A backend is a module with the functions of a protocol here. Tensors come checked, matrices with unit stride along K.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lowbit.backends import available, pytorch_fp8
from lowbit.backends.cpu import adamw as cpu_adamw
from lowbit.backends.cpu import fp8 as cpu
from lowbit.backends.cpu import fp8_matmul as cpu_matmul
from lowbit.backends.cuda import fp8_matmul as cuda_matmul
from lowbit.backends.triton import adamw as triton_adamw
from lowbit.backends.triton import fp8 as triton
from lowbit.backends.triton import fp8_matmul as triton_matmul
from lowbit.float8 import Granularity, Scaled
from lowbit.reference.adamw import State, Step

_logger = logging.getLogger("lowbit")


class Quantizer(Protocol):
    """What `reference.fp8` states, bit for bit."""

    def absmax(self, x: Tensor, granularity: Granularity) -> Tensor:
        """(R, K) in fp32, bf16 or fp16 to fp32 of scale_shape."""

    def quantize(
        self,
        x: Tensor,
        dtype: torch.dtype,
        granularity: Granularity,
        scale_dtype: torch.dtype,
        transposed: bool = False,
        seed: int | None = None,
        maxima: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """(R, K) to codes (R, K), scales, and codes (K, R) if `transposed`; `maxima` fp32 of scale_shape."""

    def dequantize(
        self, q: Tensor, scale: Tensor, granularity: Granularity, dtype: torch.dtype
    ) -> Tensor:
        """Codes (R, K) and scales, both contiguous, to (R, K) in `dtype`."""

    def cast(self, x: Tensor, dtype: torch.dtype, saturate: bool) -> Tensor:
        """Contiguous x to codes of its shape."""


class Product(Protocol):
    """Products of FP8 matrices, with sums in fp32."""

    def scaled_mm(self, a: Scaled, b: Scaled, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        """`reference.fp8.scaled_mm` rounded once to `dtype`: (M, K) and (N, K) to (M, N)."""

    def explain(self, a: Scaled, b: Scaled, quantized: bool) -> tuple[tuple[str, str | None], ...]:
        """Names of its kernels, and why each does not run; None for the one that does."""


class Optimizer(Protocol):
    """Steps of optimizers with FP8 states."""

    def adamw_(
        self, param: Tensor, grad: Tensor, exp_avg: State, exp_avg_sq: State, step: Step
    ) -> None:
        """`reference.adamw.adamw_` of contiguous tensors, in place."""


def quantizer(device: torch.device, size: int) -> Quantizer:
    """What quantizes and dequantizes `size` elements on a device; kernels take at least one."""
    if size == 0:
        return pytorch_fp8
    if device.type == "cpu":
        return cpu
    if available.has_triton():
        return triton
    _log_plain(device.type)
    return pytorch_fp8


class Choice(NamedTuple):
    """What computes a product, and the names of kernels that were passed over, each with the reason."""

    backend: Product
    others: tuple[tuple[str, str], ...]


def product(a: Scaled, b: Scaled) -> Choice:
    """What multiplies two matrices."""
    return choose_product(a.q.device, a.granularity, b.granularity, len(a.q))


def choose_product(device: torch.device, a: Granularity, b: Granularity, m: int) -> Choice:
    """What multiplies m rows of a with these scales on a device."""
    if device.type == "cpu":
        return Choice(cpu_matmul, ())
    obstacle = cuda_matmul.obstacle(device, a, b, m)
    if obstacle is None:
        return Choice(cuda_matmul, ())
    others = ((cuda_matmul.NAME, obstacle),)
    if available.has_triton():
        _log_triton(obstacle)
        return Choice(triton_matmul, others)
    _log_plain(device.type)
    return Choice(pytorch_fp8, (*others, (triton_matmul.NAME, "triton is not installed")))


def quantizing_product(
    a: Scaled, b: Scaled, granularity: str | None
) -> Callable[..., tuple[Tensor, Tensor]] | None:
    """`scaled_mm` that quantizes y by a granularity before it stores it: codes and scales; None if the backend of
    the product has none.
    """
    fuses = granularity == "1x16" and product(a, b).backend is triton_matmul
    return triton_matmul.scaled_mm_quantized if fuses else None


def optimizer(device: torch.device) -> Optimizer:
    """What runs a step on a device. ImportError comes from Triton's where triton is not installed."""
    return cpu_adamw if device.type == "cpu" else triton_adamw


@functools.cache
def _log_plain(device_type: str) -> None:
    _logger.warning(
        "plain torch computes FP8 ops on %s: triton, which has the kernels, is not installed",
        device_type,
    )


@functools.cache
def _log_triton(why: str) -> None:
    _logger.info("the Triton kernel computes FP8 products, not the CUDA kernel: %s", why)
