"""Layers of serving programs from lowbit checkpoints: which are packed, their tensors one by one, cut and joined."""

from __future__ import annotations

import itertools
import pickle
from pathlib import Path

import pytest
import torch
from ranks import FORMATS
from torch import Tensor, nn

import lowbit
from lowbit.formats import parse
from lowbit.integrations.served import Catalog, Pieces, Place, Product, Rows, rows_between
from lowbit.io.readers.codes import weight_of_words
from lowbit.io.readers.native import NativeReader
from lowbit.weights.quantized import QuantTensor
from lowbit.weights.slices import stacked
from weights import random_weight

PACKED = {"qkv": ["q", "k", "v"], "gate_up": ["gate", "up"]}
K = 192


class Attention(nn.Module):
    def __init__(self, k: int = K) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(k, n) for n in (64, 32, 32))
        self.o = nn.Linear(64, k)
        self.norm = nn.LayerNorm(k)


def saved(path: Path, rules: object) -> Path:
    model = nn.ModuleDict({"attn": Attention(), "head": nn.Linear(K, 50, bias=False)})
    lowbit.quantize_model(model, rules, skip=())
    return lowbit.save(model, path)


def read(pieces: Pieces, path: Path) -> Pieces:
    """Gives the tensors of the shards over, in the order of the file."""
    reader = NativeReader(path)
    for i, shard in enumerate(pieces.shards):
        if shard.stored is None:
            pieces.take(i, "weight", reader.tensor(f"{shard.name}.weight"))
            continue
        weight = reader.weight(shard.name)
        for name, t in weight.to_file().items():
            pieces.take(i, name, t)
    return pieces


def dense(weights: list[QuantTensor | Tensor]) -> Tensor:
    return torch.cat([w.dequantize() if isinstance(w, QuantTensor) else w for w in weights])


def test_shards_of_layers(tmp_path: Path) -> None:
    path = saved(tmp_path, {"attn.k": None, "attn": "int4_g32", "head": "int8_g32"})
    found = Catalog.of(path.parent)
    assert [s.name for s in found.shards("attn.qkv", PACKED)] == ["attn.q", "attn.k", "attn.v"]
    assert [s.stored is None for s in found.shards("attn.qkv", PACKED)] == [False, True, False]
    assert [s.name for s in found.shards("attn.o", PACKED)] == ["attn.o"]
    assert found.shards("attn.norm", PACKED) == []
    assert found.shards("other.qkv", PACKED) == []
    renamed = pickle.loads(pickle.dumps(found.renamed(lambda name: f"model.{name}")))
    assert renamed.shards("model.attn.qkv", PACKED)[0].stored == found.layers["attn.q"]
    assert found.renamed(lambda name: None).layers == {}


def test_a_tied_head_has_the_layer_of_the_embedding(tmp_path: Path) -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(50, K), "head": nn.Linear(K, 50, bias=False)})
    model["head"].weight = model["embed"].weight
    lowbit.quantize_model(model, {"embed|head": "int8_g32"}, skip=())
    found = Catalog.of(lowbit.save(model, tmp_path))
    assert set(found.layers) == {"embed"}
    assert found.shards("head", {})[0].stored == found.layers["embed"]


def test_a_folder_of_others_is_refused(tmp_path: Path) -> None:
    lowbit_free = tmp_path / "model.safetensors"
    from safetensors.torch import save_file

    save_file({"a.weight": torch.zeros(2, 2)}, lowbit_free)
    with pytest.raises(ValueError, match="no file of the checkpoint has the metadata"):
        Catalog.of(tmp_path)


def test_pieces_are_the_weights_of_the_file(tmp_path: Path) -> None:
    path = saved(tmp_path, {"attn.k": None, "attn": "nf4_g32_dq8", "head": "int8_g32"})
    pieces = Pieces(Catalog.of(path).shards("attn.qkv", PACKED))
    assert pieces.dtypes().keys() >= {"codes", "scales", "scales2", "weight"}
    made = [weight for weight, _ in read(pieces, path).weights()]
    reader = NativeReader(path)
    want = [
        reader.layer(f"attn.{n}") if n != "k" else reader.tensor("attn.k.weight") for n in "qkv"
    ]
    assert torch.equal(dense(made), dense(want))


