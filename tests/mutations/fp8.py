"""FP8 in Python: what the numbers mean, checks, products, layers."""

from __future__ import annotations

from mutations import python

MUTANTS = [
    *python("float8.py", "fp8_cast", "fp8_quantize")(
        ('"e4m3", 448.0, 3, 7, 8, 0x7E, 464 + 2**-15', '"e4m3", 448.0, 3, 7, 8, 0x7E, 448 + 2**-15'),
        ('"e5m2", 57344.0, 2, 15, 15, 0x7B, 61440.0, 0x7C', '"e5m2", 57344.0, 2, 15, 15, 0x7B, 61440.0, 0x7F'),
        ("return 2.0 ** (1 - self.bias)", "return 2.0 ** -self.bias"),
        ("1 if self.columns is None else -(-k // self.columns))", "1 if self.columns is None else k // self.columns)"),
        ('Granularity("mx", 1, 32, (E8M0,))', 'Granularity("mx", 1, 16, (E8M0,))'),
        ("if scale.shape == g.scale_shape(rows, k):", "if scale.numel() == torch.Size(g.scale_shape(rows, k)).numel():"),
    ),
    *python("reference/fp8.py", "fp8_quantize", "fp8_cast")(
        ("(exponent - f.emax).clamp(min=0)", "(exponent - f.emax).clamp(min=1)"),
        ("return torch.where(scale == 0, 1, scale).to(scale_dtype)", "return scale.to(scale_dtype)"),
        ("+ 0xFFFF) & ~0xFFFF)", "+ 0x7FFF) & ~0xFFFF)"),
        ("uniform = noise >> (32 - dropped)", "uniform = noise >> (31 - dropped)"),
        ("(0, -k % block_k, 0, -rows % block_rows)", "(0, -rows % block_k, 0, -k % block_rows)"),
        ("h = (h ^ h >> 15) * 0x846CA68B", "h = (h ^ h >> 16) * 0x846CA68B"),
    ),
    *python("ops/fp8.py", "fp8_quantize")(
        ("maxima = maxima.amax() if maxima.numel()", "maxima = maxima.amin() if maxima.numel()"),
        ("if seed is not None and not 0 <= seed <= _MAX_SEED:", "if seed is not None and not 0 < seed <= _MAX_SEED:"),
        ("rows, maxima = rows_of(x, x.shape[-1]), contiguous(maxima)", "rows, maxima = x.reshape(-1, x.shape[-1]), contiguous(maxima)"),
    ),
    *python("ops/fp8_matmul.py", "fp8_matmul")(
        ("out_dtype or torch.bfloat16)", "out_dtype or torch.float32)"),
        ("return Scaled(rows_of(s.q, s.q.shape[1]), contiguous(s.scale), s.granularity)", "return Scaled(s.q, contiguous(s.scale), s.granularity)"),
    ),
    *python("nn/fp8.py", "fp8_nn")(
        ("by_row = _quantize(grad, _BACKWARD, values)", "by_row = _quantize(grad, _FORWARD, values)"),
        ("_Quantized(q_t, scale.t() if scale.dim() else scale)", "_Quantized(q_t, scale)"),
        ("key = (w.data_ptr(), w._version, w.dtype, w.device, self.granularity)", "key = (w.data_ptr(), w.dtype, w.device, self.granularity)"),
        ("if ctx.granularity == \"row\":", "if ctx.granularity == \"tensor\":"),
    ),
]  # fmt: skip
