"""GGUF files of mixtures of experts: the model that was converted comes back, its experts packed as stored."""

from __future__ import annotations

import copy
import functools
import tempfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("gguf")
pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from gguf import GGMLQuantizationType as GGMLType
from gguf_architectures import of_config
from gguf_converted import KINDS, make
from gguf_moe import MOE, MXFP4
from test_fuzz_readers import edits, fuzz, overwrite
from test_gguf_models import TOKENS, bound
from test_gguf_models_bad import output_of
from transformers import AutoModelForCausalLM

import lowbit
from gguf_files import random_blocks, write
from lowbit.decoder.compiled import CompiledDecoder
from lowbit.decoder.runner import Runner
from lowbit.integrations.quantizing import dequantize_modules
from lowbit.integrations.transformers import load_gguf, load_gguf_decoded, packed_modules
from lowbit.io.readers.gguf import GGUFFile
from lowbit.io.readers.gguf_blocks import BLOCK_TYPES
from lowbit.nn import JoinedLinear, QuantExperts

every_case = pytest.mark.parametrize("case", MOE)


def weight_of(model: Any, name: str) -> torch.Tensor:
    """The dense weight (N, K) of a linear, or of an expert by the name that a `QuantExperts` gives it."""
    owner, _, expert = name.rpartition(".")
    if not expert.isdigit():
        return model.get_submodule(name).weight.detach()
    owner, _, key = owner.rpartition(".")
    module = model.get_submodule(owner)
    half = {"gate_proj": 0, "up_proj": 1}.get(key)
    rows = module.get_parameter(key if half is None else "gate_up_proj").detach()[int(expert)]
    rows = rows.t() if module.is_transposed else rows
    if half is None:
        return rows
    return rows.chunk(2)[half] if module.is_concatenated else rows[half::2]


def assert_same_values(model: Any, oracle: Any) -> None:
    """Bit for bit."""
    for name, module in packed_modules(model):
        assert torch.equal(module.quant_tensor().dequantize(), weight_of(oracle, name)), name
    dense = {n for n, _ in model.named_parameters()} & {n for n, _ in oracle.named_parameters()}
    assert "model.norm.weight" in dense
    for name in dense:
        assert torch.equal(model.get_parameter(name), oracle.get_parameter(name)), name


@torch.inference_mode()
def assert_same(model: Any, oracle: Any) -> None:
    """Weights bit for bit, outputs within rounding, of all tokens at a time and one by one."""
    assert_same_values(model, oracle)
    expected = oracle(TOKENS[None]).logits[0]
    limit = bound(model.config, expected)
    assert (model(TOKENS[None]).logits[0] - expected).abs().max() < limit
    assert "is a " in CompiledDecoder.obstacle(model)
    runner = Runner(model, len(TOKENS))
    rows = [runner.forward(part).clone() for part in (TOKENS[:21], *TOKENS[21:, None])]
    assert (torch.stack(rows) - expected[20:]).abs().max() < limit


@every_case
def test_the_model_comes_back(tmp_path: Path, case: str) -> None:
    path, oracle = make(MOE[case], tmp_path)
    model = load_gguf(path, dtype=torch.float32)
    assert type(model) is type(oracle)
    own = {k: v for k, v in oracle.config.to_dict().items() if k in MOE[case].config}
    del own["rms_norm_eps"]  # of which the file has fp32
    assert own.items() <= model.config.to_dict().items()
    experts = [m for m in model.modules() if isinstance(m, QuantExperts)]
    assert [len(m) for m in experts] == [4, 4] * oracle.config.num_hidden_layers
    # Gates and what they multiply are one weight of the model.
    joint = [n for n in GGUFFile(path).tensors if n.endswith(("up_exps.weight", "up_shexp.weight"))]
    stored = [t for t in GGUFFile(path).tensors.values() if t.type in BLOCK_TYPES]
    expected = sum(t.shape[0] if len(t.shape) == 3 else 1 for t in stored) - 4 * len(joint)
    if "shared" in case:
        expected += 3 * len(joint) // 2  # an expert alone, and not four
    if case == "qwen2moe":
        expected += 4 * len(joint) // 2  # whose shared expert has them apart
    found = dict(packed_modules(model))
    assert len(found) == expected + oracle.config.tie_word_embeddings
    assert {m.format.name for m in found.values()} == {
        BLOCK_TYPES[t.type].format.name for t in stored
    }
    assert_same(model, oracle)
    if MOE[case].reads:
        assert_same(model, of_config(path, copy.deepcopy(oracle.config)))


