"""A network as C99 that computes in integers alone: `python microcontroller.py OUT`, then `gcc OUT/*.c -lm`."""

import subprocess
import sys

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from lowbit.export.c.project import export_c

out = sys.argv[1]
torch.manual_seed(0)
digits = load_digits()
x = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
y = torch.tensor(digits.target)
model = nn.Sequential(
    nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(128, 10)
)
optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
for _ in range(100):
    batch = torch.randint(0, 1400, (128,))
    loss = F.cross_entropy(model(x[batch]), y[batch])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

samples = torch.export.Dim("samples")
program = torch.export.export(model.eval(), (x[:2],), dynamic_shapes=({0: samples},))
# 8-bit integers; codebook=4 keeps 4-bit codes and a table in flash.
print(export_c(program, x[:200], out, bits=8, codebook=4))
subprocess.run(f"gcc -O2 {out}/*.c -lm -o {out}/selftest && {out}/selftest", shell=True, check=True)
