"""torch.onnx.export of quantized models: what it writes, run by onnxruntime."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lowbit
from lowbit import layouts, packing
from lowbit.formats import parse
from lowbit.ops import decompositions, library

pytest.importorskip("onnxscript")
onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

# Of torch's own exporter.
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")

# Every codec, packing, width of codes, kind of scale and zero, and scope of a table.
FORMATS = (
    "nf4", "int2_g32", "int3_g64", "int4_g16", "int5_row", "int6_g64", "int8_g32", "uint4_g32", "uint4_zfloat_g64",
    "q4_1", "q4_k", "q6_k", "iq4_xs", "q2_k", "mxfp4", "nvfp4", "e4m3", "nf4_g64_dq8", "kmeans3_g32", "tq1_0", "km4",
    "km4x2", "int4_g32_o2", "binary", "fp4", "kmeans4_pr", "ternary_trits",
)  # fmt: skip


class Heads(nn.Module):
    """A layer for each format, of one x."""

    def __init__(self, formats: tuple[str, ...], n: int, k: int) -> None:
        super().__init__()
        made = [lowbit.quantize(torch.randn(n, k), name) for name in formats]
        self.heads = nn.ModuleList(map(lowbit.nn.QuantLinear.from_quant_tensor, made))

    def forward(self, x: Tensor) -> list[Tensor]:
        return [head(x) for head in self.heads]


def exported(model: nn.Module, x: Tensor, path: Path, **options: object) -> Path:
    torch.onnx.export(model.eval(), (x,), str(path), dynamo=True, verbose=False, **options)
    return path


def run(path: Path, x: Tensor) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x.numpy()})


@pytest.mark.parametrize("bits", (1, 2, 3, 4, 5, 6, 8))
def test_codes_by_division(bits: int) -> None:
    """The kernels' own unpacking, by other arithmetic."""
    codes = torch.randint(0, 2**bits, (70, 75), dtype=torch.uint8)
    format = lowbit.Format.lut(bits=bits, group=None)
    layout = layouts.find("n16")
    packed = layout.pack(packing.pack_codes(codes, format), format, 75)
    assert torch.equal(layout.unpack_by_division(packed, format, 70, 75), codes.int())


@pytest.mark.parametrize(
    "name", (*FORMATS, "mxfp4_g16", "int4_g32_a8", "nf4_a8t", "int4_g64_a8b32")
)
def test_the_definitions_in_other_ops(name: str) -> None:
    """The weight bit for bit; the product too where it is one of integers."""
    qt = lowbit.quantize(torch.randn(70, 300), name)
    w = layouts.to_kernel(qt, "n16").operands
    known = library.flat_calls(decompositions.DECOMPOSITIONS)
    expected = lowbit.dequantize(qt) if not qt.format.outliers else qt.matrix.dequantize()
    made = known[torch.ops.lowbit.dequantize.default](*w, torch.float32)
    assert torch.equal(made, expected)
    if qt.format.activation:
        x = torch.randn(5, 300)
        y = known[torch.ops.lowbit.linear.default](x, *w, None)
        assert torch.equal(y, lowbit.linear(x, qt))


def test_the_identity_gives_every_weight(tmp_path: Path) -> None:
    """Bit for bit in another runtime."""
    n, k = 40, 300
    names = ("nf4_g64_dq8", "int3_g64", "q4_k", "nvfp4", "int4_g32_o2", "int8_row_a8")
    model, x = Heads(names, n, k), torch.eye(k)
    path = exported(model, x, tmp_path / "heads.onnx")
    for name, head, y in zip(names, model.heads, run(path, x), strict=True):
        expected = model(x)[-1] if head.format.activation else head.quant_tensor().dequantize().t()
        assert torch.equal(torch.from_numpy(y), expected), name


def test_a_network(tmp_path: Path) -> None:
    """Embedding, layers with biases, int8 activations, any number of rows; no dense weight in the file."""
    model = nn.Sequential(
        nn.Embedding(300, 128), nn.Linear(128, 512), nn.GELU(), nn.Linear(512, 96), nn.ReLU(), nn.Linear(96, 32)
    )  # fmt: skip
    model[0] = lowbit.nn.QuantEmbedding.from_embedding(model[0], "int4_g32")
    model[5] = lowbit.nn.QuantLinear.from_linear(model[5], "int8_row_a8")
    lowbit.quantize_model(model, "nf4", skip=(), progress=False)
    ids = torch.randint(0, 100, (3, 5))
    rows = torch.export.Dim("rows", min=1, max=64)
    path = exported(model, ids, tmp_path / "net.onnx", dynamic_shapes=({0: rows},))
    for count in (1, 7):
        ids = torch.randint(0, 100, (count, 5))
        expected = model(ids)
        (y,) = run(path, ids)
        # fp32 sums in another order, and an int8 activation that such a difference may round the other way: half a step
        # of 1 / 127 of the largest.
        error = (torch.from_numpy(y) - expected).abs().max() / expected.abs().max()
        assert error < 2 / 127
    stored = sum(len(t.raw_data) for t in onnx.load(path).graph.initializer)
    packed = sum(b.nbytes for b in model.buffers() if b is not None)
    assert packed <= stored < 1.3 * packed  # scales of small layers may be written in fp32