@torch.inference_mode()
@pytest.mark.parametrize("case", ["mixtral", "granitemoe with a shared expert", "gpt-oss"])
def test_the_dense_model_comes_back(tmp_path: Path, case: str) -> None:
    path, oracle = make(MOE[case], tmp_path)
    model = load_gguf_decoded(path, torch.float32)
    assert not any(isinstance(m, QuantExperts) for m in model.modules())
    state = oracle.state_dict()
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    assert torch.equal(model(TOKENS[None])[0], oracle(TOKENS[None])[0])


@torch.inference_mode()
def test_mxfp4_as_gpt_oss_has_it(tmp_path: Path) -> None:
    """Quantized anew and saved, too: the experts of the layers, and neither the head nor what scores them."""
    path, oracle = make(MOE["gpt-oss"], tmp_path, MXFP4)
    model = lowbit.load_model(path, dtype=torch.float32)
    experts = [m for m in model.modules() if isinstance(m, QuantExperts)]
    assert {layer.format.name for m in experts for layer in m} == {"mxfp4"}
    assert_same(model, oracle)
    model.config.save_pretrained(tmp_path / "own")
    lowbit.save(model, tmp_path / "own" / "model.safetensors")
    again = lowbit.load_model(tmp_path / "own")
    assert torch.equal(again(TOKENS[None])[0], model(TOKENS[None])[0])
    anew = dict(packed_modules(load_gguf(path, dtype=torch.float32, format="nf4")))
    name = "model.layers.1.mlp.experts.gate_up_proj.3"
    expected = lowbit.quantize(weight_of(oracle, name).contiguous(), "nf4")
    assert torch.equal(anew[name].quant_tensor().dequantize(), expected.dequantize())
    assert anew["lm_head"].format.name == "q8_0"


@torch.inference_mode()
@pytest.mark.parametrize(
    ("case", "kind"), [("mixtral", None), ("mixtral", GGMLType.Q8_0), ("gpt-oss", GGMLType.Q8_0)]
)
def test_halves_of_two_types_are_kept_apart(
    tmp_path: Path, recwarn: Any, case: str, kind: GGMLType | None
) -> None:
    """Where a layer has them; saved and loaded, and dense again. gpt-oss has gates and the others by turns."""
    rng = np.random.default_rng(0)
    up = rng.standard_normal((4, 96, 64)).astype(np.float32) / 8
    stored = up if kind is None else gguf.quantize(up, kind)
    more = {"blk.1.ffn_up_exps.weight": (stored, kind)}
    path, oracle = make(MOE[case], tmp_path, more=more)
    module = oracle.model.layers[1].mlp.experts
    values = torch.from_numpy(up if kind is None else gguf.dequantize(stored, kind))
    if case == "mixtral":
        module.gate_up_proj.data[:, 96:] = values
    else:
        module.gate_up_proj.data[..., 1::2] = values.transpose(1, 2)
    model = load_gguf(path, dtype=torch.float32)
    assert not [w for w in recwarn if issubclass(w.category, UserWarning)]
    assert_same_values(model, oracle)
    expected = oracle(TOKENS[None, :9]).logits
    assert (model(TOKENS[None, :9]).logits - expected).abs().max() < bound(model.config, expected)
    assert model.model.layers[0].mlp.experts.gate_up_proj[2].format.name == "q4_0"
    experts = model.model.layers[1].mlp.experts
    assert experts.gate_proj[2].format.name == "q4_0"
    found = type(experts.up_proj[2])
    assert found is torch.nn.Linear if kind is None else experts.up_proj[2].format.name == "q8_0"
    if kind is None:
        assert torch.equal(experts.up_proj[2].weight, values[2])
    lowbit.save(model, tmp_path / "own" / "model.safetensors")
    model.config.save_pretrained(tmp_path / "own")
    again = lowbit.load_model(tmp_path / "own")
    state = model.state_dict()
    assert again.state_dict().keys() == state.keys()
    assert all(torch.equal(t, state[n]) for n, t in again.state_dict().items())
    if kind is None:
        return
    state = oracle.state_dict()
    for dense in (load_gguf_decoded(path, torch.float32), again):
        if dense is again:
            dequantize_modules(again, torch.float32)
        assert dense.state_dict().keys() == state.keys()
        assert all(torch.equal(t, state[n]) for n, t in dense.state_dict().items())


SHARED = "granitemoe with a shared expert"


