"""GPTQ folders: every width, zeros of both versions, act-order, planes and rules, against the formula written here;
and GPTQModel's own layer, where it is installed.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import check_layers, check_model, linears, save_state, stream, tiny, write_folder
from safetensors.torch import load_file, save_file
from torch import Tensor

import lowbit
from lowbit.io.readers.gptq import GPTQReader
from lowbit.io.readers.registry import open_checkpoint
from lowbit.nn import QuantLinear, ReorderedLinear

PLANES = {3: (2, 1), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1)}


def settings(bits: int, group: int, **more: Any) -> dict[str, Any]:
    own = {"quant_method": "gptq", "bits": bits, "group_size": group, "sym": False}
    return {**own, "desc_act": False, **more}


def planar(codes: Tensor, bits: int) -> Tensor:
    """For every 32 codes of a row a plane of each width in turn."""
    rows, count = codes.shape
    words, shift = [], 0
    for width in PLANES[bits]:
        part = (codes >> shift) & ((1 << width) - 1)
        words.append(stream(part.view(-1, 32), width).view(rows, count // 32, width))
        shift += width
    return torch.cat(words, -1).flatten(1)


def packer(
    bits: int,
    group: int,
    *,
    plus_one: bool = True,
    sym: bool = False,
    index: Callable[[int], Tensor | None] = lambda k: None,
    pack: Callable[[Tensor, int], Tensor] = stream,
) -> Any:
    def one(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        n, k = weight.shape
        size = k if group == -1 else group
        groups = -(-k // size)
        codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8)
        zeros = torch.randint(0, 2**bits, (groups, n), dtype=torch.uint8)
        if sym:
            zeros[:] = 2 ** (bits - 1)
        scales = (torch.rand(groups, n) * 0.02 + 0.001).half()
        g_idx = index(k)
        of = torch.arange(k) // size if g_idx is None else g_idx.long()
        stored = (zeros + 2**bits - 1) & (2**bits - 1) if plus_one else zeros
        tensors = {
            "qweight": pack(codes, bits).t(),
            "qzeros": pack(stored, bits),
            "scales": scales,
        }
        if g_idx is not None:
            tensors["g_idx"] = g_idx
        # Exact in fp32. The libraries compute in fp16, which rounds this very product once.
        return tensors, scales.float().t()[:, of] * (codes.float() - zeros.float().t()[:, of])

    return one


CASES = {
    **{f"{bits} bits": (settings(bits, 32), packer(bits, 32)) for bits in (2, 3, 4, 8)},
    "v2": (settings(4, 32, checkpoint_format="gptq_v2"), packer(4, 32, plus_one=False)),
    "symmetric": (settings(4, 32, sym=True), packer(4, 32, sym=True)),
    "symmetric v2": (settings(3, 32, sym=True, checkpoint_format="gptq_v2"), packer(3, 32, plus_one=False, sym=True)),
    "whole rows": (settings(4, -1), packer(4, -1)),
    "straight g_idx": (settings(4, 32), packer(4, 32, index=lambda k: (torch.arange(k) // 32).int())),
    "short last group": (settings(4, 40), packer(4, 40)),
    **{
        f"planes of {bits}": (
            settings(bits, 32, checkpoint_format="gptq_p"), packer(bits, 32, plus_one=False, pack=planar)
        )
        for bits in PLANES
    },
    "4 bits in planes": (settings(4, 32, checkpoint_format="gptq_p"), packer(4, 32, plus_one=False)),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_layers_are_exact(tmp_path: Path, case: str) -> None:
    quantization, pack = CASES[case]
    model = write_folder(tmp_path, quantization, pack)
    found = check_layers(tmp_path, model, torch.float16)
    for weight in found.values():
        assert weight.format.zero == (None if "symmetric" in case else "int")
        width = quantization["bits"] + (quantization["bits"] == 7)
        assert weight.format.bits == width


def shuffled(k: int, group: int = 32) -> Tensor:
    return (torch.arange(k) // group)[torch.randperm(k)].int()


def test_act_order_is_exact(tmp_path: Path) -> None:
    pack = packer(4, 32, index=shuffled)
    model = write_folder(tmp_path, settings(4, 32, desc_act=True), pack)
    check_layers(tmp_path, model, torch.float16)
    loaded = check_model(tmp_path, model)
    layer = loaded.model.layers[0].mlp.down_proj
    assert type(layer) is ReorderedLinear
    dense = model.model.layers[0].mlp.down_proj.weight
    assert torch.equal(layer.weight + 0, dense)
    # It is still what it was after a file of lowbit's own.
    lowbit.save(loaded, tmp_path / "own.safetensors")
    again = tiny()
    lowbit.load(again, tmp_path / "own.safetensors")
    other = again.model.layers[0].mlp.down_proj
    assert type(other) is ReorderedLinear
    assert torch.equal(other.input_order, layer.input_order)
    x = torch.randn(3, dense.shape[1])
    assert torch.equal(other(x), layer(x))


def test_groups_of_unequal_columns_are_dense_or_requantized(tmp_path: Path) -> None:
    """No permutation makes groups of one size of them."""
    pack = packer(4, 32, index=lambda k: (torch.arange(k) > 8).int())
    model = write_folder(tmp_path, settings(4, 32), pack)
    with pytest.warns(
        UserWarning, match=r"no format holds 7 layers exactly \(its groups are not all"
    ):
        loaded = check_model(tmp_path, model)
    assert not any(isinstance(m, QuantLinear) for m in loaded.modules())
    anew = lowbit.load_model(tmp_path, format="int8_g32")
    assert anew.model.layers[0].mlp.up_proj.format.name == "int8_g32"


@pytest.mark.parametrize(("says", "is_v1"), [("gptq", False), ("gptq_v2", True)])
def test_a_file_that_names_the_wrong_zeros_is_read_right(
    tmp_path: Path, says: str, is_v1: bool
) -> None:
    quantization = settings(4, 32, sym=True, checkpoint_format=says)
    model = write_folder(tmp_path, quantization, packer(4, 32, plus_one=is_v1, sym=True))
    with pytest.warns(UserWarning, match=f"checkpoint_format is '{says}', and all zeros are"):
        found = check_layers(tmp_path, model, torch.float16)
    assert {weight.format.zero for weight in found.values()} == {None}


def test_zeros_that_contradict_sym_are_kept(tmp_path: Path) -> None:
    model = write_folder(tmp_path, settings(4, 32, sym=True), packer(4, 32))
    with pytest.warns(UserWarning, match="sym is true and zeros are not all 8"):
        check_layers(tmp_path, model, torch.float16)


def test_rules_choose_bits_by_name(tmp_path: Path) -> None:
    rules = {
        r"-:.*k_proj": {},
        r"+:.*mlp.*": {"bits": 8, "group_size": 16},
        ".*q_proj": {"bits": 2},
    }
    four, eight, two = packer(4, 32), packer(8, 16), packer(2, 32)

    def pack(name: str, weight: Tensor) -> Any:
        return (eight if "mlp" in name else two if "q_proj" in name else four)(name, weight)

    skip = ("lm_head", "model.layers.0.self_attn.k_proj")
    model = write_folder(tmp_path, settings(4, 32, dynamic=rules), pack, skip=skip)
    found = check_layers(tmp_path, model, torch.float16, skip)
    widths = {name.rpartition(".")[2]: w.format.bits for name, w in found.items()}
    assert widths == dict(q_proj=2, v_proj=4, o_proj=4, gate_proj=8, up_proj=8, down_proj=8)
    check_model(tmp_path, model)


@pytest.mark.parametrize("kind", ["Llama", "Qwen2"])
@pytest.mark.parametrize(
    ("tied", "head", "shards"), [(True, False, 1), (False, True, 3), (False, False, 2)]
)
def test_models_run(tmp_path: Path, kind: str, tied: bool, head: bool, shards: int) -> None:
    """Tied and quantized heads, shards, and biases (Qwen2)."""
    skip = () if head else ("lm_head",)
    quantization = settings(4, 32, lm_head=head)
    model = write_folder(
        tmp_path, quantization, packer(4, 32), model=tiny(kind, tied), skip=skip, shards=shards
    )
    loaded = check_model(tmp_path, model)
    assert isinstance(loaded.lm_head, QuantLinear) == head
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    assert not hasattr(loaded.config, "quantization_config")


def test_a_bias_that_only_the_file_has_counts(tmp_path: Path) -> None:
    """AutoGPTQ writes zeros for every layer without one."""
    pack = packer(4, 32)

    def biased(name: str, weight: Tensor) -> Any:
        tensors, decoded = pack(name, weight)
        value = 1.0 if "q_proj" in name else 0.0
        return {**tensors, "bias": torch.full((len(weight),), value).half()}, decoded

    write_folder(tmp_path, settings(4, 32), biased)
    attention = lowbit.load_model(tmp_path).model.layers[0].self_attn
    assert attention.q_proj.bias.unique().tolist() == [1]
    assert attention.k_proj.bias is None


def test_the_log_says_what_became_of_it(tmp_path: Path, caplog) -> None:
    model = write_folder(tmp_path, settings(4, 32), packer(4, 32))
    with caplog.at_level("INFO", "lowbit"):
        lowbit.load_model(tmp_path, format="int8_g32", dtype=torch.bfloat16)
    assert caplog.messages == [
        f"{tmp_path}: gptq; 0 layers packed as stored; 7 layers requantized (7 int8_g32); 2 dense "
        "(model.embed_tokens, lm_head); 78.6 % of the weights are packed"
    ]
    del model


def damage(path: Path, name: str, change: Callable[[Tensor], Tensor | None]) -> None:
    state = load_file(path / "model.safetensors")
    changed = change(state.pop(name))
    save_state(path, state if changed is None else {**state, name: changed.contiguous()})


LAYER = "model.layers.0.self_attn.q_proj"
DAMAGES = {
    "no zeros": ("qzeros", lambda t: None, "qzeros is missing"),
    "no codes": ("qweight", lambda t: None, r"lacks 1 tensors: model\.layers"),
    "cut codes": ("qweight", lambda t: t[:-1], "scales must have 2 groups of 32 for 56 in features|shape"),
    "fewer groups": ("scales", lambda t: t[:1], "scales must have 2 groups of 32 for 64 in features, got 1"),
    "fewer zeros": ("qzeros", lambda t: t[:, :-1], "qzeros must have 8 words a group for 64 out features of 4 bits"),
    "float codes": ("qweight", lambda t: t.float(), "qweight must be int32 or"),
    "integer scales": ("scales", lambda t: t.int(), "scales must be float32 or float16 or bfloat16, got int32"),
    "NaN": ("scales", lambda t: t * torch.nan, "scales of a .* weight holds NaN"),
    "index too large": ("g_idx", lambda t: t + 1, r"g_idx must be in \[0, 2\), got 2"),
    "short index": ("g_idx", lambda t: t[1:], r"g_idx must have shape \(64\), got \(63,\)"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGES)
def test_damage_is_named(tmp_path: Path, case: str) -> None:
    part, change, message = DAMAGES[case]
    write_folder(
        tmp_path, settings(4, 32), packer(4, 32, index=lambda k: (torch.arange(k) // 32).int())
    )
    damage(tmp_path, f"{LAYER}.{part}", change)
    with pytest.raises(ValueError, match=message) as error:
        lowbit.load_model(tmp_path)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 9}, r"bits of the configuration must be one of \(2, 3, 4, 5, 6, 7, 8\), got 9"),
        ({"bits": "4"}, "bits of the configuration must be one of .* got '4'"),
        ({"bits": 3}, "layer .*: scales must have 4 groups of 32 for 128 in features, got 3"),
        ({"group_size": 48}, "scales must have|must have 2 groups of 48"),
        ({"group_size": 0}, "group_size of the configuration must be a positive integer, got 0"),
        (
            {"checkpoint_format": "marlin"},
            r"checkpoint_format must be one of \('gptq', .* got 'marlin'",
        ),
        ({"dynamic": {"-:.*q_proj": {}}}, "the dynamic rule '-:.*q_proj' leaves it dense"),
        ({"dynamic": [1]}, "dynamic must map names to settings, got"),
    ],
)
def test_a_contradicting_configuration_is_named(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    write_folder(tmp_path, {**settings(4, 32), **change}, packer(4, 32))
    with pytest.raises(ValueError, match=message) as error:
        open_checkpoint(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_missing_shards_and_tensors_are_named(tmp_path: Path) -> None:
    write_folder(tmp_path, settings(4, 32), packer(4, 32), shards=2)
    shard = tmp_path / "model-00002-of-00002.safetensors"
    state = load_file(shard)
    gone = sorted(state)[0]
    save_file({name: t for name, t in state.items() if name != gone}, shard)
    with pytest.raises(
        ValueError, match=f"{shard.name}: lacks tensor '{re.escape(gone)}' that the index names"
    ):
        open_checkpoint(tmp_path)
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=shard.name):
        lowbit.load_model(tmp_path)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("kind", ["gptq", "gptq_v2", "gptq_p"])
def test_as_gptqmodel(tmp_path: Path, bits: int, kind: str) -> None:
    """Its own packer and its own dequantization, with a random g_idx."""
    qlinear = pytest.importorskip("gptqmodel.nn_modules.qlinear.torch")
    formats = pytest.importorskip("gptqmodel.quantization.config").FORMAT

    def pack(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        n, k = weight.shape
        g_idx = shuffled(k)
        layer = qlinear.TorchLinear(
            bits, 32, False, True, k, n, format=getattr(formats, kind.upper())
        )
        dense = torch.nn.Linear(k, n, bias=False)
        scales = torch.rand(n, k // 32) * 0.02 + 0.01
        zeros = torch.randint(0, 2**bits, (n, k // 32)).float()
        dense.weight.data = weight
        layer.pack_original(dense, scales, zeros, g_idx=g_idx)
        layer.post_init()
        decoded = layer.dequantize_weight().t().float()
        tensors = {p: getattr(layer, p).clone() for p in ("qweight", "qzeros", "scales", "g_idx")}
        return tensors, decoded

    stored = "gptq_p" if kind == "gptq_p" else "gptq_v2"  # what the layer holds in memory
    model = write_folder(tmp_path, settings(bits, 32, checkpoint_format=stored), pack)
    check_layers(tmp_path, model, torch.float16)


def test_every_tensor_of_a_layer_is_described(tmp_path: Path) -> None:
    model = write_folder(tmp_path, settings(4, 32), packer(4, 32))
    reader = open_checkpoint(tmp_path)
    assert isinstance(reader, GPTQReader)
    rows = {row.name: row for row in reader.describe()}
    for name, module in linears(model).items():
        n, k = module.weight.shape
        assert rows[name].shape == (n, k)
        assert rows[name].format == "uint4_g32_fp16"
        assert rows[name].nbytes == n * k // 2 + n * (k // 32) // 2 + 2 * n * (k // 32)
    assert not rows["lm_head.weight"].quantized