def test_what_is_missing_or_too_much_is_named(tmp_path: Path) -> None:
    path = saved(tmp_path, "int4_g32")
    shards = Catalog.of(path).shards("attn.qkv", PACKED)
    pieces = Pieces(shards)
    with pytest.raises(ValueError, match=r"attn\.q: format 'int4_g32' has the tensors"):
        pieces.weights()
    pieces.take(1, "codes", torch.zeros(1))
    with pytest.raises(ValueError, match=r"attn\.k: got 'codes' twice"):
        pieces.take(1, "codes", torch.zeros(1))
    with pytest.raises(ValueError, match="is 3 linears of the checkpoint, got a tensor 'codes' of"):
        pieces.take(3, "codes", torch.zeros(1))
    pieces = read(Pieces(shards), path)
    pieces.take(2, "weight", torch.zeros(32, K))
    with pytest.raises(ValueError, match=r"attn\.v: the checkpoint has the layer packed, and a de"):
        pieces.weights()
    mixed = Pieces(
        Catalog.of(saved(tmp_path / "b", {"attn.k": None, "attn": "int4_g32"})).shards(
            "attn.qkv", PACKED
        )
    )
    with pytest.raises(ValueError, match=r"attn\.k\.weight must be a dense matrix, got nothing"):
        read_without_dense(mixed, tmp_path / "b").weights()