@torch.inference_mode()
@pytest.mark.parametrize("kind", [None, GGMLType.Q8_0])
def test_halves_of_a_linear_are_kept_apart(
    tmp_path: Path, recwarn: Any, kind: GGMLType | None
) -> None:
    """Of granitemoe's shared expert, whose gates transformers has in one linear with what they multiply."""
    rng = np.random.default_rng(0)
    up = rng.standard_normal((32, 64)).astype(np.float32) / 8
    stored = up if kind is None else gguf.quantize(up, kind)
    path, oracle = make(MOE[SHARED], tmp_path, more={"blk.0.ffn_up_shexp.weight": (stored, kind)})
    values = torch.from_numpy(up if kind is None else gguf.dequantize(stored, kind))
    name = "model.layers.0.shared_mlp.input_linear"
    oracle.get_submodule(name).weight.data[32:] = values
    state = oracle.state_dict()
    model = lowbit.load_model(path, dtype=torch.float32)
    assert not [w for w in recwarn if issubclass(w.category, UserWarning)]
    joined = model.get_submodule(name)
    assert isinstance(joined, JoinedLinear)
    assert (joined.out_features, joined.in_features) == (64, 64)
    gate, other = joined
    assert gate.format.name == "q4_1"
    assert torch.equal(gate.quant_tensor().dequantize(), state[f"{name}.weight"][:32])
    if kind is None:
        assert type(other) is torch.nn.Linear
        assert torch.equal(other.weight, values)
    else:
        assert other.format.name == "q8_0"
        assert torch.equal(other.quant_tensor().dequantize(), values)
    expected = oracle(TOKENS[None]).logits
    assert (model(TOKENS[None]).logits - expected).abs().max() < bound(model.config, expected)
    # Saved and loaded, by three ways, and dense again by two.
    lowbit.save(model, tmp_path / "own" / "model.safetensors")
    model.config.save_pretrained(tmp_path / "own")
    model.save_pretrained(tmp_path / "theirs")
    read = [lowbit.load_model(tmp_path / "own")]
    read.append(AutoModelForCausalLM.from_pretrained(tmp_path / "theirs"))
    read.append(lowbit.load(type(oracle)(copy.deepcopy(oracle.config)), tmp_path / "own"))
    packed = model.state_dict()
    for again in read:
        assert again.state_dict().keys() == packed.keys()
        assert all(torch.equal(t, packed[n]) for n, t in again.state_dict().items())
        assert torch.equal(again(TOKENS[None]).logits, model(TOKENS[None]).logits)
    dense = load_gguf_decoded(path, torch.float32)
    dequantize_modules(read[0], torch.float32)
    dequantized = read[1].get_submodule(name)
    lowbit.dequantize_model(read[1].get_submodule("model.layers.0.shared_mlp"), torch.float32)
    assert type(read[1].get_submodule(name)) is torch.nn.Linear
    assert not any(isinstance(m, JoinedLinear) for m in (*dense.modules(), *read[0].modules()))
    assert torch.equal(read[1].get_submodule(name).weight, state[f"{name}.weight"])
    assert isinstance(dequantized, JoinedLinear)
    for each in (dense, read[0]):
        assert each.state_dict().keys() == state.keys()
        assert all(torch.equal(t, state[n]) for n, t in each.state_dict().items())


def test_dense_halves_of_two_types_are_one_linear(tmp_path: Path) -> None:
    kinds = {**KINDS, "ffn_gate_shexp": None, "ffn_up_shexp": GGMLType.F16}
    path, _ = make(MOE[SHARED], tmp_path, kinds)
    model = load_gguf(path, dtype=torch.float32)
    assert type(model.model.layers[0].shared_mlp.input_linear) is torch.nn.Linear
    stored = GGUFFile(path)
    halves = [stored[f"blk.0.ffn_{half}_shexp.weight"].float() for half in ("gate", "up")]
    got = model.model.layers[0].shared_mlp.input_linear.weight
    assert torch.equal(got, torch.cat(halves))


def test_a_type_that_no_format_holds_is_quantized_anew(tmp_path: Path, monkeypatch: Any) -> None:
    """One that a later package `gguf` knows: with a warning, or as one says."""
    path, oracle = make(MOE[SHARED], tmp_path)
    monkeypatch.delitem(BLOCK_TYPES, GGMLType.Q8_0)
    with pytest.warns(UserWarning, match="no format holds . tensors of type Q8_0; they are"):
        model = load_gguf(path, dtype=torch.float32)
    name = "model.layers.0.shared_mlp.output_linear"
    assert model.get_submodule(name).format.name == "int8_g32"
    exact = lowbit.load_model(path, dtype=torch.float32, inexact="dense")
    values = exact.get_submodule(name).weight.detach()
    assert torch.equal(values, oracle.get_submodule(name).weight)
    with pytest.warns(UserWarning, match="quantized anew to nf4, with a loss: a relative"):
        model = load_gguf(path, dtype=torch.float32, inexact="nf4")
    got = model.get_submodule(name).quant_tensor()
    assert torch.equal(got.dequantize(), lowbit.quantize(values, "nf4").dequantize())


