"""Training in FP8 beside bf16 with fp32 AdamW: losses, bytes, errors of optimizer states and time of a step.

A byte-level transformer of 0.9 M parameters learns the sources of Python's standard library. Writes
benchmarks/results/fp8_training.{json,png}; takes a few minutes and wants matplotlib. `--steps` times the optimizers
alone and adds that to the file; `--quick` trains 20 steps on one seed and writes nothing.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from record import RESULTS, machine
from torch import Tensor, nn

from lowbit.nn import FP8Linear, fp8_add, fp8_mul, fp8_rms_norm, fp8_silu
from lowbit.optim import FP8AdamW
from lowbit.reference import adamw as reference

WIDTH, HIDDEN, HEADS, LAYERS, LENGTH, BATCH = 128, 384, 4, 4, 128, 16
STEPS, SEEDS = 300, (0, 1, 2)
RATE, WARMUP, DECAY = 2e-3, 20, 0.1
TEXT_BYTES, HELD_OUT, TEST_BATCHES = 4 << 20, 1 << 18, 16
EPS = 1e-6
STATE_FORMATS = {
    "E4M3": (torch.float8_e4m3fn, False),
    "E4M3+X": (torch.float8_e4m3fn, True),
    "E5M2": (torch.float8_e5m2, False),
    "E5M2+X": (torch.float8_e5m2, True),
}


def text() -> Tensor:
    """The first TEXT_BYTES of the modules beside `json`, in the order of their names, uint8."""
    folder = Path(json.__file__).parents[1]
    data = b"".join(path.read_bytes() for path in sorted(folder.glob("*.py")))
    return torch.frombuffer(bytearray(data[:TEXT_BYTES]), dtype=torch.uint8)


class Product(torch.autograd.Function):
    """x W^T of bf16 with fp32 sums, rounded to bf16, and so its gradients.

    Multiplies in fp32: torch's bf16 products take five times as long on CPUs without bf16 instructions.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        """x (..., K), weight (N, K)."""
        ctx.save_for_backward(x, weight)
        return F.linear(x.float(), weight.float()).bfloat16()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Of x and of the weight."""
        x, weight = ctx.saved_tensors
        dy = gradient.float().flatten(0, -2)
        return (dy @ weight.float()).view_as(x).bfloat16(), (
            dy.T @ x.float().flatten(0, -2)
        ).bfloat16()


class Linear(nn.Linear):
    """A weight in fp32, its products in bf16."""

    def forward(self, x: Tensor) -> Tensor:
        """x W^T."""
        return Product.apply(x, self.weight.bfloat16())


class Block(nn.Module):
    """Attention and a gated linear unit, each behind an RMSNorm."""

    def __init__(self, fp8: bool) -> None:
        super().__init__()
        make = FP8Linear if fp8 else Linear
        self.fp8 = fp8
        self.norms = nn.ParameterList(torch.ones(WIDTH) for _ in range(2))
        self.qkv, self.out = make(WIDTH, 3 * WIDTH, bias=False), make(WIDTH, WIDTH, bias=False)
        self.gate, self.up, self.down = (
            make(*shape, bias=False)
            for shape in ((WIDTH, HIDDEN), (WIDTH, HIDDEN), (HIDDEN, WIDTH))
        )

    def norm(self, index: int, x: Tensor, saved: Any) -> Tensor:
        """RMSNorm of x, in its dtype."""
        weight = self.norms[index].to(x.dtype)
        if self.fp8:
            return fp8_rms_norm(x, (WIDTH,), weight, EPS, saved)
        return F.rms_norm(x, (WIDTH,), weight, EPS)

    def forward(self, x: Tensor, saved: Any) -> tuple[Tensor, Any]:
        """x (B, T, WIDTH) and its FP8 copy, if there is one, to the next."""
        add: Callable[..., Any] = fp8_add if self.fp8 else lambda a, b: (a + b, None)
        b, t, _ = x.shape
        qkv = self.qkv(self.norm(0, x, saved)).view(b, t, 3, HEADS, WIDTH // HEADS)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x, saved = add(x, self.out(mixed.transpose(1, 2).reshape(b, t, WIDTH)))
        y = self.norm(1, x, saved)
        gate, up = self.gate(y), self.up(y)
        gated = fp8_mul(fp8_silu(gate), up) if self.fp8 else F.silu(gate) * up
        return add(x, self.down(gated))


class Model(nn.Module):
    """Bytes (B, T) to logits (B, T, 256); embedding, last norm and head are bf16 in both recipes."""

    def __init__(self, fp8: bool) -> None:
        super().__init__()
        self.bytes, self.places = nn.Embedding(256, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.ModuleList(Block(fp8) for _ in range(LAYERS))
        self.head = Linear(WIDTH, 256, bias=False)
        for p in self.parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the next byte, bf16."""
        h = (self.bytes(x) + self.places.weight[: x.shape[1]]).bfloat16()
        saved = None
        for block in self.blocks:
            h, saved = block(h, saved)
        return self.head(F.rms_norm(h, (WIDTH,), None, EPS))

    def loss(self, batch: Tensor) -> Tensor:
        """Mean cross entropy of bytes 1 .. T given those before, nats."""
        logits = self(batch[:, :-1]).float()
        return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


