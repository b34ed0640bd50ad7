"""QuantLinear and QuantEmbedding: state dicts, moves and casts, sharing, copies, training, torch.compile."""

from __future__ import annotations

import copy
import gc
import io
import json
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lowbit
from lowbit import reference
from lowbit.formats import Format, parse
from lowbit.layouts import CANONICAL, N16
from lowbit.nn import PackedModule, QuantEmbedding, QuantLinear
from lowbit.weights.quantized import QuantTensor, tensor_specs
from weights import ALL_FORMATS, random_weight

# One for every operand that can be present or absent, and each kind of two-level scale.
MIXED = ("nf4", "uint3", "uint4_zfloat", "q5_1", "kmeans3_pr", "ternary_trits")
TWO_LEVEL = ("nvfp4", "mxfp4", "nf4_g64_dq8")
N, K = 70, 96


def raw(t: torch.Tensor) -> torch.Tensor:
    return t.detach().contiguous().reshape(-1).view(torch.uint8)


def assert_same_tensors(a: QuantTensor, b: QuantTensor) -> None:
    assert (a.format, a.shape, list(a.tensors)) == (b.format, b.shape, list(b.tensors))
    for name, t in a.tensors.items():
        assert torch.equal(raw(t), raw(b.tensors[name])), name


def layer_of(name: str, bias: bool = True) -> QuantLinear:
    return QuantLinear.from_quant_tensor(
        random_weight(parse(name), N, K), torch.randn(N) if bias else None
    )


def buffer_ids(module: nn.Module) -> set[int]:
    return {t.data_ptr() for t in module.buffers()}


@pytest.mark.parametrize("format", ALL_FORMATS, ids=lambda f: f.name)
def test_state_dict_is_canonical_and_round_trips(format: Format) -> None:
    qt = random_weight(format, N, K)
    bias = torch.randn(N)
    layer = QuantLinear.from_quant_tensor(qt, bias)
    state = layer.state_dict()
    assert set(state) == {*tensor_specs(format, N, K), "bias", "_extra_state"}
    stated = json.loads(bytes(state["_extra_state"].tolist()))
    assert stated == {"format": format.spec, "version": 1, "shape": [N, K]}
    for name, t in qt.tensors.items():
        assert torch.equal(raw(state[name]), raw(t)), name
    assert_same_tensors(layer.quant_tensor(), qt)

    x = torch.randn(2, 3, K)
    for device in ("cpu", "meta"):
        fresh = QuantLinear(K, N, format=format.spec, device=device)
        assert fresh.load_state_dict(state).missing_keys == []
        assert torch.equal(fresh(x), layer(x)), device
        assert torch.equal(fresh.bias, bias)

    rows = QuantEmbedding(N, K, format=format, dtype=torch.bfloat16)
    del state["bias"]
    rows.load_state_dict(state)
    indices = torch.tensor([[0, 69], [3, 3]])
    assert torch.equal(rows(indices), reference.embedding(indices, qt, torch.bfloat16))


@pytest.mark.parametrize("name", (*MIXED, *TWO_LEVEL))
def test_forward_is_the_op(name: str) -> None:
    layer = layer_of(name)
    x = torch.randn(2, 3, K)
    assert torch.equal(layer(x), lowbit.linear(x, layer.quant_tensor(), layer.bias))


def test_from_linear_and_from_embedding() -> None:
    dense = nn.Linear(K, N, dtype=torch.bfloat16).eval()
    layer = QuantLinear.from_linear(dense, "nf4")
    assert_same_tensors(layer.quant_tensor(), lowbit.quantize(dense.weight.detach(), "nf4"))
    assert torch.equal(layer.bias, dense.bias)
    assert layer.bias.dtype == torch.bfloat16
    assert not layer.training
    assert not any(p.requires_grad for p in layer.parameters())
    fitted = QuantLinear.from_linear(dense, Format.lut(bits=3, group=32), method="kmeans")
    assert fitted.format.bits == 3

    table = nn.Embedding(N, K, padding_idx=3, dtype=torch.float16)
    rows = QuantEmbedding.from_embedding(table, "int8_g32")
    assert (rows.padding_idx, rows.dtype) == (3, torch.float16)
    assert_same_tensors(rows.quant_tensor(), lowbit.quantize(table.weight.detach(), "int8_g32"))