def test_dense_experts_stay_parameters(tmp_path: Path) -> None:
    """A router may be in blocks, and the gate of a shared expert a matrix of one row."""
    _, oracle = make(MOE["qwen2moe"], tmp_path)
    rows = oracle.model.layers[0].mlp.shared_expert_gate.weight.detach().numpy()
    router = gguf.quantize(oracle.model.layers[0].mlp.gate.weight.detach().numpy(), GGMLType.Q8_0)
    more = {
        "blk.0.ffn_gate_inp_shexp.weight": (rows, None),
        "blk.0.ffn_gate_inp.weight": (router, GGMLType.Q8_0),
    }
    path, _ = make(MOE["qwen2moe"], tmp_path, dict.fromkeys(KINDS), more=more)
    model = load_gguf(path, dtype=torch.bfloat16)
    assert not list(packed_modules(model))
    assert model.model.layers[0].mlp.experts.down_proj.dtype == torch.bfloat16
    expected = torch.from_numpy(gguf.dequantize(router, GGMLType.Q8_0)).bfloat16()
    assert torch.equal(model.model.layers[0].mlp.gate.weight, expected)
    gate = model.model.layers[0].mlp.shared_expert_gate.weight
    assert torch.equal(gate, torch.from_numpy(rows).bfloat16())


@pytest.mark.parametrize("kind", [GGMLType.Q4_K, GGMLType.MXFP4, GGMLType.IQ2_XXS, None])
def test_rows_of_a_tensor(tmp_path: Path, kind: GGMLType | None) -> None:
    """Those of an expert, with no other byte read."""
    rng = np.random.default_rng(0)
    if kind is None:
        data, values = (rng.standard_normal((5, 3, 256)).astype(np.float32),) * 2
    else:
        blocks = 256 // gguf.GGML_QUANT_SIZES[kind][0]
        data = random_blocks(kind, 15, blocks, rng).reshape(5, 3, -1)
        values = gguf.dequantize(data, kind)
    file = GGUFFile(write(tmp_path / "a.gguf", {"a": (data, kind)}))
    read: list[tuple[int, int]] = []
    own = file._bytes
    file._bytes = lambda info, at, count: read.append((at, count)) or own(info, at, count)  # type: ignore[method-assign]
    for rows in (range(15), range(6, 9), range(4, 5)):
        expected = torch.from_numpy(values.reshape(15, 256)[rows.start : rows.stop])
        read.clear()
        weight = file.rows("a", rows, 256)
        found = [file.dequantized("a", rows), weight if kind is None else weight.dequantize()]
        assert all(torch.equal(f, expected) for f in found)
        size = file.tensors["a"].nbytes // 15
        assert read == [(rows.start * size, len(rows) * size)] * len(found)
    assert torch.equal(file.dequantized("a"), torch.from_numpy(values))
    for rows, columns in (
        (range(14, 16), 256),
        (range(2, 2), 256),
        (range(0, 4, 2), 256),
        (range(2), 255),
    ):
        with pytest.raises(ValueError, match=r"rows must be some of .* 'a' of shape \(5, 3, 256\)"):
            file.rows("a", rows, columns)
    if kind is None:
        assert torch.equal(
            file.rows("a", range(700, 900), 2), torch.from_numpy(values).view(-1, 2)[700:900]
        )
    else:
        with pytest.raises(NotImplementedError, match="expected two dimensions"):
            file["a"]


