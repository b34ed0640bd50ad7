"""A weight in a codebook of your own: what it costs, how far it is from the dense one, and which kernel runs."""

import torch

import lowbit

torch.manual_seed(0)
weight, x = torch.randn(512, 1024), torch.randn(4, 1024)

# Sixteen values, denser near zero, with a scale for every 64 weights of a row.
table = [i * abs(i) / 64 for i in range(-8, 8)]
mine = lowbit.Format.lut(bits=4, table=table, group=64)

for format in (mine, "nf4", "kmeans4", "km4", "int4_g64", "int8"):
    qt = lowbit.quantize(weight, format)
    error = (lowbit.dequantize(qt) - weight).norm() / weight.norm()
    print(f"{qt.format.name:10} {qt.bits_per_weight:5.2f} bits a weight, error {100 * error:.2f} %")

qt = lowbit.quantize(weight, mine)
y = lowbit.linear(x, qt)
assert torch.allclose(y, x @ lowbit.dequantize(qt).T, rtol=1e-4, atol=1e-3)
print(lowbit.explain(x, qt))
