"""A network for handwritten digits trained through its 2-bit quantizer, then packed bit for bit as trained."""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from lowbit import qat

torch.manual_seed(0)
digits = load_digits()
x = torch.tensor(digits.data, dtype=torch.float32) / 16
y = torch.tensor(digits.target)
model = nn.Sequential(
    nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10)
)


def train(steps: int) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(steps):
        batch = torch.randint(0, 1400, (128,))
        loss = F.cross_entropy(model(x[batch]), y[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def accuracy() -> float:
    with torch.inference_mode():
        return float((model(x[1400:]).argmax(1) == y[1400:]).float().mean())


train(150)
print(f"fp32: {100 * accuracy():.1f} %")
qat.prepare(model, qat.Spec("int2_g32"))
print(f"2 bits, rounded: {100 * accuracy():.1f} %")
train(150)
trained = accuracy()
qat.convert(model)
assert accuracy() == trained
print(f"2 bits, trained: {100 * trained:.1f} %")
print(model)
