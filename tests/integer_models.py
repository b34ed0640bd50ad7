"""Small networks that run in integers: trained on scikit-learn's digits, and one of signals; each as a program."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export

TEST = 360


class DigitsCNN(nn.Module):
    """A convolution, a depthwise and a pointwise one with norms, pooling, a linear: (1, 8, 8) to 10."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.pool = nn.MaxPool2d(2)
        self.depthwise = nn.Sequential(
            nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False), nn.BatchNorm2d(16), nn.ReLU6()
        )
        self.pointwise = nn.Sequential(nn.Conv2d(16, 32, 1), nn.BatchNorm2d(32), nn.ReLU())
        self.average = nn.AvgPool2d(2)
        self.head = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of the classes."""
        y = self.pointwise(self.depthwise(self.pool(self.first(x))))
        return self.head(self.average(y).flatten(1))


class MLP(nn.Module):
    """64 to 10."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 48), nn.ReLU(), nn.Dropout(0.1), nn.Linear(48, 33)
        )
        self.head = nn.Linear(33, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of the classes."""
        return self.head(F.relu(self.layers(x)))


class Block(nn.Module):
    """Two convolutions over time and a shortcut, as in ResNetv1."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.a = nn.Conv1d(channels, out, 3, stride, padding=1)
        self.norm_a = nn.BatchNorm1d(out)
        self.b = nn.Conv1d(out, out, 3, padding="same", dilation=2)
        self.norm_b = nn.BatchNorm1d(out)
        same = channels == out and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv1d(channels, out, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, out, time / stride)."""
        y = self.norm_b(self.b(F.relu(self.norm_a(self.a(x)))))
        return F.relu(y + self.shortcut(x))


class SignalNet(nn.Module):
    """The paper's shape, one-dimensional and residual, for (9, 64): with a concatenation and all kinds of pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(9)
        self.first = nn.Conv1d(9, 8, 3, padding="same")
        self.blocks = nn.Sequential(Block(8, 8, 1), Block(8, 12, 2))
        self.pool = nn.MaxPool1d(3, 2, padding=1)
        self.average = nn.AvgPool1d(3, 2, padding=1, count_include_pad=True)
        self.head = nn.Linear(24, 6)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of the classes."""
        y = self.blocks(F.relu(self.first(self.norm(x))))
        y = torch.cat([self.pool(y), self.average(y)], 1)
        return self.head(F.hardtanh(y.mean(-1), -2.0, 2.0))


@dataclass(frozen=True)
class Case:
    """A network in eval mode, its program, inputs to calibrate on, and labelled ones that it has not seen."""

    model: nn.Module
    program: ExportedProgram
    inputs: Tensor
    test: Tensor
    labels: Tensor

    def accuracy(self, scores: Tensor) -> float:
        """Percent of the labels that are right."""
        return 100 * float((scores.argmax(1) == self.labels).double().mean())


def program_of(model: nn.Module, x: Tensor) -> ExportedProgram:
    """Of any batch, in eval mode."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return export(model.eval(), (x[:2],), dynamic_shapes=({0: Dim.DYNAMIC},))


def random_norms(model: nn.Module) -> nn.Module:
    """Gives norms statistics and parameters as training leaves them."""
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.3, 2)
            nn.init.normal_(module.weight, 1, 0.5)
            nn.init.normal_(module.bias, 0, 0.3)
    return model


def digits(make: type[nn.Module], epochs: int) -> Case:
    """A network trained on 1437 of the digits."""
    images, labels = (torch.from_numpy(a) for a in load_digits(return_X_y=True))
    torch.manual_seed(0)
    order = torch.randperm(len(images))
    x, y = images[order].reshape(-1, 1, 8, 8).float() / 16, labels[order].long()
    threads = torch.get_num_threads()
    # A second one only waits for batches as small as these.
    torch.set_num_threads(1)
    model = make()
    train, steps = x[:-TEST], -(-len(x[:-TEST]) // 64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=epochs * steps)
    for _ in range(epochs):
        for rows in torch.randperm(len(train)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(train[rows]), y[:-TEST][rows]).backward()
            optimizer.step()
            schedule.step()
    torch.set_num_threads(threads)
    program = program_of(model, x)
    return Case(model, program, train[:128], x[-TEST:], y[-TEST:])


def signals() -> Case:
    """A network that nobody trained; its labels are its own."""
    torch.manual_seed(1)
    model = random_norms(SignalNet()).eval()
    x = torch.randn(96, 9, 64).cumsum(-1) / 4
    program = program_of(model, x)
    with torch.no_grad():
        labels = model(x[64:]).argmax(1)
    return Case(model, program, x[:64], x[64:], labels)


class Attention(nn.Module):
    """Multi-head attention, with one linear for queries, keys and values."""

    def __init__(self, width: int, heads: int, fused: bool) -> None:
        super().__init__()
        self.heads, self.fused = heads, fused
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, width)."""
        batch, tokens, width = x.shape
        shape = (batch, tokens, 3, self.heads, width // self.heads)
        q, k, v = self.qkv(x).reshape(shape).permute(2, 0, 3, 1, 4).unbind(0)
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            y = (q * (width // self.heads) ** -0.5 @ k.transpose(-2, -1)).softmax(-1) @ v
        return self.out(y.transpose(1, 2).reshape(batch, tokens, width))


class Encoder(nn.Module):
    """A pre-norm block."""

    def __init__(self, width: int, heads: int, fused: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads, fused)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, width)."""
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """A vision transformer for (1, 8, 8) with patches of 2 x 2, and a class token or the mean of all tokens."""

    def __init__(
        self,
        width: int = 32,
        heads: int = 4,
        depth: int = 2,
        mean: bool = False,
        fused: bool = False,
    ) -> None:
        super().__init__()
        self.mean = mean
        self.patches = nn.Conv2d(1, width, 2, 2)
        self.token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.place = nn.Parameter(torch.randn(1, 16 + (not mean), width) * 0.02)
        self.blocks = nn.Sequential(*(Encoder(width, heads, fused) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of the classes."""
        y = self.patches(x).flatten(2).transpose(1, 2)
        if not self.mean:
            y = torch.cat([self.token.expand(y.shape[0], -1, -1), y], 1)
        y = self.norm(self.blocks(y + self.place))
        return self.head(y.mean(1) if self.mean else y[:, 0])
