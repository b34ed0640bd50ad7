"""Methods that take weights to codes, observers, SmoothQuant and AWQ, and the choice of bits."""

from __future__ import annotations

from mutations import cpp, python

MUTANTS = [
    *python("methods/scales.py", "quantize", "rtn_options")(
        ("store_scales(qt, (high - low) / (2**format.bits - 1))", "store_scales(qt, (high - low) / 2**format.bits)"),
        ('"balanced": 0.5, "full": 0.0, "restricted": 1.0', '"balanced": 0.5, "full": 1.0, "restricted": 0.0'),
        ("power = torch.where(mantissa == 0.5, power, exponent)", "power = torch.where(mantissa > 0.5, power, exponent)"),
        ("zero = torch.where(scale == 0, 0.0, -end / scale)", "zero = torch.where(scale == 0, 0.0, end / scale)"),
        ("end = torch.where(scale < 0, high, low)", "end = low"),
        ("mantissa < math.sqrt(0.5)", "mantissa < 0.5"),
    ),
    *python("methods/rtn.py", "quantize", "rtn_options")(
        ("return below + (noise < ratio - below)", "return below + (noise > ratio - below)"),
        ("low = grid.reduce(weight, format, lambda g: clip.quantile(g, 1 - fraction))", "low = grid.reduce(weight, format, lambda g: clip.quantile(g, fraction))"),
    ),
    *python("methods/grid.py", "quantize", "rtn_options")(
        ('"rms": lambda v: ((v.square() * sizes).sum() / weight.numel()).sqrt()', '"rms": lambda v: v.square().mean().sqrt()'),
        ('code = round(ratio + offset) if format.zero == "float" else round(ratio) + offset', "code = round(ratio) + offset"),
    ),
    *python("methods/nearest.py", "quantize", "kmeans")(
        ("torch.searchsorted(self._middle, values.contiguous())", "torch.searchsorted(self._middle, values.contiguous(), right=True)"),
    ),
    *python("methods/search.py", "search")(
        ("counted = torch.where(weights > 0, weight, 0.0)", "counted = weight"),
        ("largest = torch.where(-low > high, low, high)", "largest = torch.maximum(-low, high)"),
        ("for sign in (1, -1) for ratio in ratios]", "for sign in (1,) for ratio in ratios]"),
        ("unit = 1.0 if qt.format.fitted else float(table.abs().max())", "unit = 1.0"),
        ("digits = 1 - round(math.log2(info.eps))", "digits = 2 - round(math.log2(info.eps))"),
    ),
    *python("methods/search.py", "two_tables")(
        ("tables[1] += PAIR_SHIFT", "tables[1] += 0"),
    ),
    *python("methods/fitting.py", "two_tables")(
        ("reference.per_weight(chosen == number, qt.format", "reference.per_weight(chosen != number, qt.format"),
    ),
    *cpp("cpu/offline/scale_search-inl.h", "tests/methods/test_two_tables.py")(
        ("*chosen = static_cast<uint8_t>(table);", ""),
        ("middle_ = middles_ + table * (s_.entries - 1);", "middle_ = middles_;"),
    ),
    *python("methods/gptq.py", "gptq")(
        ("lost[j - begin] = (w - q) / self.factor[j, j]", "lost[j - begin] = w - q"),
        ("hessian = hessian[order][:, order]", "hessian = hessian[order]"),
        ("order = hessian.diagonal().argsort(descending=True, stable=True)", "order = hessian.diagonal().argsort(stable=True)"),
        ("by_column[self.order] = square.min() / square", "by_column[self.order] = square / square.max()"),
        ("damping * float(h.diagonal().mean())", "damping * float(h.diagonal().max())"),
    ),
    *python("methods/gptq.py", "damping")(
        ("rest = hessian.double() - h", "rest = hessian.double()"),
        ("DAMPINGS[losses.index(min(losses))]", "DAMPINGS[losses.index(max(losses))]"),
    ),
    *python("ptq/calibration.py", "damping")(
        ("cut = len(rows) - len(rows) // _HELD_OUT_OF", "cut = len(rows) // _HELD_OUT_OF"),
        ("* (part.samples / samples) * ratio * ratio", "* (part.samples / samples) * ratio"),
        ("behind = (_HELD_OUT_OF - 1) * self._held.samples <", "behind = _HELD_OUT_OF * self._held.samples >"),
    ),
    *python("ptq/scaling.py", "scaling")(
        ("return all(owners[id(p)] == 1 for p in _parameters(model, group))", "return True"),
        ("return holding(groups[:half]) + holding(groups[half:])", "return holding(groups[:half])"),
        ("if row.name in rules and why is not None and row.note is None", "if why is not None and row.note is None"),
        ("if always:\n        restore()", "if not always:\n        restore()"),
    ),
    *python("ptq/importance.py", "importance")(
        ("if not float(entry.counts):", "if float(entry.counts):"),
        ("entries.get(stored[name]) or entries.get", "entries.get"),
        ("found.samples for found in statistics.values()) / chunk_size", "found.samples for found in statistics.values()) * chunk_size"),
    ),
    *python("ptq/given.py", "importance")(
        ("values = [importance[name] for name in names if name in importance]", "values = []"),
    ),
    *python("io/imatrix.py", "imatrix")(
        ("return self.sums / self.counts.clamp(min=1)[:, None]", "return self.sums"),
        ("if len(sums) == 1:  # ggml has", "if False:  # ggml has"),
        ("torch.tensor([max(calls, 1)]", "torch.tensor([calls]"),
    ),
    *python("methods/hqq.py", "gptq", "quantize")(
        ("self._step(beta * kappa**i, fit_scale, dtype)", "self._step(beta / kappa**i, fit_scale, dtype)"),
    ),
    *python("ptq/observers.py", "observers")(
        ("top = 2 ** (bits - 1) - 1\n        if low == high", "top = 2 ** (bits - 1)\n        if low == high"),
        ("below = float(clipping.quantile(values, 1 - self.percentile))", "below = float(values.min())"),
    ),
    *python("ptq/smooth.py", "smooth")(
        ("columns.clamp(min=_TINY) ** (1 - alpha)", "columns.clamp(min=_TINY) ** alpha"),
        ("s = s / (s.max() * s.min()).sqrt()", "s = s / s.max()"),
    ),
    *python("ptq/knapsack.py", "allocate")(
        ("state = int(best[: (capacity - base) // unit + 1].argmin())", "state = int(best[: (capacity - base) // unit].argmin())"),
    ),
]  # fmt: skip