def batches(data: Tensor, count: int, seed: int) -> list[Tensor]:
    """(BATCH, LENGTH + 1) int64 pieces at random places."""
    g = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(data) - LENGTH - 1, (count, BATCH, 1), generator=g)
    return list(data[starts + torch.arange(LENGTH + 1)].long())


def train(fp8: bool, seed: int, data: Tensor, steps: int) -> tuple[dict[str, Any], Model, Any]:
    """One run: the result, the model and its optimizer. Both recipes start alike and see the same batches."""
    torch.manual_seed(seed)
    model = Model(fp8)
    make = FP8AdamW if fp8 else torch.optim.AdamW
    optimizer = make(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda s: min((s + 1) / WARMUP, 0.02 + 0.98 * (1 + math.cos(math.pi * s / steps)) / 2),
    )
    curve, start = [], time.perf_counter()
    for batch in batches(data[:-HELD_OUT], steps, seed):
        optimizer.zero_grad()
        loss = model.loss(batch)
        loss.backward()
        optimizer.step()
        schedule.step()
        curve.append(loss.item())
    seconds = time.perf_counter() - start
    with torch.no_grad():
        held_out = batches(data[-HELD_OUT:], TEST_BATCHES, 0)
        final = statistics.fmean(model.loss(batch).item() for batch in held_out)
    print(f"{'fp8' if fp8 else 'bf16'}, seed {seed}: {final:.4f} in {seconds:.0f} s", flush=True)
    result = {
        "recipe": "fp8" if fp8 else "bf16",
        "seed": seed,
        "loss": final,
        "curve": curve,
        "state_bytes": state_bytes(optimizer),
        "activation_bytes": activation_bytes(model, batches(data, 1, 0)[0]),
    }
    return result, model, optimizer


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all states but the counts of steps."""
    states = optimizer.state.values()
    return sum(t.nbytes for state in states for name, t in state.items() if name != "step")


def activation_bytes(model: Model, batch: Tensor) -> int:
    """What the blocks save for backward, each storage once; copies of parameters are not counted."""
    storages: dict[int, int] = {}
    keep = []
    shapes = {p.shape for p in model.parameters()} | {p.shape[::-1] for p in model.parameters()}

    def note(t: Tensor) -> Tensor:
        keep.append(t)
        if t.shape not in shapes:
            storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    h = (model.bytes(batch[:, :-1]) + model.places.weight).bfloat16()
    saved = None
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        for block in model.blocks:
            h, saved = block(h, saved)
    return sum(storages.values())


def state_errors(optimizer: torch.optim.Optimizer) -> dict[str, dict[str, float]]:
    """Relative mean squared error of m / (sqrt(v) + eps) with both states in FP8, by format of m, then of v."""
    states = [(s["exp_avg"].flatten(), s["exp_avg_sq"].flatten()) for s in optimizer.state.values()]

    def coded(x: Tensor, name: str) -> Tensor:
        return reference.dequantize(*reference.quantize(x, *STATE_FORMATS[name]))

    exact = torch.cat([m / (v.sqrt() + 1e-8) for m, v in states])
    table: dict[str, dict[str, float]] = {}
    for first in STATE_FORMATS:
        ms = [coded(m, first) for m, _ in states]
        table[first] = {}
        for second in STATE_FORMATS:
            vs = [coded(v, second) for _, v in states]
            u = torch.cat([m / (v.sqrt() + 1e-8) for m, v in zip(ms, vs, strict=True)])
            table[first][second] = float((u - exact).square().sum() / exact.square().sum())
    return table


def step_times(threads: int, rounds: int = 15) -> dict[str, float]:
    """Median nanoseconds per parameter of a step on four matrices of 2048 x 2048, ours and torch's in turn."""
    torch.set_num_threads(threads)
    shapes = [(2048, 2048)] * 4
    times: dict[str, list[float]] = {}
    makers: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
        "lowbit FP8AdamW": FP8AdamW,
        "lowbit FP8AdamW, no expansion": lambda p: FP8AdamW(p, expand=False),
        "torch AdamW, fused": lambda p: torch.optim.AdamW(p, fused=True),
    }
    optimizers = {}
    for name, make in makers.items():
        params = [nn.Parameter(torch.randn(s)) for s in shapes]
        for p in params:
            p.grad = torch.randn_like(p) * 1e-3
        optimizers[name] = make(params)
        optimizers[name].step()
    for _ in range(rounds):
        for name, optimizer in optimizers.items():
            start = time.perf_counter()
            optimizer.step()
            times.setdefault(name, []).append(time.perf_counter() - start)
    numel = sum(math.prod(s) for s in shapes)
    return {name: statistics.median(t) * 1e9 / numel for name, t in times.items()}


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    """Loss curves of every run, a running mean of 10 steps."""
    import matplotlib  # in the peers' environment alone

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots(figsize=(7, 4), layout="constrained")
    for run in runs:
        curve = torch.tensor(run["curve"]).unfold(0, 10, 1).mean(1)
        fp8 = run["recipe"] == "fp8"
        label = f"{'FP8' if fp8 else 'bf16, fp32 AdamW'}, seed {run['seed']}: {run['loss']:.3f}"
        ax.plot(curve, "-" if fp8 else ":", color=f"C{run['seed']}", label=label)
    ax.set(xlabel="step", ylabel="training loss, nats per byte", ylim=(None, 3.5))
    ax.legend(title="held-out loss at the end")
    figure.savefig(path, dpi=80, metadata={"Software": None})
    plt.close(figure)