class Scaled(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


class ScaledEmbedding(nn.Embedding):
    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(indices)


def test_what_is_not_a_plain_layer_is_refused() -> None:
    with pytest.raises(NotImplementedError, match=r"linear is a Scaled"):
        QuantLinear.from_linear(Scaled(K, N), "nf4")
    with pytest.raises(TypeError, match=r"linear must be an nn.Linear, got Embedding"):
        QuantLinear.from_linear(nn.Embedding(N, K), "nf4")
    with pytest.raises(NotImplementedError, match=r"embedding is a ScaledEmbedding"):
        QuantEmbedding.from_embedding(ScaledEmbedding(N, K), "nf4")
    with pytest.raises(NotImplementedError, match=r"max_norm must be None, got 1.0"):
        QuantEmbedding.from_embedding(nn.Embedding(N, K, max_norm=1.0), "nf4")
    with pytest.raises(TypeError, match=r"embedding must be an nn.Embedding, got Linear"):
        QuantEmbedding.from_embedding(nn.Linear(K, N), "nf4")


@pytest.mark.parametrize(
    ("make", "error", "message"),
    (
        (lambda: QuantLinear(0, N, format="nf4"), ValueError, r"positive, got \(70, 0\)"),
        (lambda: QuantLinear(K, N, format="nf5"), ValueError, "unknown format 'nf5'"),
        (lambda: QuantLinear.from_quant_tensor(torch.zeros(2, 2)), TypeError, "got Tensor"),
        (
            lambda: QuantLinear.from_quant_tensor(
                random_weight(parse("nf4"), N, K), torch.zeros(3)
            ),
            ValueError,
            r"bias must have shape \(70,\), got \(3,\)",
        ),
        (
            lambda: QuantEmbedding(N, K, format="nf4", dtype=torch.float64),
            TypeError,
            "dtype must be float32, bfloat16 or float16, got torch.float64",
        ),
    ),
)
def test_bad_arguments(make, error, message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_strict_load_refuses_what_does_not_fit() -> None:
    state = layer_of("nf4").state_dict()

    def load(module: PackedModule, change: dict, drop: tuple[str, ...] = ()) -> None:
        changed = {k: v for k, v in {**state, **change}.items() if k not in drop}
        before = module.quant_tensor()
        with pytest.raises(RuntimeError) as caught:
            module.load_state_dict(changed)
        assert_same_tensors(module.quant_tensor(), before)
        messages.append(str(caught.value))

    messages: list[str] = []
    load(QuantLinear(K, N, format="fp4_g64"), {})
    load(QuantLinear(K, N + 1, format="nf4"), {})
    load(layer_of("nf4"), {"codes": state["codes"][:, 1:]})
    load(layer_of("nf4"), {"scales": state["scales"].float()})
    load(layer_of("nf4"), {"scales": state["scales"] * torch.inf})
    load(layer_of("nf4"), {"codes": state["codes"].to("meta")})
    version_2 = {"format": "nf4", "version": 2, "shape": [N, K]}
    load(layer_of("nf4"), {"_extra_state": version_2})
    load(layer_of("nf4"), {"_extra_state": "nf4"})
    load(layer_of("nf4"), {}, ("scales",))
    load(layer_of("nf4"), {}, ("_extra_state",))
    load(layer_of("nf4"), {"zeros": state["scales"]})
    load(layer_of("nf4"), {"inner.codes": state["codes"]})
    load(layer_of("nf4", bias=False), {})
    expected = (
        "format must be 'fp4_g64', got 'nf4'",
        r"shape must be (71, 96), got (70, 96)",
        "codes of a (70, 96) weight in format 'nf4' must be torch.uint8 of shape (70, 48)",
        "scales of a (70, 96) weight in format 'nf4' must be torch.float16",
        "holds NaN or inf",
        "meta device",
        "version must be 1, got 2",
        "_extra_state must hold format, version and shape, got 'nf4'",
        'Missing key(s) in state_dict: "scales"',
        'Missing key(s) in state_dict: "_extra_state"',
        'Unexpected key(s) in state_dict: "zeros"',
        'Unexpected key(s) in state_dict: "inner.codes"',
        'Unexpected key(s) in state_dict: "bias"',
    )
    for message, part in zip(messages, expected, strict=True):
        assert part in message


def test_bias_of_another_shape_is_refused() -> None:
    layer = layer_of("nf4")
    state = {**layer.state_dict(), "bias": torch.zeros(1)}
    with pytest.raises(RuntimeError, match=r"bias must have shape \(70,\), got \(1,\)"):
        layer.load_state_dict(state)


def test_loaded_tensors_are_the_modules_own() -> None:
    layer = layer_of("kmeans3")
    state = copy.deepcopy(layer.state_dict())
    fresh = QuantLinear(K, N, format="kmeans3")
    fresh.load_state_dict(state)
    for t in state.values():
        if isinstance(t, torch.Tensor):
            t.zero_()
    assert_same_tensors(fresh.quant_tensor(), layer.quant_tensor())


def test_non_strict_load_leaves_what_is_missing() -> None:
    layer = layer_of("nf4")
    before = layer.quant_tensor()
    result = layer.load_state_dict({"bias": torch.ones(N)}, strict=False)
    assert set(result.missing_keys) == {"codes", "scales", "_extra_state"}
    assert bool((layer.bias == 1).all())
    assert_same_tensors(layer.quant_tensor(), before)


def test_torch_save_and_load() -> None:
    layer = nn.Sequential(layer_of("nvfp4"), nn.ReLU())
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    fresh = nn.Sequential(QuantLinear(K, N, format="nvfp4"), nn.ReLU())
    fresh.load_state_dict(torch.load(file, weights_only=True))
    x = torch.randn(2, K)
    assert torch.equal(fresh(x), layer(x))


@pytest.mark.parametrize("name", (*MIXED, *TWO_LEVEL))
@pytest.mark.parametrize("copier", (copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))))
def test_copies_are_equal_and_independent(name: str, copier) -> None:
    layer = layer_of(name)
    made = copier(layer)
    x = torch.randn(2, K)
    assert torch.equal(made(x), layer(x))
    assert_same_tensors(made.quant_tensor(), layer.quant_tensor())
    assert not buffer_ids(made) & buffer_ids(layer)


