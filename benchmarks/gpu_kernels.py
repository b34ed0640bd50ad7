"""The products that gpu.py checks and times: ours, those of torch and of other libraries, each with copies of its
weight.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import lowbit
from lowbit import layouts
from lowbit.formats import Format, as_format

FAMILIES = {"triton": layouts.K16, "cuda": layouts.M16}
ROTATED_BYTES = 180 << 20  # more than three times the largest L2 cache
# Relative Frobenius error: bf16 table entries, x and y each round by at most 2^-8 (0.2 % rms).
TOLERANCE = 0.01


@dataclass
class Kernel:
    """One kernel with its rotating weights.

    Attributes:
        name: library and format.
        nbytes: of one weight, scales included.
        weight: (N, K), the values that it stands for.
        calls: x to y, one for each copy in memory of its own.
    """

    name: str
    nbytes: int
    weight: Tensor
    calls: list[Callable[[Tensor], Tensor]]


def num_copies(nbytes: int) -> int:
    """Copies of a weight that do not fit in a cache together."""
    return 1 + ROTATED_BYTES // nbytes


def ours(weight: Tensor, name: str, family: str) -> Kernel:
    """The kernels of a family in a named format; fitted codebooks get random values, which take no time to find."""
    format = as_format(name)
    if format.fitted:
        table = torch.randn(2**format.bits, generator=torch.Generator().manual_seed(0)).sort()[0]
        format = Format.lut(bits=format.bits, table=table, group=format.group, name=name)
    qt = lowbit.quantize(weight, format)
    nbytes = sum(t.nbytes for t in qt.tensors.values())
    first = layouts.to_kernel(qt, FAMILIES[family])
    copies = [first.map(torch.Tensor.clone) for _ in range(num_copies(nbytes))]
    return Kernel(
        f"{family} {name}",
        nbytes,
        qt.dequantize(),
        [lambda x, w=w: lowbit.linear(x, w) for w in copies],
    )


def dense(weight: Tensor) -> Kernel:
    """torch's linear on a bf16 weight."""
    w = weight.bfloat16()
    copies = [w.clone() for _ in range(num_copies(w.nbytes))]
    return Kernel(
        "torch dense bf16", w.nbytes, w.float(), [lambda x, w=w: F.linear(x, w) for w in copies]
    )


def int4pack(weight: Tensor) -> Kernel:
    """aten._weight_int4pack_mm with groups of 128."""
    n, k = weight.shape
    groups = weight.view(n, -1, 128)
    scales = (groups.abs().amax(-1) / 7).bfloat16()
    codes = (groups / scales.float()[..., None]).round().clamp(-8, 7) + 8
    terms = torch.stack((scales, torch.zeros_like(scales)), -1).transpose(0, 1).contiguous()
    pairs = codes.view(n, k // 2, 2).to(torch.uint8)
    nbytes = n * k // 2 + terms.nbytes
    packed = torch.ops.aten._convert_weight_to_int4pack(pairs[..., 0] << 4 | pairs[..., 1], 8)
    calls = []
    for _ in range(num_copies(nbytes)):
        w, s = packed.clone(), terms.clone()
        calls.append(lambda x, w=w, s=s: torch.ops.aten._weight_int4pack_mm(x, w, 128, s))
    values = ((codes - 8) * scales.float()[..., None]).view(n, k)
    return Kernel("torch int4pack", nbytes, values, calls)


def bitsandbytes(weight: Tensor) -> Kernel:
    """bitsandbytes NF4 in blocks of 64."""
    import bitsandbytes as bnb

    n, k = weight.shape
    nbytes = n * k // 2 + n * k // 64 * 4
    packed, state = bnb.functional.quantize_4bit(weight.bfloat16(), blocksize=64, quant_type="nf4")
    values = bnb.functional.dequantize_4bit(packed, state).float()
    copies = [(packed.clone(), copy.deepcopy(state)) for _ in range(num_copies(nbytes))]
    return Kernel(
        "bitsandbytes nf4",
        nbytes,
        values,
        [lambda x, w=w, state=state: bnb.matmul_4bit(x, w.t(), state) for w, state in copies],
    )


def torchao_int4(weight: Tensor) -> Kernel:
    """torchao's int4 weight-only linear, tiles packed, groups of 128."""
    from torchao.quantization import Int4WeightOnlyConfig, quantize_

    n, k = weight.shape
    config = Int4WeightOnlyConfig(group_size=128, int4_packing_format="tile_packed_to_4d")
    nbytes = n * k // 2 + n * k // 128 * 4
    layer = torch.nn.Linear(k, n, bias=False, device="cuda", dtype=torch.bfloat16)
    layer.weight.data.copy_(weight)
    quantize_(layer.requires_grad_(False), config)
    layers = [copy.deepcopy(layer) for _ in range(num_copies(nbytes))]
    return Kernel("torchao int4", nbytes, values_of(layer, k), layers)


def humming_int4(weight: Tensor) -> Kernel:
    """humming's int4 linear, groups of 128."""
    from humming.layer import HummingLayer

    n, k = weight.shape
    nbytes = n * k // 2 + n * k // 128 * 2
    layers = []
    for _ in range(num_copies(nbytes)):
        layer = HummingLayer(
            shape_n=n,
            shape_k=k,
            weight_config={"dtype": "int4", "weight_scale_group_size": 128},
            torch_dtype=torch.bfloat16,
        ).cuda()
        layer.load_from_unquantized(weight.bfloat16())
        layer.transform()
        layers.append(layer)
    return Kernel("humming int4", nbytes, values_of(layers[0], k), layers)


def values_of(call: Callable[[Tensor], Tensor], k: int) -> Tensor:
    """The weight that a linear computes with: what the identity returns."""
    return call(torch.eye(k, device="cuda", dtype=torch.bfloat16)).T.float()


PEERS: dict[str, Callable[[Tensor], Kernel]] = {
    f.__name__: f for f in (dense, int4pack, bitsandbytes, torchao_int4, humming_int4)
}


def error(kernel: Kernel, x: Tensor) -> float:
    """Larger relative error of the first and the last copy against float64."""
    exact = x.double() @ kernel.weight.double().T
    ends = (kernel.calls[0], kernel.calls[-1])
    return max(float((call(x).double() - exact).norm() / exact.norm()) for call in ends)
