"""Weights of structured formats: what codes mean, products, gradients, files, layers and models, on random codes."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from guarded import Guard
from torch import nn

import lowbit
from lowbit import packing, reference
from lowbit.backends.cpu import structured
from lowbit.formats import Format, parse
from lowbit.ops.weights import embedding
from lowbit.weights.quantized import QuantTensor, tensor_specs

NAMES = (
    "e8p", "e8p_rvq3", "e8p_rvq4", "e8p_g16_bf16", "trellis2", "trellis3", "trellis4_g24_fp32", "vq8_d4", "vq5_d2",
    "vq12_d8_g8", "vq9_d4_o2", "trellis2_o3",
)  # fmt: skip
BY_NAME = pytest.mark.parametrize("name", NAMES)


def random_structured(name: str, n: int, k: int) -> QuantTensor:
    format = parse(name)
    tensors = {}
    for field, (shape, dtype) in tensor_specs(format, n, k).items():
        if field == "codes":
            codes = torch.randint(0, 1 << format.bits, (n, format.num_vectors(k)))
            kind = torch.uint8 if format.bits <= 8 else torch.int64
            tensors[field] = packing.pack_codes(codes.to(kind), format)
        elif field == "outlier_columns":
            tensors[field] = torch.rand(n, k).argsort(1)[:, : shape[1]].sort(1).values.to(dtype)
        else:
            tensors[field] = (torch.randn(shape).abs() + 0.05).to(dtype)
    return QuantTensor(format, (n, k), tensors).validate()


def stream(row: torch.Tensor) -> list[int]:
    """The bits of the bytes of a row."""
    return [int(byte) >> i & 1 for byte in row for i in range(8)]


def number(bits: list[int]) -> int:
    return sum(bit << i for i, bit in enumerate(bits))


@BY_NAME
@pytest.mark.parametrize("shape", [(5, 75), (3, 8), (2, 1)])
def test_weights_follow_from_the_bits_one_by_one(name, shape):
    n, k = shape
    qt = random_structured(name, n, k)
    format, scales = qt.format, reference.effective_scales(qt)
    dense = qt.without_outliers.dequantize()
    for r in range(n):
        bits = stream(qt.codes[r])
        for i in range(k):
            if format.codec == "trellis":
                length = k * format.bits
                state = number([bits[(i * format.bits + j) % length] for j in range(16)])
                word = (state * 34038481 + 76625530) % 2**32
                value = (sum(word.to_bytes(4, "little")) - 510) / 128
            else:
                at = i // format.dim
                code = number(bits[at * format.bits : (at + 1) * format.bits])
                if format.codec == "vector":
                    value = float(qt.table[code, i % format.dim])
                else:
                    value = float(reference.e8p_values(torch.tensor([code]), format.bits)[0, i % 8])
            scale = scales[r, i // (format.group or k)]
            assert float(dense[r, i]) == float(scale * torch.tensor(value, dtype=torch.float32))


@pytest.mark.parametrize("bits", [9, 12, 15, 16, 24, 32])
def test_wide_codes_survive_packing(bits):
    codec, dim = ("e8p", 8) if bits > 16 else ("vector", 4)
    format = Format(name="any", codec=codec, bits=bits, dim=dim, scale_rule="rms")
    for columns in (1, 2, 7, 33):
        codes = torch.randint(0, 1 << bits, (3, columns))
        packed = packing.pack_codes(codes, format)
        assert packed.shape == (3, format.row_bytes(columns * dim)) == (3, -(-columns * bits // 8))
        assert stream(packed[1])[: columns * bits] == [
            int(c) >> i & 1 for c in codes[1] for i in range(bits)
        ]
        assert torch.equal(packing.unpack_codes(packed, format, columns * dim), codes)
    with pytest.raises(ValueError, match=r"codes must be below"):
        packing.pack_codes(codes - (1 << bits), format)


@BY_NAME
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_products_are_those_of_the_dequantized_weight(name, dtype):
    qt = random_structured(name, 37, 75)
    dense, bias = qt.dequantize(), torch.randn(37)
    for m in (0, 1, 3, 8, 20):
        x = torch.randn(m, 75).to(dtype)
        y = lowbit.linear(x, qt, bias)
        exact = F.linear(x.double(), dense.double(), bias.double())
        # K + 2 roundings of fp32 sums of products, and one to the dtype.
        bound = (
            2
            * 77
            * 2**-24
            * (F.linear(x.double().abs(), dense.double().abs()) + bias.double().abs())
        )
        bound = bound + exact.abs() * torch.finfo(dtype).eps + torch.finfo(dtype).tiny
        assert bool(((y.double() - exact).abs() <= bound).all())


@BY_NAME
def test_identity_returns_the_weight_bit_for_bit(name):
    qt = random_structured(name, 37, 75)
    assert torch.equal(lowbit.linear(torch.eye(75), qt), qt.dequantize().t())
    indices = torch.tensor([[3, 0], [36, 3]])
    assert torch.equal(embedding(indices, qt), qt.dequantize()[indices])


@pytest.mark.parametrize("name", ["vq6_d4", "vq5_d2_g16", "e8p", "trellis3_g40"])
def test_gradients_are_those_of_the_dense_weight(name):
    qt = random_structured(name, 6, 43)
    w = lowbit.ops.terms.matrix(qt)
    leaves = {"scales": w.scales.float(), **({"table": w.table} if qt.format.fitted else {})}
    leaves = {key: t.clone().requires_grad_() for key, t in leaves.items()}
    x = torch.randn(5, 43, requires_grad=True)
    y = lowbit.linear(x, w._replace(**leaves))
    grad = torch.randn_like(y)
    y.backward(grad)
    got = {"x": x.grad, **{key: t.grad for key, t in leaves.items()}}

    again = {key: t.detach().clone().requires_grad_() for key, t in leaves.items()}
    other = x.detach().clone().requires_grad_()
    codes = packing.unpack_codes(qt.codes, qt.format, 43)
    values = reference.code_values(codes, qt.format, again.get("table"))[:, :43]
    F.linear(other, reference.apply_scales(values, qt.format, again["scales"], None)).backward(grad)
    for key, t in {"x": other, **again}.items():
        torch.testing.assert_close(got[key], t.grad, rtol=1e-5, atol=1e-4, msg=key)


@BY_NAME
def test_files_layers_and_pickle_keep_the_bits(name, tmp_path):
    def same(a: QuantTensor, b: QuantTensor) -> bool:
        return a.format == b.format and all(
            torch.equal(t, b.tensors[key]) for key, t in a.tensors.items()
        )

    qt = random_structured(name, 20, 75)
    assert same(pickle.loads(pickle.dumps(qt)), qt)
    layer = lowbit.nn.QuantLinear.from_quant_tensor(qt)
    assert same(layer.quant_tensor(), qt)
    other = lowbit.nn.QuantLinear.from_quant_tensor(random_structured(name, 20, 75))
    other.load_state_dict(layer.state_dict())
    assert same(other.quant_tensor(), qt)
    assert same(copy.deepcopy(layer).quant_tensor(), qt)
    lowbit.save(nn.Sequential(layer), tmp_path / "m.safetensors")
    loaded = lowbit.load(nn.Sequential(nn.Linear(75, 20, bias=False)), tmp_path / "m.safetensors")
    assert same(loaded[0].quant_tensor(), qt)


def test_names_and_specs():
    for name in (*NAMES, "vq16_d8", "vq1_d2_row"):
        format = parse(name)
        assert format.spec == name
        assert format.structured
        plain = Format(
            **{**{f: getattr(format, f) for f in format.__dataclass_fields__}, "name": "mine"}
        )
        assert parse(plain.spec) == plain
    assert parse("vq12_d4").stored_bits == 3
    assert parse("e8p_rvq3").stored_bits == 3
    assert set(lowbit.formats()) >= {
        "e8p",
        "e8p_rvq3",
        "e8p_rvq4",
        "trellis2",
        "trellis3",
        "trellis4",
        "vq12_d4",
    }


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("vq17_d4", "B from 1 to 16"),
        ("vq8_d3", "for D of"),
        ("e8p_g12", "group must be None or a multiple of 8"),
        ("trellis2_a8", "activation must be None"),
        ("e8p_dq8", "scale must be one of"),
        ("trellis5", "unknown format"),
    ],
)
def test_bad_names(name, match):
    with pytest.raises(ValueError, match=match):
        parse(name)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"codec": "e8p", "bits": 20, "dim": 8}, "bits must be one of"),
        ({"codec": "e8p", "bits": 16, "dim": 4}, "dim must be one of"),
        ({"codec": "vector", "bits": 8, "dim": 1}, "dim must be one of"),
        ({"codec": "trellis", "bits": 2, "dim": 2}, "dim must be one of"),
        ({"codec": "affine", "bits": 4, "dim": 2}, "dim must be one of"),
        ({"codec": "vector", "bits": 8, "dim": 4, "zero": "int"}, "zero must be None"),
    ],
)
def test_bad_fields(fields, match):
    with pytest.raises(ValueError, match=match):
        Format(name="bad", **{"scale_rule": "rms", **fields})


def test_ops_of_single_codes_refuse_vectors():
    with pytest.raises(ValueError, match="codes of 8 weights"):
        torch.ops.lowbit.unpack(random_structured("e8p", 2, 16).codes, "e8p", 16)
    w = lowbit.ops.terms.matrix(random_structured("e8p", 2, 16))
    with pytest.raises(ValueError, match="does not fit the layout"):
        lowbit.linear(torch.ones(1, 16), w._replace(layout="n16"))


@pytest.mark.parametrize("isa", ["scalar", "avx2", ""])
@BY_NAME
def test_kernels_of_every_instruction_set(name, isa):
    for n, k in ((19, 75), (3, 600), (2, 5), (20, 256)):
        qt = random_structured(name, n, k).without_outliers
        w, exact = lowbit.ops.terms.matrix(qt), reference.dequantize(qt)
        assert w.layout == "rows"
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            assert torch.equal(structured.decode(None, w, dtype, isa), exact.to(dtype))
        indices = torch.tensor([n - 1, 0, n - 1])
        assert torch.equal(structured.decode(indices, w, torch.float32, isa), exact[indices])
        for m in range(1, 9):
            x = torch.randn(m, k)
            y = structured.few_rows(x, w, None, torch.float32, isa).double()
            wanted = F.linear(x.double(), exact.double())
            size = F.linear(x.double().abs(), exact.double().abs())
            assert bool(((y - wanted).abs() <= 2 * (k + 2) * 2**-24 * size + 1e-30).all())


def test_nothing_is_read_beyond_a_row():
    """The last row ends where a page ends that is followed by one that nobody may read."""
    guard = Guard()
    for name in ("e8p", "e8p_rvq3", "trellis2", "trellis3", "trellis4", "vq9_d4", "vq5_d2"):
        for k in (5, 8, 75, 256, 300):
            qt = random_structured(name, 3, k)
            w = lowbit.ops.terms.matrix(qt)
            near_end = guard.all(w)
            assert torch.equal(structured.decode(None, near_end, torch.float32), qt.dequantize())
            x = guard.tensor(torch.randn(2, k))
            assert torch.equal(lowbit.linear(x, near_end), lowbit.linear(x, w))


def test_infinity_and_nan_reach_what_depends_on_them():
    qt = random_structured("e8p", 5, 75)
    for bad in (float("inf"), float("nan")):
        x = torch.ones(2, 75)
        x[1, 74] = bad
        y = lowbit.linear(x, qt)
        assert bool(y[0].isfinite().all())
        assert not bool(y[1].isfinite().any())


def test_explain_says_what_runs():
    qt = random_structured("e8p", 20, 75)
    assert lowbit.explain(torch.ones(8, 75), qt).selected.startswith("gemv_e8p_rows_")
    assert lowbit.explain(torch.ones(9, 75), qt).selected.startswith("panel_e8p_rows_")