@pytest.mark.parametrize("name", (*MIXED, *TWO_LEVEL))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32, torch.float64))
def test_a_cast_leaves_the_weight_alone(name: str, dtype: torch.dtype) -> None:
    layer = layer_of(name)
    before, buffers = layer.quant_tensor(), buffer_ids(layer)
    assert layer.to(dtype) is layer
    assert layer.bias.dtype == dtype
    assert_same_tensors(layer.quant_tensor(), before)
    assert buffer_ids(layer) == buffers


def test_embedding_rows_follow_a_cast() -> None:
    rows = QuantEmbedding.from_quant_tensor(random_weight(parse("q8_0"), N, K))
    before = rows.quant_tensor()
    assert rows.half()(torch.tensor([1])).dtype == torch.float16
    assert rows.to(torch.bfloat16)(torch.tensor([1])).dtype == torch.bfloat16
    assert_same_tensors(rows.quant_tensor(), before)


@pytest.mark.parametrize("name", (*MIXED, *TWO_LEVEL))
def test_a_move_converts_the_layout(name: str) -> None:
    """The meta device stands for one whose kernels read the canonical layout."""
    layer = layer_of(name)
    specs = {n: (t.shape, t.dtype) for n, t in layer.quant_tensor().tensors.items()}
    assert layer.layout == N16
    layer.to("meta", torch.bfloat16)
    assert layer.layout == CANONICAL
    assert {n: (t.shape, t.dtype) for n, t in layer.quant_tensor().tensors.items()} == specs
    assert all(t.is_meta for t in (*layer.buffers(), *layer.parameters()))
    layer.to_empty(device="cpu")
    assert layer.layout == N16
    assert {n: (t.shape, t.dtype) for n, t in layer.quant_tensor().tensors.items()} == specs
    source = layer_of(name)
    layer.load_state_dict(source.state_dict())
    assert_same_tensors(layer.quant_tensor(), source.quant_tensor())


