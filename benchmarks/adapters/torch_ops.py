"""torch's own kernels, bitsandbytes and torchao: everything that is called as a torch op."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from adapters.base import Candidate, Unsupported, eager, group_of, num_copies, unsigned_groups


def dense(weight: Tensor, dtype: torch.dtype) -> Candidate:
    """F.linear on a dense weight."""
    w = weight.to(dtype)
    copies = [w.roll(i, 0) for i in range(num_copies(w.nbytes))]
    name = str(dtype).removeprefix("torch.")
    calls = [lambda x, w=w: F.linear(x, w) for w in copies]
    return eager(f"torch dense {name}", 8.0 * dtype.itemsize, name, w, calls, dtype)


def int4pack(weight: Tensor) -> Candidate:
    """aten._weight_int4pack_mm_for_cpu: asymmetric groups, bf16 scales and activations."""
    n, k = weight.shape
    if n % 16 or k % 2:
        raise Unsupported("N must be a multiple of 16")
    group = group_of(k)
    codes, scales, values = unsigned_groups(weight, 4, group)
    s = torch.from_numpy(scales).bfloat16()
    calls = []
    for i in range(num_copies(n * k // 2 + s.nbytes * 2)):
        c = torch.from_numpy(codes).roll(i, 0).int()
        w = torch.ops.aten._convert_weight_to_int4pack_for_cpu(c, 2)
        terms = torch.stack((s.roll(i, 0), torch.zeros_like(s)), -1).transpose(0, 1).contiguous()
        calls.append(
            lambda x, w=w, terms=terms: torch.ops.aten._weight_int4pack_mm_for_cpu(
                x, w, group, terms
            )
        )
    return eager(
        "torch int4pack",
        4 + 32 / group,
        "bfloat16",
        torch.from_numpy(values),
        calls,
        torch.bfloat16,
    )


def int8pack(weight: Tensor) -> Candidate:
    """aten._weight_int8pack_mm: a bf16 scale per row, bf16 activations."""
    k = weight.shape[1]
    codes, scales, values = unsigned_groups(weight, 8, k)
    q = (torch.from_numpy(codes).int() - 128).to(torch.int8)
    s = torch.from_numpy(scales[:, 0]).bfloat16()
    calls = []
    for i in range(num_copies(q.nbytes)):
        w, t = q.roll(i, 0).contiguous(), s.roll(i, 0).contiguous()
        calls.append(lambda x, w=w, t=t: torch.ops.aten._weight_int8pack_mm(x, w, t))
    return eager(
        "torch int8pack", 8 + 16 / k, "bfloat16", torch.from_numpy(values), calls, torch.bfloat16
    )


def int_mm(weight: Tensor) -> Candidate:
    """torch._int_mm with x quantized beforehand: the product alone, without quantizing x or y."""
    k = weight.shape[1]
    codes, scales, values = unsigned_groups(weight, 8, k)
    q = (torch.from_numpy(codes).int() - 128).to(torch.int8)
    s = torch.from_numpy(scales[:, 0])
    copies = [q.roll(i, 0).contiguous() for i in range(num_copies(q.nbytes))]
    sums: list[Tensor] = []
    scale_x = torch.ones(1)

    def prepare(x: Tensor):
        nonlocal scale_x
        scale_x = x.abs().amax(1, keepdim=True) / 127
        given = (x / scale_x).round().to(torch.int8)

        def run() -> None:
            with torch.inference_mode():
                sums[:] = [torch._int_mm(given, w.t()) for w in copies]

        return run

    def outputs() -> list[Tensor]:
        return [y * scale_x * s.roll(i, 0) for i, y in enumerate(sums)]

    return Candidate(
        "torch _int_mm",
        8 + 32 / k,
        "int8",
        torch.from_numpy(values),
        len(copies),
        prepare,
        outputs,
    )


def bitsandbytes_nf4(weight: Tensor) -> Candidate:
    """bitsandbytes NF4, blocks of 64, as its Linear4bit runs it on this CPU."""
    import bitsandbytes as bnb

    n, k = weight.shape
    if k % 64:
        raise Unsupported("K must be a multiple of the block of 64")
    calls = []
    values = None
    for i in range(num_copies(n * k * 9 // 16)):
        layer = bnb.nn.Linear4bit(
            k, n, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4", device="meta"
        )
        w = weight.roll(i, 0).bfloat16().contiguous()
        layer.weight = bnb.nn.Params4bit(
            w, requires_grad=False, quant_type="nf4", blocksize=64, compress_statistics=False
        ).to("cpu")
        if values is None:
            state = layer.weight.quant_state
            values = bnb.functional.dequantize_4bit(layer.weight.data, state).float().view(n, k)
        calls.append(layer.eval())
    assert values is not None
    return eager("bitsandbytes nf4", 4 + 32 / 64, "bfloat16", values, calls, torch.bfloat16)


def torchao_int4(weight: Tensor) -> Candidate:
    """torchao's int4 weight-only tensors on the CPU."""
    from torchao.prototype.quantization.int4.inference_workflow import PrototypeInt4WeightOnlyConfig
    from torchao.quantization import quantize_

    n, k = weight.shape
    if n % 16:
        raise Unsupported("N must be a multiple of 16")
    group = group_of(k)
    layers = []
    for i in range(num_copies(n * k // 2)):
        layer = torch.nn.Linear(k, n, bias=False, dtype=torch.bfloat16)
        with torch.no_grad():
            layer.weight.copy_(weight.roll(i, 0))
        config = PrototypeInt4WeightOnlyConfig(group_size=group)
        quantize_(layer, config)
        layers.append(layer)
    with torch.inference_mode():
        values = layers[0](torch.eye(k, dtype=torch.bfloat16)).T.float()
    return eager("torchao int4", 4 + 32 / group, "bfloat16", values, layers, torch.bfloat16)
