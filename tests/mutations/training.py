"""Training through quantizers, soft k-means, AdamW with FP8 states."""

from __future__ import annotations

from mutations import python

MUTANTS = [
    *python("qat/activations.py", "qat", "qat_quantizers")(
        ("inside = x * (x.detach() >= 0)", "inside = x * (x.detach() > 0)"),
        ("surrogate = torch.where(x < self.clip, inside, self.clip.to(x.dtype))", "surrogate = torch.where(x < self.clip, inside, self.clip.detach().to(x.dtype))"),
        ("levels = 2**self.bits - 1\n        with torch.no_grad():", "levels = 2**self.bits\n        with torch.no_grad():"),
        ("slope = scale * (x.abs() <= 1)", "slope = scale * (x.abs() < 1)"),
    ),
    *python("qat/learned_step.py", "qat_quantizers")(
        ("step = 2 * mean / math.sqrt(self._high)", "step = mean / math.sqrt(self._high)"),
        ("inside = (v > low) & (v < high)", "inside = (v > low) & (v <= high + 0.5)"),
        ("slope = quantized - torch.where(inside, v, 0.0)", "slope = quantized - v"),
        ("self._low = -(2 ** (bits - 1)) if signed else 0", "self._low = -(2 ** (bits - 1)) + 1 if signed else 0"),
        ("factor = 1 / math.sqrt(self._high * max(1, x[:1].numel()))", "factor = 1 / math.sqrt(self._high * max(1, x.numel()))"),
    ),
    *python("qat/few_levels.py", "qat_quantizers")(
        ("slope = 1 / n + alpha * (weight.detach().abs() <= 1)", "slope = alpha * (weight.detach().abs() <= 1)"),
        ("alpha * (weight.detach().abs() <= 1)", "alpha * (weight.detach().abs() < 1)"),
        ("torch.where(below, -self.wn, 0.0)", "torch.where(below, self.wn, 0.0)"),
        ("ratio = (_unit_tanh(weight) / 2 + 0.5) * levels", "ratio = (_unit_tanh(weight) / 2 + 0.5) * (levels + 1)"),
    ),
    *python("qat/soft_kmeans.py", "soft_kmeans")(
        ("solution, info = torch.linalg.solve_ex((eye - torch.stack(rows)).T, grad.flatten())", "solution, info = torch.linalg.solve_ex(eye - torch.stack(rows), grad.flatten())"),
        ("(2 * w @ c.T - c.square().sum(1)) / tau", "(w @ c.T - c.square().sum(1)) / tau"),
        ("return torch.where(mass > 0, moved, centers.detach())", "return moved"),
        ("how = solver if mode == \"implicit\" else None", "how = solver if mode != \"unrolled\" else None"),
    ),
    *python("reference/adamw.py", "fp8_adamw", "fp8_optimizer")(
        ("return FLOAT8[dtype].max ** 2 / 2", "return FLOAT8[dtype].max ** 2"),
        ("c = mx.sqrt() * mn.sqrt()", "c = mx.sqrt() * mx.sqrt()"),
        ("denominator = v.sqrt() / math.sqrt(1 - beta2**step) + eps", "denominator = (v.sqrt() + eps) / math.sqrt(1 - beta2**step)"),
        ("* (1 - lr * weight_decay)", "* (1 - weight_decay)"),
    ),
    *python("optim/adamw.py", "fp8_optimizer")(
        ('state["step"] += 1\n        ops', 'state["step"] += 0\n        ops'),
        ("        t.copy_(value)\n    return expected", "    return expected"),
    ),
]  # fmt: skip