def mean_errors(tables: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """The mean of each cell."""
    return {
        m: {v: statistics.fmean(table[m][v] for table in tables) for v in STATE_FORMATS}
        for m in STATE_FORMATS
    }


def summary(report: dict[str, Any]) -> str:
    """What the file says, in lines."""
    lines = []
    for run in report["runs"]:
        per_parameter = run["state_bytes"] / report["parameters"]
        per_element = run["activation_bytes"] / (BATCH * LENGTH * WIDTH * LAYERS)
        lines.append(
            f"{run['recipe']:>4}, seed {run['seed']}: loss {run['loss']:.4f}, states {per_parameter:.4f} bytes a "
            f"parameter, activations {per_element:.1f} bytes for each element of x and layer"
        )
    lines.append(
        "relative MSE of m / sqrt(v), rows m, columns v, 1e-4: " + ", ".join(STATE_FORMATS)
    )
    for name, row in report["state_errors"].items():
        lines.append(f"{name:>8} " + " ".join(f"{1e4 * error:6.2f}" for error in row.values()))
    lines.append(f"ns a parameter, by threads: {json.dumps(report['step_ns_per_parameter'])}")
    return "\n".join(lines)


def main() -> None:
    """Trains and counts, or times, and writes the files."""
    path = RESULTS / "fp8_training.json"
    if "--steps" in sys.argv[1:]:
        report = json.loads(path.read_text())
        report["step_ns_per_parameter"] = {str(t): step_times(t) for t in (1, 2)}
        path.write_text(json.dumps(report, indent=1) + "\n")
        print(summary(report))
        return
    torch.set_num_threads(2)
    quick = "--quick" in sys.argv[1:]
    data, runs, tables = text(), [], []
    for seed in SEEDS[: 1 if quick else None]:
        for fp8 in (False, True):
            result, model, optimizer = train(fp8, seed, data, 20 if quick else STEPS)
            runs.append(result)
            if not fp8:
                tables.append(state_errors(optimizer))
    report = {
        "machine": {} if quick else machine(("lowbit", "torch")),
        "parameters": sum(p.numel() for p in model.parameters()),
        "text_bytes": len(data),
        "tokens_per_step": BATCH * LENGTH,
        "runs": runs,
        "state_errors": mean_errors(tables),
        "step_ns_per_parameter": {},
    }
    print(summary(report))
    if not quick:
        RESULTS.mkdir(exist_ok=True)
        path.write_text(json.dumps(report, indent=1) + "\n")
        draw(runs, RESULTS / "fp8_training.png")


if __name__ == "__main__":
    main()