def test_fused_layers(tmp_path: Path) -> None:
    """Siblings that compute together in eager mode are products of their own in a graph."""

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_proj, self.up_proj = nn.Linear(64, 96), nn.Linear(64, 96)
            self.down_proj = nn.Linear(96, 64)
            self.act_fn = nn.SiLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))

    model = nn.Sequential(Gated()).half()
    lowbit.quantize_model(model, "int4_g32", skip=(), progress=False)
    lowbit.nn.fuse(model)
    x = torch.randn(3, 64, dtype=torch.float16)
    with torch.no_grad():
        expected = model(x)
        (y,) = run(exported(model, x, tmp_path / "gated.onnx"), x)
    tolerance = 4e-3  # four roundings to 11 bits on the way
    assert torch.allclose(torch.from_numpy(y), expected, rtol=tolerance, atol=tolerance)


CONVOLUTIONS: dict[str, tuple[nn.Module, str, tuple[int, ...]]] = {
    "two dimensions": (nn.Conv2d(8, 16, 3, padding=1), "nf4", (2, 8, 9, 7)),
    "strided, in groups": (nn.Conv2d(8, 16, 3, stride=2, dilation=2, groups=2, bias=False), "q4_1", (2, 8, 11, 12)),
    "one dimension, padded by itself": (
        nn.Conv1d(8, 12, 4, padding="same", padding_mode="reflect"), "int3_g64", (2, 8, 20),
    ),
    "three dimensions": (nn.Conv3d(4, 6, 2), "mxfp4", (1, 4, 5, 5, 5)),
    "outliers": (nn.Conv2d(8, 16, 3, padding=(1, 0)), "int4_g32_o2", (2, 8, 9, 7)),
    "transposed": (
        nn.ConvTranspose2d(8, 6, 3, stride=2, padding=1, output_padding=1), "nf4", (2, 8, 5, 6),
    ),
    "transposed, int8": (nn.ConvTranspose1d(8, 6, 3, dilation=2), "int4_row_a8", (2, 8, 5)),
    "transposed, in groups": (nn.ConvTranspose2d(8, 6, 3, groups=2), "kmeans3_g32", (2, 8, 5, 6)),
}  # fmt: skip


@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_convolutions(tmp_path: Path, case: str) -> None:
    conv, format, shape = CONVOLUTIONS[case]
    model = nn.Sequential(conv)
    lowbit.quantize_model(model, format, skip=(), progress=False)
    x = torch.randn(shape)
    (y,) = run(exported(model, x, tmp_path / "conv.onnx"), x)
    expected = model(x)
    assert isinstance(model[0], lowbit.nn.QuantConv)
    assert y.shape == expected.shape
    # Sums of at most 72 products in fp32, in another order.
    assert (torch.from_numpy(y) - expected).abs().max() < 1e-6 * 72**0.5 * expected.abs().max()


def test_a_convolutional_network(tmp_path: Path) -> None:
    """Any number of images; no dense weight in the file."""
    model = nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 128, 3, stride=2), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10),
    )  # fmt: skip
    lowbit.quantize_model(model, "int4_g32", skip=(), progress=False)
    images = torch.export.Dim("images", min=1, max=64)
    x = torch.randn(3, 3, 16, 16)
    path = exported(model, x, tmp_path / "net.onnx", dynamic_shapes=({0: images},))
    for count in (1, 5):
        x = torch.randn(count, 3, 16, 16)
        torch.testing.assert_close(
            torch.from_numpy(run(path, x)[0]), model(x), rtol=1e-4, atol=1e-5
        )
    stored = sum(len(t.raw_data) for t in onnx.load(path).graph.initializer)
    packed = sum(b.nbytes for b in model.buffers() if b is not None)
    assert packed <= stored < 1.3 * packed


def test_convolutions_of_int8_are_refused() -> None:
    conv = lowbit.nn.QuantConv2d.from_conv(nn.Conv2d(8, 16, 3), "int8_row_a8")
    known = library.flat_calls(decompositions.DECOMPOSITIONS)[torch.ops.lowbit.conv.default]
    numbers = ([3, 3], [1, 1], [0] * 4, [1, 1], 1, None)
    with pytest.raises(
        NotImplementedError, match="int8 activations are not exported, got format 'int8_row_a8'"
    ):
        known(torch.randn(1, 8, 5, 5), None, *conv.kernel_weight().operands, None, *numbers)


def test_other_layouts_are_refused() -> None:
    qt = lowbit.quantize(torch.randn(32, 64), "nf4")
    w = layouts.to_operands(qt, "k16")
    known = library.flat_calls(decompositions.DECOMPOSITIONS)[torch.ops.lowbit.linear.default]
    with pytest.raises(NotImplementedError, match="weights of layout 'k16' are not exported"):
        known(torch.randn(2, 64), *w, None)


def test_export_keeps_the_ops() -> None:
    """What torch itself makes of a model calls the kernels."""
    model = Heads(("nf4",), 32, 64)
    program = torch.export.export(model, (torch.randn(2, 64),)).run_decompositions()
    assert "lowbit.linear" in program.graph_module.code
    assert parse("nf4") == model.heads[0].format