VECTOR = (np.zeros(64, np.float32), None)
# What makes a file bad: tensors, metadata, and the error.
BAD: dict[str, tuple[str, dict[str, Any], dict[str, Any], type[Exception], str]] = {
    "no gates": (
        "mixtral", {"blk.1.ffn_gate_exps.weight": None}, {}, ValueError, "'blk.1.ffn_gate_exps.weight' is missing",
    ),
    "nothing down": (
        "olmoe", {"blk.0.ffn_down_exps.weight": None}, {}, ValueError, "'blk.0.ffn_down_exps.weight' is missing",
    ),
    "no shared expert": (
        "qwen2moe", {"blk.0.ffn_up_shexp.weight": None}, {}, ValueError, "'blk.0.ffn_up_shexp.weight' is missing",
    ),
    "no router": (
        "qwen3moe", {"blk.0.ffn_gate_inp.weight": None}, {}, ValueError, "'blk.0.ffn_gate_inp.weight' is missing",
    ),
    "a bias of another length": (
        "gpt-oss", {"blk.0.ffn_up_exps.bias": (np.zeros((4, 95), np.float32), None)}, {}, ValueError,
        r"'blk.0.ffn_up_exps.bias' must have shape \(4, 96\), got \(4, 95\)",
    ),
    "three gates": (
        "mixtral", {"blk.0.ffn_gate_exps.weight": (np.zeros((3, 96, 64), np.float32), None)}, {}, ValueError,
        r"'blk.0.ffn_gate_exps.weight' must have shape \(4, 96, 64\), got \(3, 96, 64\)",
    ),
    "five experts": (
        "granitemoe", {}, {"granitemoe.expert_count": 5}, ValueError,
        r"'blk.0.ffn_down_exps.weight' must have shape \(5, 64, 96\), got \(4, 64, 96\)",
    ),
    "more than there are": (
        "qwen3moe", {}, {"qwen3moe.expert_used_count": 5}, ValueError, "used_count must be at most 4, .* got 5",
    ),
    "no number": ("mixtral", {}, {"llama.expert_used_count": None}, ValueError, "used_count' is missing"),
    "no experts": ("qwen2moe", {}, {"qwen2moe.expert_count": None}, ValueError, "expert_count' is missing"),
    "another size": (
        "qwen2moe", {}, {"qwen2moe.expert_feed_forward_length": 31}, ValueError, r"shape \(4, 64, 31\), got",
    ),
    "huge": (
        "qwen2moe", {}, {"qwen2moe.expert_shared_feed_forward_length": 2**31 - 1}, ValueError,
        r"shared_expert_intermediate_size must be at most \d+, the numbers in the file, got 2147483647",
    ),
    "a scale": (
        "qwen3moe", {}, {"qwen3moe.expert_weights_scale": 2.5}, NotImplementedError, "weights_scale 2.5; expected 1.0",
    ),
    "sigmoids": ("olmoe", {}, {"olmoe.expert_gating_func": 2}, NotImplementedError, "gating_func 2; expected 1"),
    "groups": ("mixtral", {}, {"llama.expert_group_count": 2}, NotImplementedError, "group_count 2; expected 0"),
    "a tensor that is unknown": (
        "mixtral", {"blk.0.ffn_gate_exps.bias": VECTOR}, {}, NotImplementedError,
        "a MixtralForCausalLM has no tensors 'blk.0.ffn_gate_exps.bias'",
    ),
    "an attention factor": (
        "gpt-oss", {}, {"gpt-oss.rope.scaling.yarn_attn_factor": 1.5}, NotImplementedError,
        "yarn_attn_factor 1.5; expected 1.0",
    ),
    "another window": (
        "gpt-oss", {}, {"gpt-oss.attention.sliding_window_pattern": 3}, NotImplementedError, "pattern 3; expected 2",
    ),
    "long texts": (
        "gpt-oss", {}, {"gpt-oss.rope.scaling.type": "longrope"}, NotImplementedError,
        "rope scaling 'longrope'; expected 'none' or 'linear' or 'yarn'",
    ),
}  # fmt: skip


@functools.cache
def valid(case: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        return make(MOE[case], Path(folder))[0].read_bytes()


@pytest.mark.parametrize("case", BAD)
def test_what_is_bad_is_named(tmp_path: Path, case: str) -> None:
    name, tensors, fields, error, message = BAD[case]
    path, _ = make(MOE[name], tmp_path, more=tensors, **fields)
    with pytest.raises(error, match=message) as e:
        load_gguf(path)
    assert "a.gguf" in str(e.value)


def test_truncated(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(valid("gpt-oss")[:-1000])
    with pytest.raises(ValueError, match=r"a\.gguf: not a readable GGUF file: tensor 'blk.*file"):
        load_gguf(path)


@settings(fuzz, max_examples=40)
@given(
    case=st.sampled_from(["mixtral", "qwen2moe", "gpt-oss"]),
    edits=edits,
    reach=st.sampled_from([1200, 10**9]),
)
def test_wrong_bytes(case: str, edits: Any, reach: int) -> None:
    """The first 1200 bytes are numbers of the model. What was made computes something."""
    data = valid(case)
    output = output_of(overwrite(data, edits, min(reach, len(data))))
    assert output is None or output.shape[:2] == (1, 2)
