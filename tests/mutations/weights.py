"""Formats, packing, layouts, the reference and the ops of weights."""

from __future__ import annotations

from mutations import python

MUTANTS = [
    *python("formats.py", "formats")(
        ("return 1 if self.group is None else -(-k // self.group)", "return 1 if self.group is None else k // self.group"),
        ("offset = 2 ** (self.bits - 1) if self.zero is None else 0", "offset = 2 ** (self.bits - 1) - 1 if self.zero is None else 0"),
        ('lut(name="mxfp4", bits=4, group=32, scale="e8m0"', 'lut(name="mxfp4", bits=4, group=16, scale="e8m0"'),
    ),
    *python("codebooks/tables.py", "formats")(
        ("return float(step) if all(-128 <= v / step <= 127", "return float(step) if all(-128 <= v / step <= 128"),
        ('if base**d <= 256)', 'if base**d < 256 // 2)'),
    ),
    *python("packing.py", "packing", "io_bad_files")(
        ("words = words & low | words >> width - b * width // 8 & high", "words = words & high | words >> width - b * width // 8 & low"),
        ("elif format.num_codes < most and any(", "elif format.num_codes < most - 1 and any("),
    ),
    *python("weights/slices.py", "slices")(
        ("torch.full_like(values[:, :1], -0.0)", "torch.full_like(values[:, :1], 0.0)"),
        ("made[name] = t[:, first // old].contiguous()", "made[name] = t[:, (first - start) // old].contiguous()"),
        ("spare + k + k * used), 1)", "spare + k), 1)"),
        ('return format.table_scope in ("row", "group")', 'return format.table_scope == "row"'),
    ),
    *python("integrations/parts.py", "distributed")(
        ("bias if self.dim == 0 or self.rank == 0 else None", "bias"),
        ("inside = (indices >= self.start) & (indices < self.stop)", "inside = indices < self.stop"),
    ),
    *python("layouts/k16.py", "triton", "packing")(
        ("{3: (2, 1), 5: (4, 1), 6: (4, 2)}", "{3: (1, 2), 5: (4, 1), 6: (4, 2)}"),
        ("        low += p\n    return torch.cat(planes)", "        low += 1\n    return torch.cat(planes)"),
    ),
    *python("layouts/operands.py", "layouts", "packing")(
        ("return second[:-1], second[-1]", "return second[1:], second[0]"),
    ),
    *python("../../kernels/codecs.py", "triton")(
        ("code = (code ^ 32) - 32", "code = code ^ 32"),
        ("shift = bit % 8", "shift = bit % 4"),
        ("factor = tl.load(scales2 + flat // 256", "factor = tl.load(scales2 + flat // 255"),
    ),
    *python("layouts/lanes.py", "packing", "ops", "kernels", "gradients")(
        ("return (zeros.to(torch.int16) + 2 ** (format.bits - 1)).to(torch.uint8)", "return (zeros.to(torch.int16) + 2**format.bits).to(torch.uint8)"),
        ("return padded.view(-1, self.lanes, groups).transpose(1, 2)", "return padded.view(-1, groups, self.lanes)"),
    ),
    *python("layouts/base.py", "packing", "ops", "kernels", "gradients")(
        ('"dq8": torch.float32,\n}\n\n\nclass', '"dq8": torch.bfloat16,\n}\n\n\nclass'),
    ),
    *python("float8.py", "formats", "kernels", "ops")(
        ("code - E8M0_BIAS)", "code - E8M0_BIAS + 1)"),
    ),
    *python("reference/weights.py", "formats", "kernels", "ops", "layouts")(
        ('scale * values + zero if format.zero == "min" else scale * (values - zero)', 'scale * values + zero if format.zero == "min" else scale * (values + zero)'),
        ("return values * factor + offset", "return values * factor - offset"),
        ("groups) // DQ_BLOCK]", "groups) // (DQ_BLOCK + 1)]"),
        ("return terms[:, :, None].expand(-1, -1, format.group).flatten(1)[:, :k]", "return terms[:, None, :].expand(-1, format.group, -1).flatten(1)[:, :k]"),
    ),
    *python("float8.py", "formats", "kernels", "ops")(
        ("torch.ones_like(code, dtype=torch.float64), code - E8M0_BIAS)", "torch.ones_like(code, dtype=torch.float64), code - E8M0_BIAS + 1)"),
    ),
    *python("ops/gradients.py", "gradients")(
        ("grad = grad if f.zero == \"min\" or scales is None else -scales * grad", "grad = grad if f.zero == \"min\" or scales is None else scales * grad"),
        ("if zeros is not None and f.zero != \"min\":", "if zeros is not None and f.zero == \"min\":"),
    ),
    *python("ops/weights.py", "ops", "nn")(
        ("if low < 0 or high >= n:", "if low < 0 or high > n:"),
    ),
    *python("ops/weights.py", "outliers", "outliers_quantize")(
        ("decoded = _dequantize(*w, torch.float32)", "decoded = _dequantize(*w, dtype)"),
    ),
    *python("ops/linear.py", "outliers", "ops", "fused_ops", "gradients")(
        ("if added is None:\n        y = backend.linear", "if added is not x:\n        y = backend.linear"),
        ("added = sum_of_products(x, *others) if others else None\n    if modes", "added = None\n    if modes"),
    ),
    *python("ops/linear.py", "composite", "low_rank")(
        ("total = y if total is None else total + y", "total = y"),
        ("for factor in (term.right, term.left):", "for factor in (term.right,):"),
    ),
    *python("ops/lowrank.py", "low_rank")(
        ("grads[1] = (rows[0].t() @ (rows[1] @ right.float().t()))", "grads[1] = (rows[0].t() @ (rows[1] @ right.float().t())).neg()"),
        ("grads[2] = (inner.reshape(-1, inner.shape[-1]).t() @ rows[1])", "grads[2] = (inner.reshape(-1, inner.shape[-1]).t() @ rows[1].abs())"),
    ),
    *python("methods/caldera.py", "caldera")(
        ("if best is None or error < best[0] * (1 - 1e-9):", "if True:"),
        ("return self.moment - along @ along.T", "return self.moment"),
        ("right = torch.linalg.solve_triangular(loss.root, (v * s).T, upper=False, left=False)", "right = (v * s).T"),
        ("budget * n * k,\n", "1.1 * budget * n * k,\n"),
    ),
    *python("reference/hadamard.py", "hadamard")(
        ("bordered[1:, 0] = -1", "bordered[1:, 0] = 1"),
        ("torch.stack((a + b, a - b), -2)", "torch.stack((a + b, b - a), -2)"),
        ("(factor.t() if transposed else factor) @ y", "factor @ y"),
    ),
    *python("weights/pruned.py", "deep_compression")(
        ("longest = 2**index_bits", "longest = 2**index_bits - 1"),
        ("reached > shape[0] * shape[1]", "reached > shape[0] * shape[1] + 1"),
    ),
    *python("io/huffman.py", "deep_compression")(
        ("if total != 1 << _MOST:", "if total > 1 << _MOST:"),
        ("if -(-bits // 32) != len(words):", "if -(-bits // 32) > len(words):"),
    ),
    *python("ops/sparse.py", "outliers", "transforms", "composite")(
        ("grad_x = (grad @ dense(columns, values, ctx.k, grad.dtype)).to(ctx.dtype)", "grad_x = torch.zeros_like(grad @ dense(columns, values, ctx.k, grad.dtype)).to(ctx.dtype)"),
        ("return x.float() @ dense", "return -x.float() @ dense"),
    ),
    *python("ops/autograd.py", "gradients", "transforms", "outliers")(
        ("grad_added = grad.float()", "grad_added = 2 * grad.float()"),
        ("for tangent in tangents[_W.stop :]:", "for tangent in tangents[_W.stop + 1 :]:"),
    ),
    *python("ops/library.py", "fused_ops", "ops")(
        ("return function(*args[:at], gather(*given) if several else Operands(*given), *args[end:])", "return function(*args[:at], gather(*given)[::-1] if several else Operands(*given), *args[end:])"),
    ),
]  # fmt: skip
