"""State dicts of packed layers: tensors alone, that other programs save, and loads that refuse what does not fit."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import nn
from torch.optim.swa_utils import AveragedModel

import lowbit
from lowbit import qat
from lowbit.formats import parse
from lowbit.nn import BinaryLinear, LLMInt8Linear, QuantConv2d, QuantEmbedding, QuantLinear
from weights import random_weight

# N is not a multiple of the lanes of any layout: padded rows must not reach a state dict.
N, K = 50, 96


def linear(name: str) -> Callable[[], nn.Module]:
    return lambda: QuantLinear.from_quant_tensor(
        random_weight(parse(name), N, K, seed=int(torch.randint(99, ()))), torch.randn(N)
    )


def static() -> nn.Module:
    layer = QuantLinear.from_linear(nn.Linear(K, N), "int4_row_a8")
    layer.set_input_scale(0.5)
    return layer


def trained() -> nn.Module:
    layer = QuantLinear.from_linear(nn.Linear(K, N), "nf4")
    layer.train_parameters(("scales", "bias"))
    return layer


def with_outlier_features() -> nn.Module:
    absmax = torch.ones(K)
    absmax[3] = 9
    return LLMInt8Linear.from_linear(nn.Linear(K, N), absmax=absmax)


def with_buffer() -> nn.Module:
    layer = QuantLinear.from_linear(nn.Linear(K, N), "nf4")
    layer.register_buffer("mask", torch.rand(3))
    layer.register_buffer("scratch", torch.rand(2), persistent=False)
    return layer


LAYERS: dict[str, Callable[[], nn.Module]] = {
    **{name: linear(name) for name in ("nf4", "uint4_zfloat", "q5_1", "nvfp4", "nf4_g64_dq8")},
    **{name: linear(name) for name in ("mxfp4", "kmeans3_pr", "nf4_o2", "ternary_trits", "e4m3")},
    "embedding": lambda: QuantEmbedding.from_embedding(nn.Embedding(N, K), "int8"),
    "convolution": lambda: QuantConv2d.from_conv(nn.Conv2d(3, 5, 3), "nf4"),
    "LLM.int8()": lambda: LLMInt8Linear.from_linear(nn.Linear(K, N)),
    "LLM.int8() of fixed features": with_outlier_features,
    "binary": lambda: BinaryLinear.from_linear(nn.Linear(K, N), "binary"),
    "static": static,
    "learnable": trained,
    "own buffer": with_buffer,
    "fake quantized": lambda: qat.FakeQuantLinear.from_linear(nn.Linear(K, N), qat.Spec(qat.TWN)),
}
every_layer = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)


def raw(t: torch.Tensor) -> bytes:
    return bytes(t.detach().contiguous().reshape(-1).view(torch.uint8).tolist())


def bits(module: nn.Module) -> dict[str, bytes]:
    return {name: raw(t) for name, t in module.state_dict().items()}


@every_layer
def test_a_state_dict_holds_tensors_that_fill_their_memory(make: Callable[[], nn.Module]) -> None:
    for name, t in make().state_dict().items():
        assert type(t) is torch.Tensor, name
        assert t.untyped_storage().nbytes() == t.numel() * t.element_size(), name
        assert t.detach().cpu().clone().numel() >= 0


@every_layer
def test_safetensors_writes_and_reads_models(make, tmp_path: Path) -> None:
    saved, other = nn.Sequential(make(), nn.Linear(3, 3)), nn.Sequential(make(), nn.Linear(3, 3))
    save_file(saved.state_dict(), tmp_path / "a.safetensors")
    other.load_state_dict(load_file(tmp_path / "a.safetensors"))
    assert bits(other) == bits(saved)
    save_model(saved, str(tmp_path / "b.safetensors"))
    third = nn.Sequential(make(), nn.Linear(3, 3))
    load_model(third, str(tmp_path / "b.safetensors"))
    assert bits(third) == bits(saved)


@every_layer
def test_torch_saves_loads_and_assigns(make, tmp_path: Path) -> None:
    saved = make()
    torch.save(saved.state_dict(), tmp_path / "x.pt")
    state = torch.load(tmp_path / "x.pt", weights_only=True)
    for assign in (False, True):
        other = make()
        other.load_state_dict(state, assign=assign)
        assert bits(other) == bits(saved)
    on_meta = make().to("meta")
    if not isinstance(on_meta, qat.FakeQuantLinear):
        on_meta.load_state_dict(state, assign=True)
        assert bits(on_meta) == bits(saved)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@every_layer
def test_a_distributed_checkpoint_loads_in_place(make, tmp_path: Path) -> None:
    dcp = pytest.importorskip("torch.distributed.checkpoint")
    saved, other = make(), make()
    dcp.save(saved.state_dict(), checkpoint_id=tmp_path, no_dist=True)
    state = other.state_dict()
    for t in state.values():
        t.detach().zero_()
    dcp.load(state, checkpoint_id=tmp_path, no_dist=True)
    other.load_state_dict(state)
    assert bits(other) == bits(saved)


@pytest.mark.parametrize("use_buffers", [False, True])
@every_layer
def test_averaging_keeps_integers(make, use_buffers: bool) -> None:
    model = nn.Sequential(make(), nn.Linear(2, 2))
    average = AveragedModel(model, use_buffers=use_buffers)
    for _ in range(3):
        average.update_parameters(model)
    assert bits(average.module) == bits(model)


@pytest.mark.parametrize("name", ["nf4", "nvfp4", "kmeans3_pr"])
def test_states_of_earlier_versions_load(name: str) -> None:
    layer, other = linear(name)(), linear(name)()
    stated = {"format": parse(name).spec, "version": 1, "shape": [N, K]}
    state = {**layer.state_dict(), "_extra_state": stated}
    other.load_state_dict(state)
    assert bits(other) == bits(layer)
    assert json.loads(bits(other)["_extra_state"]) == stated


def test_extra_state_under_the_meta_device() -> None:
    with torch.device("meta"):
        layer = QuantLinear(K, N, format="nf4")
        state = layer.get_extra_state()
    assert state.device.type == "cpu"
    layer.set_extra_state(state)
    assert layer.state_dict()["_extra_state"].device.type == "cpu"


def test_extra_state_that_is_none() -> None:
    layer = QuantLinear(K, N, format="nf4")
    for state, message in (
        (torch.zeros(9), "must be bytes of JSON, torch.uint8"),
        (torch.zeros(9, dtype=torch.uint8), "must be bytes of JSON, got b'"),
        (torch.zeros(9, dtype=torch.uint8, device="meta"), "meta device"),
        (torch.tensor([*b"[1]"], dtype=torch.uint8), "must hold format, version and shape"),
        ({"format": "nf4", "version": 1, "shape": None}, r"shape must be \(50, 96\), got None"),
    ):
        with pytest.raises(ValueError, match=message):
            layer.set_extra_state(state)


NO_TENSORS = [3, "codes", None, [1, 2], b"", {}, 1.5]


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("layer", [static, linear("nvfp4"), with_buffer, with_outlier_features])
def test_what_is_no_tensor_is_refused_and_nothing_changed(layer, assign: bool) -> None:
    module = nn.ModuleDict({"inner": layer()})
    before, state = bits(module), layer().state_dict()
    for name in state:
        for value in NO_TENSORS:
            changed = {f"inner.{k}": value if k == name else v for k, v in state.items()}
            with pytest.raises(RuntimeError) as caught:
                module.load_state_dict(changed, assign=assign)
            message = str(caught.value)
            assert "inner" in message
            assert name.rpartition(".")[2] in message
            packed_part = {k: v for k, v in bits(module).items() if "quantized" not in name}
            if not isinstance(module["inner"], LLMInt8Linear):
                assert packed_part == before


WRONG = {
    "int64": lambda t: torch.zeros(t.shape, dtype=torch.int64),
    "float64": lambda t: t.double(),
    "complex": lambda t: t.to(torch.complex64),
    "another shape": lambda t: torch.zeros(3, 3),
    "sparse": lambda t: t.to_sparse(),
    "meta": lambda t: t.to("meta"),
    "bool": lambda t: t.bool(),
}


@pytest.mark.parametrize("kind", WRONG)
def test_assign_takes_no_bias_that_forward_refuses(kind: str) -> None:
    module = linear("nf4")()
    before = bits(module)
    state = {**linear("nf4")().state_dict()}
    state["bias"] = WRONG[kind](state["bias"])
    with pytest.raises(RuntimeError, match="bias"):
        module.load_state_dict(state, assign=True)
    assert bits(module) == before
    module(torch.randn(2, K))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_assign_takes_the_dtype_of_a_bias(dtype: torch.dtype) -> None:
    module = linear("nf4")()
    module.load_state_dict({**module.state_dict(), "bias": torch.ones(N, dtype=dtype)}, assign=True)
    assert module.bias.dtype == dtype
    assert not module.bias.requires_grad
    module(torch.randn(2, K))


def test_load_hooks_of_a_packed_layer_are_called() -> None:
    module, seen = linear("nf4")(), []
    module.register_load_state_dict_pre_hook(lambda *_: seen.append("pre"))
    module.register_load_state_dict_post_hook(lambda *_: seen.append("post"))
    module.load_state_dict(module.state_dict())
    assert seen == ["pre", "post"]


def test_modules_that_share_a_weight_have_no_buffers_of_their_own() -> None:
    embedding = QuantEmbedding.from_embedding(nn.Embedding(N, K), "nf4")
    embedding.register_buffer("mask", torch.ones(2))
    with pytest.raises(ValueError, match=r"no buffers beside it, got \['mask'\]"):
        QuantLinear.tied_to(embedding)


@pytest.mark.parametrize("name", ["nf4", "nvfp4", "int8", "e4m3"])
def test_accelerate_saves_and_offloads(name: str, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")

    def model() -> nn.Module:
        made = nn.Sequential(nn.Linear(64, 50), nn.ReLU(), nn.Linear(50, 10)).eval()
        lowbit.quantize_model(made, name, progress=False)
        return made

    x = torch.randn(3, 64)
    kept = model()
    with torch.no_grad():
        expected = kept(x)
        on_cpu, on_disk = copy.deepcopy(kept), copy.deepcopy(kept)
        accelerate.cpu_offload(on_cpu, execution_device=torch.device("cpu"))
        accelerate.disk_offload(on_disk, str(tmp_path / "d"), execution_device=torch.device("cpu"))
        for offloaded in (on_cpu, on_disk):
            assert torch.equal(offloaded(x), expected)
            assert torch.equal(offloaded(x), expected)
    accelerate.Accelerator(cpu=True).save_model(kept, str(tmp_path / "saved"))
    other = model()
    other.load_state_dict(load_file(tmp_path / "saved" / "model.safetensors"))
    assert bits(other) == bits(kept)


@pytest.mark.parametrize("tied", [False, True])
def test_transformers_saves(tied: bool, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")

    def model(format: str = "nf4") -> nn.Module:
        config = transformers.LlamaConfig(
            vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
            num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=tied,
        )  # fmt: skip
        made = transformers.LlamaForCausalLM(config).eval()
        lowbit.quantize_model(made, {".*": format}, skip=(), progress=False)
        return made

    saved, other = model(), model()
    saved.save_pretrained(tmp_path)
    other.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=not tied)
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    assert again.state_dict().keys() == saved.state_dict().keys()
    ids = torch.arange(8)[None]
    with torch.no_grad():
        for loaded in (other, again):
            assert torch.equal(loaded(ids).logits, saved(ids).logits)
    with pytest.raises(RuntimeError, match="format must be 'fp4'"):  # tensors of the same shapes
        model("fp4").load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
