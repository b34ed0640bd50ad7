"""int8 and binary activations, LLM.int8, in Python."""

from __future__ import annotations

from mutations import python

MUTANTS = [
    *python("reference/activations.py", "int8", "static_int8", "binary")(
        ("q = (x * (1 / scale)[:, None]).clamp(-127, 127)", "q = (x * (1 / scale)[:, None]).clamp(-128, 127)"),
        ("inverse = (top / absmax).clamp(max=torch.finfo(torch.float32).max)", "inverse = top / absmax"),
        ("return (x >= 0).to(torch.uint8), x.abs().mean(1)", "return (x > 0).to(torch.uint8), x.abs().mean(1)"),
        ("top = finite.abs().max() / 127\n", "top = finite.abs().max() / 128\n"),
        ("shift = zero * x.sum(1, dtype=torch.int32).float()[:, None]", "shift = zero * x.abs().sum(1, dtype=torch.int32).float()[:, None]"),
        ("factor = table_step if blocks", "factor = 1.0 if blocks"),
        ("g, b = columns.start // size, columns.start // block", "g, b = columns.start // size, columns.start // size"),
        ("(y * inverse).clamp(-128, 127).nan_to_num(0)", "(y * inverse).clamp(-127, 127).nan_to_num(0)"),
    ),
    *python("ops/int8.py", "requantize", "int8")(
        ("lost = (shift > 31) | (multiplier == 0)", "lost = (shift > 30) | (multiplier == 0)"),
        ("multiplier = (mantissa * 2**31 + 0.5).floor().long()", "multiplier = (mantissa * 2**31).floor().long()"),
        ("carry = multiplier == 2**31", "carry = multiplier == 2**30"),
        ("product = (left * multiplier + 2**30) >> 31", "product = (left * multiplier) >> 31"),
        ("- (product < 0).long(), 0)", "- (product > 0).long(), 0)"),
        (".clamp(bounds.min, bounds.max)", ""),
        ("x_scales.dim() == 2 and format.group is not None and format.group % CHUNK_K:", "x_scales.dim() == 2 and format.group is not None and format.group % 16:"),
    ),
    *python("ops/int8.py", "static_int8")(
        ("_quantize(rows, None, x_scale.expand(rows.shape[0]).contiguous())", "_quantize(rows, None, None)"),
    ),
    *python("ops/binary.py", "binary")(
        ("if bits.dim() != 2 or bits.shape[1] != -(-k // 8):", "if bits.dim() != 2 or bits.shape[1] < k // 8:"),
        ("bits, x_scales, bias = rows_of(bits, bits.shape[1]), contiguous(x_scales)", "bits, x_scales, bias = bits, contiguous(x_scales)"),
    ),
    *python("nn/binary.py", "binary", "nn", "qat")(
        ('w, self._parameters["bias"], x.dtype)', 'w, None, x.dtype)'),
    ),
    *python("nn/llm_int8.py", "llm_int8")(
        ("features = (absmax.to(weight.device) > threshold)", "features = (absmax.to(weight.device) >= 2 * threshold)"),
        ("return self.quantized(x.index_fill(-1, self.features, 0)) + large", "return self.quantized(x) + large"),
        ("large = (x.detach().abs() > self.threshold)", "large = (x.detach() > self.threshold)"),
    ),
]  # fmt: skip
