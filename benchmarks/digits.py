"""Training through the quantizer on scikit-learn's digits: accuracy by method, before and after training and packed.

An MLP and a CNN on 1797 images of 8x8. Every quantized model is converted and evaluated again through the packed
kernels. Writes benchmarks/results/digits.json, and digits.png if matplotlib is there; takes about 4 minutes on one
core. `--quick` trains one epoch on one seed and writes nothing.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from record import RESULTS, machine
from sklearn.datasets import load_digits
from torch import Tensor, nn

from lowbit import qat
from lowbit.nn import QuantLinear
from lowbit.qat import soft_kmeans

SEEDS = (0, 1)
TEST, BATCH = 360, 64
EPOCHS, TUNING, SOFT_TUNING = 20, 4, 2
RATE, MOMENTUM = 0.05, 0.9
TUNING_RATE = 0.01
TAUS = (0.5, 0.1, 0.05, 0.02, 5e-4)
MEMORY_ITERATIONS = (1, 5, 30)


@dataclass(frozen=True)
class Method:
    """One row: what is quantized, and how it is trained afterwards.

    `train` is "layers" (through fake quantizers), "tables" (the tables of packed layers), or "" (not at all). `ends`
    says that the first and the last layer are quantized, too; `signed` that the model has Hardtanh in place of ReLU,
    after which all signs are alike.
    """

    name: str
    spec: qat.Spec
    train: str = "layers"
    ends: bool = False
    rate: float = TUNING_RATE
    quantizer_rate: float | None = None
    signed: bool = False
    epochs: int = TUNING


def weight(make: Any, activation: Any = None, **options: Any) -> qat.Spec:
    """A Spec of a quantizer with options."""
    return qat.Spec(partial(make, **options), activation)


def methods() -> list[Method]:
    """All rows but that of fp32."""
    rows = []
    for bits in (8, 4, 2):
        clusters = weight(qat.ClusterMeans, bits=bits)
        rows += [
            Method(f"k-means {bits}", clusters, "", ends=True),
            Method(f"k-means {bits}, trained centroids", clusters, "tables", True, 1e-3),
            Method(f"k-means {bits}, means of weights", clusters, ends=True),
        ]
    for bits in (8, 4, 3, 2):
        rows.append(Method(f"int{bits} per channel", qat.Spec(f"int{bits}_row_fp32"), "", True))
    rows.append(Method("int2 per channel, STE", qat.Spec("int2_row_fp32"), ends=True))
    for bits in (4, 3, 2):
        step = partial(qat.LSQActivation, bits)
        spec = weight(qat.LSQ, step, format=f"int{bits}_row_fp32")
        rows.append(Method(f"LSQ {bits}/{bits}", spec))
    for bits in (4, 2):
        dorefa = partial(weight, qat.DoReFa, bits=bits)
        rows += [
            Method(f"DoReFa {bits}/{bits}", dorefa(partial(qat.DoReFaActivation, bits))),
            Method(f"DoReFa {bits}, PACT {bits}", dorefa(partial(qat.PACT, bits))),
        ]
    rows += [
        Method("TWN", weight(qat.TWN)),
        Method("TTQ", weight(qat.TTQ), quantizer_rate=1e-4),
        Method("BitNet b1.58, int8 activations", weight(qat.BitNet, qat.Int8Activation)),
        Method("BWN", weight(qat.BWN), rate=10 * TUNING_RATE),
        Method("XNOR", weight(qat.BWN, qat.XNORActivation), rate=10 * TUNING_RATE, signed=True),
    ]
    for dim in (1, 2):
        for mode, name in (("unrolled", "DKM"), ("implicit", "IDKM"), ("jfb", "IDKM-JFB")):
            soft = weight(qat.SoftKMeans, bits=2, dim=dim, mode=mode, tau=5e-3, iterations=10)
            method = Method(f"{name}, k = 4, d = {dim}", soft, ends=True, epochs=SOFT_TUNING)
            rows.append(method)
    return rows


@functools.cache
def data() -> tuple[Tensor, Tensor]:
    """Images (1797, 1, 8, 8) in [0, 1] and labels, in a fixed random order; the last TEST are for testing."""
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    images = torch.from_numpy(digits.images).float()[:, None] / 16
    return images[order], torch.from_numpy(digits.target).long()[order]


def mlp(act: type[nn.Module]) -> nn.Module:
    """64-128-128-128-10."""
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs in (64, 128, 128):
        layers += [nn.Linear(inputs, 128), nn.BatchNorm1d(128), act()]
    return nn.Sequential(*layers, nn.Linear(128, 10))


def cnn(act: type[nn.Module]) -> nn.Module:
    """Three convolutions and two linears."""
    layers: list[nn.Module] = []
    for inputs, outputs, stride in ((1, 16, 1), (16, 32, 2), (32, 32, 2)):
        conv = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1)
        layers += [conv, nn.BatchNorm2d(outputs), act()]
    layers += [nn.Flatten(), nn.Linear(128, 64), nn.BatchNorm1d(64), act()]
    return nn.Sequential(*layers, nn.Linear(64, 10))


MODELS: dict[str, Callable[[type[nn.Module]], nn.Module]] = {"MLP": mlp, "CNN": cnn}


def train(
    model: nn.Module,
    epochs: int,
    rate: float,
    seed: int,
    quantizer_rate: float | None = None,
    parameters: list[nn.Parameter] | None = None,
) -> None:
    """SGD with momentum and a cosine to 0, in batches of BATCH; what quantizers learn may have a rate of its own."""
    x, labels = (t[:-TEST] for t in data())
    g = torch.Generator().manual_seed(seed)
    groups: list[dict[str, Any]] = [{"params": parameters, "lr": rate}]
    if parameters is None:
        learned = [p for n, p in model.named_parameters() if ".quantizer." in n]
        rest = [p for n, p in model.named_parameters() if ".quantizer." not in n]
        groups = [{"params": rest}, {"params": learned, "lr": quantizer_rate or rate}]
    optimizer = torch.optim.SGD([g for g in groups if g["params"]], lr=rate, momentum=MOMENTUM)
    steps = epochs * (len(x) // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=g)[: len(x) // BATCH * BATCH].split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(model(x[rows]), labels[rows]).backward()
            optimizer.step()
            schedule.step()
    model.eval()


@torch.no_grad()
def predict(model: nn.Module) -> Tensor:
    """The classes of the test images."""
    return model.eval()(data()[0][-TEST:]).argmax(1)


def accuracy(classes: Tensor) -> float:
    """Percent of the test images."""
    return 100 * float((classes == data()[1][-TEST:]).float().mean())


def quantized(dense: nn.Module, method: Method) -> nn.Module:
    """A copy of a dense model with fake quantizers."""
    model = copy.deepcopy(dense)
    layers = [n for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    qat.prepare(model, method.spec, skip=() if method.ends else (layers[0], layers[-1]))
    return model


def run(dense: nn.Module, method: Method, seed: int, quick: bool) -> dict[str, Any]:
    """Accuracy of one method on one trained model."""
    start = time.process_time()
    epochs = 1 if quick else method.epochs
    model = quantized(dense, method)
    if "LSQ" in method.name:
        model.train()(data()[0][:BATCH])  # steps of activations start from a batch
    result: dict[str, Any] = {"before": accuracy(predict(model))}
    if method.train == "tables":
        qat.convert(model)
        train(model, epochs, method.rate, seed, parameters=qat.train_tables(model))
    elif method.train:
        train(model, epochs, method.rate, seed, method.quantizer_rate)
    classes = predict(model)
    result["after"] = accuracy(classes)
    fakes = [m for m in model.modules() if isinstance(m, qat.FakeQuantLinear)]
    if method.train != "tables" and ", d = 2" not in method.name:
        values = [fake.quantizer(fake.weight).detach() for fake in fakes]
        qat.convert(model)
        layers = [m for m in model.modules() if isinstance(m, QuantLinear)]
        for layer, value in zip(layers, values, strict=True):
            if not torch.equal(layer.quant_tensor().dequantize(), value):
                raise SystemExit(f"{method.name}: the packed weight differs from the trained one")
    layers = [m for m in model.modules() if isinstance(m, QuantLinear)]
    if layers:
        packed = predict(model)
        result["packed"] = accuracy(packed)
        result["changed"] = int((packed != classes).sum())
        numel = sum(m.in_features * m.out_features for m in layers)
        result["bits"] = 8 * sum(m.quant_tensor().nbytes for m in layers) / numel
    result["seconds"] = time.process_time() - start
    return result


def gradient_table() -> list[dict[str, float]]:
    """How far implicit and Jacobian-free gradients are from the unrolled one: 400 values, 4 centers, fp64."""
    g = torch.Generator().manual_seed(0)
    w, weights = (torch.randn(400, 1, generator=g, dtype=torch.float64) for _ in range(2))
    start = torch.linspace(-1.5, 1.5, 4, dtype=torch.float64)[:, None]
    rows = []
    for tau in TAUS:
        grads = {}
        for mode in soft_kmeans.MODES:
            leaf = w.clone().requires_grad_()
            clusters = soft_kmeans.cluster(
                leaf, start, tau, mode=mode, iterations=1000, tolerance=1e-13
            )
            (clusters.values * weights).sum().backward()
            grads[mode] = leaf.grad.flatten()
        exact = grads["unrolled"]
        error = float((grads["implicit"] - exact).norm() / exact.norm())
        cosine = float(torch.cosine_similarity(grads["jfb"], exact, 0))
        rows.append({"tau": tau, "implicit_error": error, "jfb_cosine": cosine})
    return rows


def memory_table() -> dict[str, dict[str, int]]:
    """Bytes saved for backward by mode and number of iterations: 10000 values, 16 centers, fp32."""
    g = torch.Generator().manual_seed(0)
    w = torch.randn(10000, 1, generator=g).requires_grad_()
    start = torch.linspace(-2, 2, 16)[:, None]
    table: dict[str, dict[str, int]] = {}
    for mode in soft_kmeans.MODES:
        for iterations in MEMORY_ITERATIONS:
            storages: dict[int, int] = {}
            held = []

            def note(t: Tensor, storages: dict[int, int] = storages, held: list = held) -> Tensor:
                held.append(t)
                storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
                return t

            with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
                soft_kmeans.cluster(w, start, 0.1, mode=mode, iterations=iterations, tolerance=0)
            table.setdefault(mode, {})[str(iterations)] = sum(storages.values())
    return table


def draw(report: dict[str, Any], path: Path) -> None:
    """Accuracy after training by method."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(r["method"] for r in report["rows"]))
    figure, ax = plt.subplots(figsize=(8, 0.22 * len(names) + 1), layout="constrained")
    for model, marker in zip(MODELS, "os", strict=True):
        rows = {r["method"]: r for r in report["rows"] if r["model"] == model}
        places = [names.index(n) for n in rows]
        for key, face in (("before", "none"), ("after", None)):
            values = [statistics.fmean(r[key]) for r in rows.values()]
            ax.scatter(
                values, places, marker=marker, facecolors=face or "C0", edgecolors="C0",
                label=f"{model}, {key} training",
            )  # fmt: skip
    ax.set_yticks(range(len(names)), names)
    ax.invert_yaxis()
    ax.set_xlabel("test accuracy, %")
    ax.legend()
    figure.savefig(path, dpi=80, metadata={"Software": None})
    plt.close(figure)