def test_meta_forward_gives_shapes() -> None:
    layer = QuantLinear(K, N, format="nf4", device="meta")
    y = layer(torch.empty(2, 3, K, device="meta", dtype=torch.bfloat16))
    assert (y.shape, y.dtype, y.device.type) == ((2, 3, N), torch.bfloat16, "meta")


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = QuantEmbedding.from_quant_tensor(random_weight(parse("q8_0"), N, K))
        self.head = QuantLinear.tied_to(self.embedding)

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        return self.head(self.embedding(indices))

    def shared(self) -> bool:
        return buffer_ids(self.embedding) == buffer_ids(self.head) == buffer_ids(self)


def test_tied_modules_share_memory_through_everything() -> None:
    model = Tied()
    indices = torch.tensor([0, 5, 69])
    expected = model(indices)
    rows = reference.dequantize(model.embedding.quant_tensor())
    assert torch.equal(model.embedding(indices), rows[indices])
    assert model.shared()
    assert len(list(model.buffers())) == 3, "codes, scales, table: counted once"

    for made in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert made.shared()
        assert not buffer_ids(made) & buffer_ids(model)
        assert torch.equal(made(indices), expected)

    fresh = Tied()
    fresh.load_state_dict(model.state_dict())
    assert fresh.shared()
    assert torch.equal(fresh(indices), expected)

    moved = copy.deepcopy(model).to("meta").to_empty(device="cpu")
    assert moved.shared()
    moved.load_state_dict(model.state_dict())
    assert moved.shared()
    assert torch.equal(moved(indices), expected)

    assert model.to(torch.bfloat16).shared()


def test_state_dict_shows_that_modules_are_tied() -> None:
    state = Tied().state_dict()
    for name in ("codes", "scales"):
        assert state[f"embedding.{name}"].data_ptr() == state[f"head.{name}"].data_ptr()


def test_exports_are_freed_and_never_stale() -> None:
    layer = layer_of("kmeans3")
    first = layer.state_dict()
    assert layer.state_dict()["codes"] is first["codes"]
    layer.table.mul_(2)
    assert torch.equal(layer.state_dict()["table"], layer.table)
    layer.load_state_dict(layer_of("kmeans3").state_dict())
    codes = layer.state_dict()["codes"]
    assert codes.data_ptr() != first["codes"].data_ptr()
    del first, codes
    gc.collect()
    assert torch.equal(layer.state_dict()["codes"], layer.quant_tensor().codes)


def test_gradient_of_x_without_asking() -> None:
    """LoRA on top of a frozen layer."""
    layer = layer_of("nf4")
    x = torch.randn(3, K, requires_grad=True)
    layer(x).sum().backward()
    expected = layer.quant_tensor().dequantize().sum(0)
    # A sum of 70 numbers in another order.
    bound = N * 2**-23 * float(layer.quant_tensor().dequantize().abs().sum(0).max())
    assert float((x.grad - expected).abs().max()) <= bound


@pytest.mark.parametrize(
    ("name", "names"),
    (
        ("kmeans3_g32", ("scales", "table")),
        ("kmeans2_pr", ("table",)),
        ("int4_g32_bf16", ("scales", "bias")),
        ("uint4_zfloat_g32", ("zeros", "scales")),
        ("q4_1", ("zeros",)),
        ("kmeans4_g32_dq8", ("table", "bias")),
    ),
)
def test_training_lowers_the_loss_and_what_is_saved_is_what_is_computed(
    name: str, names: tuple[str, ...]
) -> None:
    layer = layer_of(name)
    target = nn.Linear(K, N)
    x = torch.randn(200, K)
    with torch.no_grad():
        y = 3 * target(x)
    start = layer.quant_tensor()
    learned = layer.train_parameters(names)
    assert {n for n, p in layer.named_parameters() if p.requires_grad} == set(names)
    assert {id(p) for p in learned} == {id(p) for p in layer.parameters() if p.requires_grad}
    assert_same_tensors(layer.quant_tensor(), start)
    assert torch.equal(layer(x), lowbit.linear(x, start, layer.bias))

    optimizer = torch.optim.Adam(learned, lr=0.02)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = F.mse_loss(layer(x), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0], losses

    state = layer.state_dict()
    fresh = QuantLinear(K, N, format=parse(name))
    fresh.load_state_dict(state)
    assert torch.equal(fresh(x), layer(x))
    again = layer_of(name)
    again.train_parameters(names)
    again.load_state_dict(state)
    assert torch.equal(again(x), layer(x))
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))

    trained = layer(x)
    assert layer.train_parameters(()) == []
    assert not any(p.requires_grad for p in layer.parameters())
    assert torch.equal(layer(x), trained)