def read_without_dense(pieces: Pieces, path: Path) -> Pieces:
    reader = NativeReader(path)
    for i, shard in enumerate(pieces.shards):
        for name, t in reader.weight(shard.name).to_file().items() if shard.stored else ():
            pieces.take(i, name, t)
    return pieces


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("world", (1, 2))
def test_parts_of_processes_are_the_whole(format: str, world: int) -> None:
    """Of a layer of three matrices, two of which have as many parts as there are heads: here, one."""
    weights = [random_weight(parse(format), n, K, seed) for seed, n in enumerate((64, 32, 32))]
    names = ["q", "k", "v"]
    sizes = (64 // world, 32, 32)
    made = [Place(r, world, sizes, K).cut(weights, names) for r in range(world)]
    assert torch.equal(dense([m[0] for m in made]), weights[0].dequantize())
    for parts in made:
        assert torch.equal(dense(parts[1:]), dense(weights[1:]))


@pytest.mark.parametrize("format", ("nf4_g32", "nf4_g32_dq8", "int4_g32_o3", "kmeans3_pr"))
def test_matrices_that_are_one_in_the_file(format: str) -> None:
    whole = random_weight(parse(format), 128, K)
    want, starts = whole.dequantize(), (0, 64, 96)
    for rank in range(2):
        made = Place(rank, 2, (32, 32, 16), K, (2, 1, 2)).cut([whole], ["qkv"])
        rows = [want[64 * 0 + 32 * rank :][:32], want[64:96], want[96 + 16 * rank :][:16]]
        assert [tuple(m.shape) for m in made] == [(32, K), (32, K), (16, K)]
        assert torch.equal(dense(made), torch.cat(rows))
    assert starts[2] == 96


@pytest.mark.parametrize("format", ("nf4_g32", "nf4_g32_dq8", "int4_g64", "km4"))
def test_columns_of_processes_are_the_whole(format: str) -> None:
    weight = random_weight(parse(format), 40, K)
    parts = [Place(r, 4, (40,), K // 4).cut([weight], ["o"])[0] for r in range(4)]
    assert torch.equal(torch.cat([dense([p]) for p in parts], 1), weight.dequantize())


def test_what_cannot_be_cut_is_named() -> None:
    weight = random_weight(parse("int4_g32"), 66, K)
    with pytest.raises(ValueError, match="layer.o: 4 processes cannot have 16 of its 66 rows each"):
        Place(0, 4, (16,), K).cut([weight], ["layer.o"])
    with pytest.raises(ValueError, match="layer.o: 5 processes cannot have 38 of its 192 columns"):
        Place(0, 5, (66,), 38).cut([weight], ["layer.o"])
    trellis = random_weight(parse("nvfp4"), 64, 176)
    with pytest.raises(
        ValueError, match=r"layer\.o: a 64 x 176 weight in format 'nvfp4' .* for 2 ran"
    ):
        Place(0, 2, (64,), 88).cut([trellis], ["layer.o"])


KINDS = ("int4_g32", "nf4_g32_dq8", "int4_g32_o3", "int4_g32_a8", "dense")


@pytest.mark.parametrize("formats", list(itertools.combinations_with_replacement(KINDS, 2)))
@pytest.mark.parametrize("bias", (False, True))
def test_products_are_those_of_the_parts(formats: tuple[str, str], bias: bool) -> None:
    weights = [
        torch.randn(n, K) if f == "dense" else random_weight(parse(f), n, K, seed)
        for seed, (f, n) in enumerate(zip(formats, (48, 33), strict=True))
    ]
    product = Product(weights)
    x = torch.randn(5, K)
    b = torch.randn(81) if bias else None
    parts = [None, None] if b is None else b.split((48, 33))
    want = torch.cat([
        nn.functional.linear(x, w, p) if isinstance(w, Tensor) else lowbit.linear(x, w, p)
        for w, p in zip(weights, parts, strict=True)
    ], -1)  # fmt: skip
    found = product(x, b)
    assert found.shape == (5, 81)
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)
    assert torch.equal(product.dequantize(torch.float32), dense(weights))


def test_neighbours_of_one_format_are_one_weight() -> None:
    weights = [random_weight(parse("int4_g32"), 32, K, seed) for seed in range(3)]
    assert len(Product(weights).parts) == 1
    tables = [random_weight(parse("km4"), 32, K, seed) for seed in range(2)]
    assert len(Product(tables).parts) == (1 if stacked(tables) else 2)
    assert len(Product([weights[0], torch.randn(4, K), weights[1]]).parts) == 3


def test_extras_stay_with_their_weight() -> None:
    order = torch.randperm(K)
    a, b = (random_weight(parse("int4_g32"), 32, K, seed) for seed in range(2))
    product = Product([a, b], [{"input_order": order}, {}])
    x = torch.randn(3, K)
    want = torch.cat([lowbit.linear(x[:, order], a), lowbit.linear(x, b)], -1)
    assert torch.equal(product(x), want)
    assert torch.equal(product.dequantize(torch.float32)[:32][:, order], a.dequantize())
    with pytest.raises(ValueError, match="input_order must hold each of 0 .. 191 once"):
        Product([a], [{"input_order": order[:5]}])


def test_a_static_scale_is_used() -> None:
    a = random_weight(parse("int4_g32_a8"), 32, K)
    layer = lowbit.nn.QuantLinear.from_quant_tensor(a)
    layer.set_input_scale(0.05)
    x = torch.randn(3, K)
    assert torch.equal(Product([a], [{"input_scale": torch.tensor(0.05)}])(x), layer(x))


def test_rows_and_padded_products() -> None:
    weight = random_weight(parse("int8_g32"), 50, K)
    held = Rows(weight, torch.float32)
    ids = torch.tensor([[0, 49], [7, 7]])
    assert torch.equal(held(ids), weight.dequantize()[ids])
    x = torch.randn(3, K)
    y = held.product(x, None, 64)
    assert torch.equal(y[:, :50], lowbit.linear(x, weight))
    assert y.shape == (3, 64)
    assert not y[:, 50:].any()
    assert len(list(held.buffers())) == len({id(b) for b in held.buffers()})


@pytest.mark.parametrize("format", FORMATS)
def test_rows_between(format: str) -> None:
    weight = random_weight(parse(format), 42, K)
    assert rows_between(weight, 0, 42) is weight
    part = rows_between(weight, 5, 31)
    assert torch.equal(part.dequantize(), weight.dequantize()[5:31])


@pytest.mark.parametrize("format", FORMATS)
def test_stacked_weights_are_one_below_the_other(format: str) -> None:
    same = random_weight(parse(format), 42, K)
    whole = stacked([same, same])
    assert stacked([same]) is same
    if whole is None:
        # Only where something is not of a row.
        assert same.scales2 is not None or same.table is not None or same.format.rank
    else:
        assert torch.equal(whole.dequantize(), same.dequantize().repeat(2, 1))
    assert stacked([same, random_weight(parse(format), 8, 64)]) is None


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("asymmetric", (False, True))
@pytest.mark.parametrize("group", (32, K))
def test_words_of_integers(bits: int, asymmetric: bool, group: int) -> None:
    n, groups = 40, K // group
    codes = torch.randint(2**bits, (n, K), dtype=torch.uint8)
    zeros = torch.randint(2**bits, (groups, n), dtype=torch.uint8)
    scales = torch.rand(n, groups).add(0.5).to(torch.bfloat16)
    made = weight_of_words(
        words(codes, bits), scales, words(zeros, bits) if asymmetric else None, bits, (n, K), group
    )
    zero = zeros.t().float() if asymmetric else torch.full((n, groups), 2.0 ** (bits - 1))
    each = [t.float().repeat_interleave(group, 1) for t in (zero, scales)]
    assert torch.equal(made.validate().dequantize(), (codes.float() - each[0]) * each[1])
    with pytest.raises(ValueError, match="words must have shape"):
        weight_of_words(words(codes, bits)[:, 1:], scales, None, bits, (n, K), group)
    with pytest.raises(ValueError, match="scales must have shape"):
        weight_of_words(words(codes, bits), scales[1:], None, bits, (n, K), group)


def words(codes: Tensor, bits: int) -> Tensor:
    """Rows of codes as little-endian streams of int32, the last word padded."""
    bit = (codes.unsqueeze(-1).long() >> torch.arange(bits)) & 1
    flat = nn.functional.pad(bit.flatten(1), (0, -codes.shape[1] * bits % 32)).view(
        len(codes), -1, 32
    )
    values = (flat << torch.arange(32)).sum(-1)
    return torch.where(values >= 2**31, values - 2**32, values).to(torch.int32)
