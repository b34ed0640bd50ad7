"""Integers of GPTQ, AWQ and compressed-tensors checkpoints in vLLM on CPUs, by lowbit's kernels.

vLLM reads, cuts and joins such a weight; its own kernels for CPUs need AVX-512, 4 bits, and sizes in multiples of 32.
Where it has AVX-512 its kernels come first: VLLM_DISABLED_KERNELS=CPUWNA16LinearKernel lets it choose these.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.kernels.linear import _POSSIBLE_KERNELS, register_linear_kernel
from vllm.model_executor.kernels.linear.mixed_precision import (
    MPLinearKernel,
    MPLinearLayerConfig,
)
from vllm.platforms import PlatformEnum, current_platform

from lowbit.integrations.served import Product
from lowbit.integrations.served_methods import HELD
from lowbit.io.readers.codes import weight_of_words
from lowbit.ops.checks import FLOAT_DTYPES

_BITS = (2, 3, 4, 5, 6, 7, 8)


class LowbitLinearKernel(MPLinearKernel):  # type: ignore[misc]
    """Products with unsigned integers of 2 to 8 bits, whose zero is the middle or stored, and a scale per group."""

    @classmethod
    def get_min_capability(cls) -> int:
        """None: it is for CPUs."""
        return -1

    @classmethod
    def can_implement(cls, c: MPLinearLayerConfig) -> tuple[bool, str | None]:
        """Whether lowbit has such a product; if not, why."""
        why = _obstacle(c)
        return why is None, why

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Packs the weight for the kernels of this CPU."""
        c, (words, scales, zeros) = self.config, self._get_weight_params(layer)
        k, n = c.partition_weight_shape
        weight = weight_of_words(
            _by_row(words, words.input_dim),
            _by_row(scales, 1 - scales.output_dim),
            _zeros(zeros) if c.zero_points else None,
            c.weight_type.size_bits,
            (n, k),
            k if c.group_size == -1 else c.group_size,
        )
        for name in (self.w_q_name, self.w_s_name, self.w_zp_name):
            if name is not None and getattr(layer, name, None) is not None:
                delattr(layer, name)
        setattr(layer, HELD, Product([weight], dtype=c.act_type))

    def apply_weights(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x W^T + bias."""
        made: Tensor = getattr(layer, HELD)(x, bias)
        return made


def _obstacle(c: MPLinearLayerConfig) -> str | None:
    kind = c.weight_type
    k, group = c.partition_weight_shape[0], c.group_size
    if not current_platform.is_cpu():
        return "lowbit's kernels for vLLM are those for CPUs"
    if not kind.is_integer() or kind.is_signed() or kind.size_bits not in _BITS:
        return f"the weight must be unsigned integers of {_BITS} bits, got {kind}"
    middle = 1 << kind.size_bits - 1
    if kind.bias not in (0, middle) or (c.zero_points and kind.bias):
        return f"codes must stand for themselves less a zero point, or less {middle}, got {kind}"
    if c.act_type not in FLOAT_DTYPES:
        return f"activations must be float32, bfloat16 or float16, got {c.act_type}"
    if group != -1 and k % group:
        return f"groups of {group} must divide the {k} in features of this process"
    return None


def _by_row(t: Tensor, along: int) -> Tensor:
    """A matrix that goes along K in dimension `along`, as rows of the weight."""
    values = t.data
    return (values if along == 1 else values.t()).contiguous()


def _zeros(words: Any) -> Tensor:
    """Words of zeros that go along N, as rows (groups, words)."""
    return _by_row(words, words.output_dim)


def enter() -> None:
    """Tells vLLM of the kernel; again changes nothing."""
    kernels = _POSSIBLE_KERNELS.setdefault(PlatformEnum.CPU, [])
    if any(kernel.__name__ == LowbitLinearKernel.__name__ for kernel in kernels):
        return
    register_linear_kernel(LowbitLinearKernel, PlatformEnum.CPU)
    if not torch.cpu._is_avx512_supported():
        # Before a kernel that takes the weight and then finds that this CPU has no instructions for it.
        kernels.insert(0, kernels.pop())