def test_learnable_tensors_keep_their_dtype_and_layout_in_a_move() -> None:
    layer = layer_of("kmeans3_g32")
    layer.train_parameters(("scales", "table"))
    x = torch.randn(2, K, requires_grad=True)
    layer(x).sum().backward()
    before = layer.quant_tensor()
    layer.half()
    assert layer.bias.dtype == torch.float16
    for name in ("scales", "table"):
        p = layer.get_parameter(name)
        assert (p.dtype, p.grad.dtype) == (torch.float32, torch.float32)
    assert_same_tensors(layer.quant_tensor(), before)
    layer.to("meta")
    assert layer.get_parameter("scales").shape == (N, 3)
    assert all(t.is_meta for t in (*layer.buffers(), *layer.parameters()))


@pytest.mark.parametrize(
    ("name", "names", "error", "message"),
    (
        ("nf4", ("weight",), ValueError, r"names must be some of .* got \['weight'\]"),
        ("nf4", ("table",), ValueError, r"no learnable \['table'\]"),
        ("uint4", ("zeros",), ValueError, r"no learnable \['zeros'\]"),
        ("kmeans3_pr", ("scales",), ValueError, r"no learnable \['scales'\]"),
        ("mxfp4", ("scales",), NotImplementedError, "stored as 'e8m0'"),
        ("nvfp4", ("scales",), NotImplementedError, "stored as 'e4m3'"),
    ),
)
def test_what_cannot_be_learned(name: str, names, error, message: str) -> None:
    with pytest.raises(error, match=message):
        layer_of(name).train_parameters(names)


def test_learnable_weight_cannot_be_shared() -> None:
    layer = layer_of("kmeans3")
    layer.train_parameters(("table",))
    with pytest.raises(ValueError, match=r"\['table'\]"):
        QuantLinear.tied_to(layer)


def test_training_leaves_a_tied_module_alone() -> None:
    first = layer_of("kmeans3", bias=False)
    second = QuantLinear.tied_to(first)
    first.train_parameters(("table",))
    with torch.no_grad():
        first.get_parameter("table").mul_(2)
    x = torch.randn(1, K)
    assert not torch.equal(first(x), second(x))


@pytest.mark.parametrize("learn", (False, True))
def test_compile_without_graph_break(learn: bool) -> None:
    torch._dynamo.reset()
    rows = QuantEmbedding.from_quant_tensor(random_weight(parse("q8_0"), N, K))
    model = nn.Sequential(rows, layer_of("kmeans3_g32"), nn.ReLU())
    if learn:
        model[1].train_parameters(("table", "scales", "bias"))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for m in (2, 5):
        indices = torch.randint(0, N, (3, m))
        assert torch.equal(compiled(indices), model(indices))
    if learn:
        parameters = [p for p in model.parameters() if p.requires_grad]
        ours = torch.autograd.grad(compiled(indices).sum(), parameters)
        eager = torch.autograd.grad(model(indices).sum(), parameters)
        assert all(torch.equal(a, b) for a, b in zip(ours, eager, strict=True))


def test_export() -> None:
    layer = layer_of("nf4")
    x = torch.randn(4, K)
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim("m")},))
    x = torch.randn(7, K)
    assert torch.equal(program.module()(x), layer(x))


def test_repr_says_format_shape_and_bytes() -> None:
    layer = layer_of("nf4")
    size = sum(t.numel() * t.element_size() for t in layer.buffers())
    assert repr(layer) == (
        f"QuantLinear(in_features=96, out_features=70, bias=True, format=nf4, {size} bytes)"
    )
    rows = QuantEmbedding.from_quant_tensor(layer.quant_tensor(), torch.bfloat16, padding_idx=3)
    assert repr(rows) == (
        f"QuantEmbedding(70, 96, padding_idx=3, dtype=torch.bfloat16, format=nf4, {size} bytes)"
    )
