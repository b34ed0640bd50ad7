"""Vision transformers in integers alone: accuracy on scikit-learn's digits by method and bits, after training.

A transformer on patches of 2x2 is trained on 1437 of 1797 images of 8x8 and quantized by each method of
`lowbit.integer.quantize_transformer` and with each observer. Writes benchmarks/results/vit.json; takes about 4 minutes
on one core. `--quick` trains one epoch on one seed and writes nothing.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from digits import TEST, accuracy, data
from record import RESULTS, machine
from torch import Tensor, nn
from torch.export import Dim, export

from lowbit.integer import Graph, quantize_transformer, trace
from lowbit.ptq import OBSERVERS

SEEDS = (0, 1)
EPOCHS, BATCH, RATE = 40, 64, 3e-3
CALIBRATION = 128
WIDTH, HEADS, DEPTH = 32, 4, 3
BITS = (8, 6, 4)
# Name, method, options, and the bits it is for.
ROWS: tuple[tuple[str, str, dict[str, Any], tuple[int, ...]], ...] = (
    ("min-max, everything", "minmax", {}, BITS),
    ("EMA, everything", "minmax", {"observer": OBSERVERS["ema"]}, BITS),
    ("percentile, everything", "minmax", {"observer": OBSERVERS["percentile"]}, BITS),
    ("OMSE, everything", "minmax", {"observer": OBSERVERS["mse"]}, BITS),
    ("FQ-ViT, everything", "fq_vit", {}, BITS),
    ("FQ-ViT, attention maps of 4 bits", "fq_vit", {"attention_bits": 4}, BITS),
    ("min-max, products alone", "minmax", {"everything": False}, BITS),
    ("PTQ4ViT", "ptq4vit", {}, BITS),
    ("RepQ-ViT", "repq_vit", {}, BITS),
    ("I-ViT", "i_vit", {}, (8,)),
)


class Attention(nn.Module):
    """Multi-head attention, with one linear for queries, keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, WIDTH)."""
        batch, tokens, _ = x.shape
        shape = (batch, tokens, 3, HEADS, WIDTH // HEADS)
        q, k, v = self.qkv(x).reshape(shape).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).reshape(batch, tokens, WIDTH))


class Block(nn.Module):
    """Attention and an MLP, each behind a layer norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention = Attention()
        wide = 4 * WIDTH
        self.mlp = nn.Sequential(nn.Linear(WIDTH, wide), nn.GELU(), nn.Linear(wide, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, WIDTH)."""
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """(1, 8, 8) to 10 classes, with a class token."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, WIDTH, 2, 2)
        self.token = nn.Parameter(torch.randn(1, 1, WIDTH) * 0.02)
        self.place = nn.Parameter(torch.randn(1, 17, WIDTH) * 0.02)
        self.blocks = nn.Sequential(*(Block() for _ in range(DEPTH)))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of the classes."""
        y = self.patches(x).flatten(2).transpose(1, 2)
        y = torch.cat([self.token.expand(y.shape[0], -1, -1), y], 1) + self.place
        return self.head(self.norm(self.blocks(y))[:, 0])


def trained(seed: int, epochs: int) -> nn.Module:
    """AdamW with one cycle."""
    torch.manual_seed(seed)
    model = ViT()
    x, labels = (t[:-TEST] for t in data())
    steps = epochs * -(-len(x) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(model(x[rows]), labels[rows], label_smoothing=0.1).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def traced(model: nn.Module) -> Graph:
    """The model as a graph."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = export(model, (data()[0][:2],), dynamic_shapes=({0: Dim.DYNAMIC},))
    return trace(program)


@torch.no_grad()
def measure(graph: Graph) -> dict[tuple[str, int], dict[str, float]]:
    """Accuracy of every row, and the relative error of the scores."""
    images = data()[0]
    calibration, test = images[:CALIBRATION], images[-TEST:]
    exact = graph(test)
    found = {("float", 32): {"accuracy": accuracy(exact.argmax(1)), "error": 0.0}}
    for name, method, options, widths in ROWS:
        for bits in widths:
            scores = quantize_transformer(graph, calibration, method, bits=bits, **options)(test)
            found[name, bits] = {
                "accuracy": accuracy(scores.argmax(1)),
                "error": float((scores - exact).norm() / exact.norm()),
            }
    return found


def main() -> None:
    """Trains, measures, and writes the file."""
    torch.set_num_threads(1)
    quick = "--quick" in sys.argv[1:]
    seeds, epochs = (SEEDS[:1], 1) if quick else (SEEDS, EPOCHS)
    rows: dict[tuple[str, int], dict[str, Any]] = {}
    start = time.process_time()
    for seed in seeds:
        for (name, bits), result in measure(traced(trained(seed, epochs))).items():
            row = rows.setdefault((name, bits), {"method": name, "bits": bits})
            for key, value in result.items():
                row.setdefault(key, []).append(value)
    for row in rows.values():
        means = [sum(row[key]) / len(seeds) for key in ("accuracy", "error")]
        print(row["method"], row["bits"], f"{means[0]:.2f} {means[1]:.4f}")
    report = {
        "machine": {} if quick else machine(("lowbit", "torch", "scikit-learn")),
        "seeds": list(seeds),
        "images": [len(data()[0]) - TEST, TEST],
        "calibration": CALIBRATION,
        "epochs": epochs,
        "model": {"width": WIDTH, "heads": HEADS, "blocks": DEPTH, "tokens": 17},
        "rows": list(rows.values()),
        "seconds": time.process_time() - start,
    }
    print(f"{report['seconds']:.0f} s")
    if not quick:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "vit.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
