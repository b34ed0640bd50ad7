"""The wheel with numpy alone: packs random 4-bit codes and multiplies. Run by hand or by CI, without torch."""

import importlib.util

import numpy as np

from lowbit import _C

if importlib.util.find_spec("torch") is not None:
    raise SystemExit("torch is installed here: this script shows that lowbit works without it")

rng = np.random.default_rng(0)
n, k, group = 100, 96, 32
codes = rng.integers(0, 16, (n, k), dtype=np.uint8)
table = rng.standard_normal(16).astype(np.float32)
scales = rng.random((n, k // group), dtype=np.float32) + 0.5

weight = _C.Weight(n=n, k=k, bits=4, group=group, scale_dtype="fp32")
lanes = np.zeros((-(-n // _C.BLOCK_N) * _C.BLOCK_N, k // group), np.float32)
lanes[:n] = scales
lanes = np.ascontiguousarray(lanes.reshape(-1, _C.BLOCK_N, k // group).swapaxes(1, 2))

y = weight.linear(np.eye(k, dtype=np.float32), _C.prepack(_C.pack(codes, 4), n, k, 4), table, lanes)
expected = table[codes] * scales.repeat(group, axis=1)
if not np.array_equal(y.T, expected):
    raise SystemExit("the product with the identity is not the weight")
print("numpy alone:", weight.select("linear", "fp32", 1), "exact")