def main() -> None:
    """Trains everything and writes the files."""
    torch.set_num_threads(1)
    quick = "--quick" in sys.argv[1:]
    seeds, epochs = (SEEDS[:1], 2) if quick else (SEEDS, EPOCHS)
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    start = time.process_time()
    for name, make in MODELS.items():
        for seed in seeds:
            dense = {}
            results = {}
            for act, label in ((nn.ReLU, "fp32"), (nn.Hardtanh, "fp32, Hardtanh")):
                torch.manual_seed(seed)
                dense[act] = make(act)
                train(dense[act], epochs, RATE, seed)
                exact = accuracy(predict(dense[act]))
                results[label] = {"before": exact, "after": exact, "bits": 32.0}
            for method in methods():
                act = nn.Hardtanh if method.signed else nn.ReLU
                results[method.name] = run(dense[act], method, seed, quick)
            for method_name, result in results.items():
                row = rows.setdefault((name, method_name), {"model": name, "method": method_name})
                for key, value in result.items():
                    row.setdefault(key, []).append(value)
    for row in rows.values():
        mean = {k: statistics.fmean(v) for k, v in row.items() if isinstance(v, list)}
        print(row["model"], row["method"], {k: round(v, 2) for k, v in mean.items()})
    report = {
        "machine": {} if quick else machine(("lowbit", "torch", "scikit-learn")),
        "seeds": list(seeds),
        "images": [len(data()[0]) - TEST, TEST],
        "epochs": [epochs, TUNING, SOFT_TUNING],
        "rows": list(rows.values()),
        "gradients": gradient_table(),
        "saved_bytes": memory_table(),
        "seconds": time.process_time() - start,
    }
    for entry in report["gradients"]:
        print({k: float(f"{v:.3g}") for k, v in entry.items()})
    print(report["saved_bytes"], f"{report['seconds']:.0f} s")
    if not quick:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "digits.json").write_text(json.dumps(report, indent=1) + "\n")
        if importlib.util.find_spec("matplotlib"):
            draw(report, RESULTS / "digits.png")


if __name__ == "__main__":
    main()
