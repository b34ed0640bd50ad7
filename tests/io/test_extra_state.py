"""Extra states of modules that are not lowbit's: they come back as torch itself gives them back, or are
refused before a byte is written.
"""

from __future__ import annotations

import collections
import copy
import enum
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from lowbit.io import extra_state, foreign, safetensors_file
from lowbit.io.save_load import load, load_tensors, save
from lowbit.ptq import quantize_model
from lowbit.ptq.file import quantize_file

NAN = float("nan")


class Stateful(nn.Linear):
    """A layer with whatever extra state it is given."""

    def __init__(self, state: Any = None) -> None:
        super().__init__(8, 4)
        self.state, self.given = state, []

    def get_extra_state(self) -> Any:
        return self.state

    def set_extra_state(self, state: Any) -> None:
        self.state = state
        self.given.append(state)


class Giving(nn.Linear):
    """Without set_extra_state."""

    def get_extra_state(self) -> Any:
        return {"a": 1}


class Exposing(nn.Linear):
    """Whose state is its own weight."""

    def get_extra_state(self) -> Any:
        return self.weight

    def set_extra_state(self, state: Any) -> None:
        self.state = state


class Taking(nn.Linear):
    """Without get_extra_state."""

    def set_extra_state(self, state: Any) -> None:
        self.state = state


def model(state: Any = None, quantized: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    m = nn.Sequential(nn.Linear(8, 8), Stateful(state))
    if quantized:
        quantize_model(m, "int4", skip=("1",), progress=False)
    return m


def same(a: Any, b: Any) -> bool:
    """Equal in every type and bit; all NaN are one."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        shaped = (a.dtype, a.shape) == (b.dtype, b.shape)
        return shaped and a.contiguous().view(-1).view(torch.uint8).equal(
            b.contiguous().view(-1).view(torch.uint8)
        )
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(v, b[k]) for k, v in a.items())
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, float) and not math.isnan(a):
        return (a, math.copysign(1, a)) == (b, math.copysign(1, b))
    return a == b or (a != a and b != b)


def by_torch(saved: nn.Module, fresh: nn.Module) -> nn.Module:
    """What torch's own files make of it."""
    file = io.BytesIO()
    torch.save(saved.state_dict(), file)
    file.seek(0)
    fresh.load_state_dict(torch.load(file, weights_only=False))
    return fresh


STATES = {
    "a dict": {"amax": 1.0},
    "nothing": None,
    "an empty dict": {},
    "an empty list": [],
    "a list": [1, [2.5, "x"], None, True, {}],
    "text": "é\n\0\"\U0001f600",
    "an int": -(2**63),
    "a bool": False,
    "zero": 0,
    "floats": [0.1, 5e-324, 1.7976931348623157e308, -0.0, 1e22, 1.0],
    "floats that JSON lacks": {"min": float("inf"), "max": -float("inf"), "mean": NAN},
    "text that looks like floats": ["NaN", "inf", "null"],
    "odd keys": {"": 1, "a.b": 2, "tensor": {"": {"": "tensor", "index": 0}}, "é": {"": []}},
    "what is written for others": [{"": "float", "text": "inf"}, {"": "dict", "items": {}}],
    "the order of keys": {"b": 1, "a": 2},
    "a tensor": torch.arange(6.0).view(2, 3),
    "no dimensions": torch.tensor(2, dtype=torch.int16),
    "tensors inside": {
        "amax": torch.tensor([1.5, NAN]),
        "h": [torch.zeros(0, 3), {"": torch.tensor(True)}, torch.arange(6).view(2, 3).t()],
        "scale": torch.tensor([1.0, 2.0]).to(torch.float8_e4m3fn),
    },
}  # fmt: skip


@pytest.mark.parametrize("state", STATES.values(), ids=STATES)
@pytest.mark.parametrize("mmap", [True, False])
def test_states_come_back_as_with_torch(state: Any, mmap: bool, tmp_path: Path):
    saved = model(state, quantized=True)
    before = copy.deepcopy(state)
    path = save(saved, tmp_path / "x.safetensors")
    assert same(saved[1].state, before)
    oracle = by_torch(saved, model(quantized=True))
    assert same(oracle[1].state, state)
    for fresh in (model(), model({"other": [1, 2, 3]}), model(quantized=True)):
        loaded = load(fresh, path, mmap=mmap)
        assert same(loaded[1].state, oracle[1].state)
        assert len(loaded[1].given) == 1
        assert torch.equal(loaded[1].weight, saved[1].weight)
        x = torch.randn(3, 8)
        assert torch.equal(loaded(x), saved(x))


@pytest.mark.parametrize("state", STATES.values(), ids=STATES)
def test_what_load_tensors_gives_can_be_saved(state: Any, tmp_path: Path):
    path = save(model(state, quantized=True), tmp_path / "x.safetensors")
    read = load_tensors(path)
    assert set(read) == {"0", "0.bias", "1.weight", "1.bias", "1._extra_state"}
    assert same(read["1._extra_state"], state)
    again = save(read, tmp_path / "again.safetensors")
    assert same(load_tensors(again)["1._extra_state"], state)
    assert same(load(model(), again)[1].state, state)


leaves = (
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats() | st.text(max_size=5)
)
states = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["", "index", "items"]) | st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=12,
)  # fmt: skip


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(state=states)
def test_any_state_of_plain_values_comes_back(state: Any):
    content = extra_state.encode("_extra_state", state, lambda t: pytest.fail("no tensor"))
    text = json.dumps(content, allow_nan=False)
    assert same(extra_state.decode(json.loads(text), lambda i: pytest.fail("no tensor")), state)


class Number(enum.IntEnum):
    ONE = 1


def cyclic() -> list[Any]:
    state: list[Any] = []
    state.append({"a": state})
    return state


def deep(levels: int) -> Any:
    return [deep(levels - 1)] if levels else 0


REFUSED = {
    "a tuple": ({"shape": [(1, 2)]}, TypeError, r"at \['shape'\]\[0\] a value of type tuple"),
    "bytes": (b"abc", TypeError, "it holds a value of type bytes"),
    "a size": (torch.Size([1]), TypeError, "it holds a value of type torch.Size"),
    "a dtype": ({"d": torch.float32}, TypeError, r"at \['d'\] a value of type torch.dtype"),
    "a device": ({"d": torch.device("cpu")}, TypeError, "a value of type torch.device"),
    "a file in memory": (io.BytesIO(), TypeError, "a value of type _io.BytesIO"),
    "a number of numpy": ([np.float64(1)], TypeError, "a value of type numpy.float64"),
    "an array": (np.zeros(2), TypeError, "a value of type numpy.ndarray"),
    "an enum": ({"n": Number.ONE}, TypeError, r"a value of type test_extra_state\.Number"),
    "an ordered dict": (collections.OrderedDict(a=1), TypeError, "type collections.OrderedDict"),
    "a set": ({1}, TypeError, "a value of type set"),
    "a complex number": (1j, TypeError, "a value of type complex"),
    "numbers as keys": ({"t": {0: "a"}}, TypeError, r"at \['t'\] a dict with the key 0, of type int"),
    "None as a key": ({None: "a"}, TypeError, "a dict with the key None, of type NoneType"),
    "a large int": ([2**63], ValueError, r"at \[0\] an int of more than 64 bits"),
    "half a character": (["\ud83d\ude00"], ValueError, r"at \[0\] a str that is not Unicode"),
    "half a character as a key": ({"\ud83d": 1}, ValueError, "a str that is not Unicode"),
    "itself": (cyclic(), ValueError, "itself, or more than 50 levels"),
    "a deep one": (deep(51), ValueError, "itself, or more than 50 levels"),
    "a very deep one": (deep(900), ValueError, "itself, or more than 50 levels"),
    "a sparse tensor": ([torch.eye(2).to_sparse()], TypeError, r"1\._extra_state\.0 must be a dense"),
    "no values": ({"a": torch.zeros(1, device="meta")}, ValueError, r"1\._extra_state\.0 is on the meta"),
    "a dtype of no file": ([torch.zeros(1).to(torch.complex128)], TypeError, "safetensors cannot hold"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("of", ["a model", "a mapping"])
def test_what_would_not_come_back_is_refused(case: str, of: str, tmp_path: Path):
    state, error, message = REFUSED[case]
    given = model(state) if of == "a model" else {"1._extra_state": state}
    with pytest.raises(error, match=message) as e:
        save(given, tmp_path / "made" / "x.safetensors")
    assert not list(tmp_path.iterdir()), "not even its folder was made"
    if "cannot be saved" in str(e.value):
        assert "the extra state of module '1' cannot be saved" in str(e.value)
    if "type" in message:
        assert "what can be saved: dict with str as keys, list, str, int" in str(e.value)
    old = save({"a": torch.ones(1)}, tmp_path / "old.safetensors").read_bytes()
    with pytest.raises(error, match=message):
        save(given, tmp_path / "old.safetensors")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("old.safetensors", old)]


def test_the_deepest_state_comes_back(tmp_path: Path):
    path = save(model(deep(50)), tmp_path / "x.safetensors")
    assert load(model(), path)[1].state == deep(50)


def test_other_values_of_mappings_are_refused(tmp_path: Path):
    for name in ("a", "_extra_state.a", "a_extra_state"):
        with pytest.raises(TypeError, match=f"{name} must be a Tensor or a QuantTensor, got dict"):
            save({name: {}}, tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())


def unchanged(m: nn.Module, path: Path, message: str) -> None:
    before, modules = copy.deepcopy(m.state_dict()), dict(m.named_modules())
    with pytest.raises(ValueError, match=message) as e:
        load(m, path)
    assert str(path) in str(e.value)
    assert dict(m.named_modules()) == modules
    assert same(dict(m.state_dict()), dict(before))
    assert not getattr(m[1], "given", None)


@pytest.mark.parametrize("state", [{"a": 1}, torch.ones(2), None], ids=["dict", "tensor", "None"])
def test_a_state_that_the_model_does_not_take(state: Any, tmp_path: Path):
    path = save(model(state, quantized=True), tmp_path / "x.safetensors")
    for layer in (nn.Linear, Giving):
        other = nn.Sequential(nn.Linear(8, 8), layer(8, 4))
        with pytest.raises(RuntimeError, match=r"Unexpected key.*1\._extra_state"):
            by_torch(model(state), copy.deepcopy(other))
        unchanged(other, path, r"1\._extra_state is not part of the model$")
    taking = nn.Sequential(nn.Linear(8, 8), Taking(8, 4))
    assert same(load(taking, path)[1].state, state)


def test_a_state_that_the_file_lacks(tmp_path: Path):
    plain = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    quantize_model(plain, {"0": "int4"}, progress=False)
    path = save(plain, tmp_path / "x.safetensors")
    for layer in (Stateful(None), Taking(8, 4)):
        other = nn.Sequential(nn.Linear(8, 8), layer)
        unchanged(other, path, r"model: 1\._extra_state is missing in the file$")
    twice = nn.Sequential(nn.Linear(8, 8), Stateful(None), Stateful(None))
    unchanged(twice, save(model(), tmp_path / "y.safetensors"), r"2\._extra_state is missing")


def test_a_state_may_be_of_another_kind_in_the_file(tmp_path: Path):
    """What is in it is the affair of the module, as in torch: a tensor of another shape, no tensor."""
    path = save(model(torch.arange(5)), tmp_path / "x.safetensors")
    for state in (None, torch.zeros(3, 3), {"a": 1}):
        assert same(load(model(state), path)[1].state, torch.arange(5))


def test_what_the_module_itself_refuses(tmp_path: Path):
    path = save(model({"a": 1}), tmp_path / "x.safetensors")
    fresh = model()
    fresh[1].given = None  # without a list to append to
    with pytest.raises(AttributeError, match="'NoneType' object has no attribute 'append'"):
        load(fresh, path)


def test_states_of_meta_models_and_shared_modules(tmp_path: Path):
    saved = model({"h": torch.arange(3)})
    saved.append(saved[1])
    path = save(saved, tmp_path / "x.safetensors")
    with torch.device("meta"):
        fresh = model()
        fresh.append(fresh[1])
    assert fresh[1].weight.is_meta
    load(fresh, path)
    assert fresh[2] is fresh[1]
    assert same(fresh[1].state, {"h": torch.arange(3)})
    assert same(fresh[1].weight.data, saved[1].weight.data)
    with torch.device("meta"):
        fresh = model(torch.zeros(2))
    assert same(load(fresh, save(model(torch.ones(4)), path))[1].state, torch.ones(4))


def test_states_that_share_memory_with_parameters(tmp_path: Path):
    saved = model()
    saved[1].state = {"w": saved[1].weight, "again": [saved[1].weight]}
    path = save(saved, tmp_path / "x.safetensors")
    assert set(load_file(path)) == {"0.weight", "0.bias", "1.weight", "1.bias"}, "stored once"
    loaded = load(model(), path)
    assert same(loaded[1].state, {"w": saved[1].weight.data, "again": [saved[1].weight.data]})
    # And a tensor that is stored for a state first.
    saved = nn.Sequential(Stateful(None), nn.Linear(8, 4))
    saved[0].state = [saved[1].weight]
    path = save(saved, path)
    assert set(load_file(path)) == {"0.weight", "0.bias", "1.bias", "0._extra_state.0"}
    assert set(load_tensors(path)) == {"0.weight", "0.bias", "1.weight", "1.bias", "0._extra_state"}
    loaded = load(nn.Sequential(Stateful(None), nn.Linear(8, 4)), path)
    assert torch.equal(loaded[1].weight, saved[1].weight)
    assert same(loaded[0].state, [saved[1].weight.data])
    with torch.device("meta"):
        fresh = nn.Sequential(Stateful(None), nn.Linear(8, 4))
    fresh[0].state = [fresh[0].weight]
    with pytest.raises(ValueError, match="on the meta device"):
        save(fresh, path)
    assert torch.equal(load(fresh, path)[1].weight, saved[1].weight)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_state_that_is_the_parameter_itself(device: str, tmp_path: Path):
    saved = Exposing(8, 4)
    path = save(nn.Sequential(saved), tmp_path / "x.safetensors")
    assert set(load_file(path)) == {"0.weight", "0.bias"}
    loaded = load(nn.Sequential(Exposing(8, 4, device=device)), path)[0]
    assert same(loaded.weight.data, saved.weight.data)
    assert same(loaded.state, saved.weight.data)


def test_the_model_keeps_no_view_of_the_file(tmp_path: Path):
    path = save(model({"h": torch.ones(3)}), tmp_path / "x.safetensors")
    loaded = load(model(), path)
    data = path.read_bytes()
    with path.open("r+b") as f:
        f.write(bytes(len(data)))
    assert torch.equal(loaded[1].state["h"], torch.ones(3))


def test_files_without_states_are_as_before(tmp_path: Path):
    """No new entry in their header, and those of before load; the library reads those with states."""
    with safe_open(save({"a": torch.ones(1)}, tmp_path / "x.safetensors"), "pt") as f:
        assert json.loads(f.metadata()["lowbit"]) == {"version": 1, "layers": {}, "tied": {}}
    old = tmp_path / "old.safetensors"
    tensors = {k: v for k, v in model().state_dict().items() if v is not None}
    header = {"lowbit": json.dumps({"version": 1, "layers": {}, "tied": {}})}
    save_file({**tensors, "1._extra_state": torch.arange(4)}, old, header)
    assert same(load(model(), old)[1].state, torch.arange(4))
    path = save(model({"h": [torch.arange(3), 1.5]}), tmp_path / "y.safetensors")
    assert torch.equal(load_file(path)["1._extra_state.0"], torch.arange(3))
    with safe_open(path, "pt") as f:
        stored = json.loads(f.metadata()["lowbit"])["extra"]
    assert stored == {"1._extra_state": {"h": [{"": "tensor", "index": 0}, 1.5]}}


BAD = {
    "a list": ([], "must be objects, and 'extra'"),
    "another name": ({"a.weight": 1}, "'a.weight' is not the name of an extra state"),
    "a tensor too": ({"b._extra_state": 1}, "'b._extra_state' is an extra state and one of the tensors"),
    "a tie too": ({"c._extra_state": 1}, "'c._extra_state' is an extra state and one of the ties"),
    "a missing tensor": (
        {"a._extra_state": [{"": "tensor", "index": 1}]}, r"a\._extra_state\.1 is missing"
    ),
    "an unknown kind": ({"a._extra_state": {"": "object"}}, "'a._extra_state': unknown value {'': 'object'}"),
    "a negative index": ({"a._extra_state": {"": "tensor", "index": -1}}, "unknown value"),
    "an index of text": ({"a._extra_state": {"": "tensor", "index": "0"}}, "unknown value"),
    "a number too many": ({"a._extra_state": {"": "float", "text": "nan", "x": 1}}, "unknown value"),
    "a finite float": ({"a._extra_state": {"": "float", "text": "1e400"}}, "unknown value"),
    "items in a list": ({"a._extra_state": {"": "dict", "items": []}}, "unknown value"),
    "deep": ({"a._extra_state": deep(60)}, "'a._extra_state': more than 50 levels"),
    "deep and odd": ({"a._extra_state": [{"": deep(300)}]}, "'a._extra_state': unknown value"),
}  # fmt: skip


@pytest.mark.parametrize(("extra", "message"), BAD.values(), ids=BAD)
def test_damaged_states(extra: Any, message: str, tmp_path: Path):
    path = tmp_path / "x.safetensors"
    header = {"version": 1, "layers": {}, "tied": {"c._extra_state": "t"}, "extra": extra}
    tensors = {
        "t": torch.ones(1),
        "b._extra_state": torch.ones(1),
        "a._extra_state.0": torch.ones(1),
    }
    save_file(tensors, path, {"lowbit": json.dumps(header)})
    with pytest.raises(ValueError, match=message) as e:
        load_tensors(path)
    assert str(path) in str(e.value)
    assert len(str(e.value)) < 1000


def test_a_state_in_two_files(tmp_path: Path):
    """The same one is in each file that transformers writes; two that differ contradict each other."""

    def write(name: str, state: int) -> None:
        extra = {"version": 1, "layers": {}, "extra": {"a._extra_state": state}}
        save_file({name: torch.ones(1)}, tmp_path / name, {"lowbit": json.dumps(extra)})

    write("a", 1)
    write("b", 1)
    index = {"weight_map": {"a": "a", "b": "b"}}
    (tmp_path / safetensors_file.INDEX_NAME).write_text(json.dumps(index))
    assert load_tensors(tmp_path).keys() == {"a", "b", "a._extra_state"}
    write("b", 2)
    with pytest.raises(ValueError, match=r"'a\._extra_state' is in another file of the checkpoint"):
        load_tensors(tmp_path)


def test_hooks_of_state_dicts_are_not_called(tmp_path: Path):
    """Neither what they rename nor what they add gets into the file, on which both sides agree."""

    def build() -> nn.Sequential:
        m = model({"a": 1})
        m[1].register_state_dict_post_hook(
            lambda module, state, prefix, meta: state.update(
                {f"{prefix}w": state.pop(f"{prefix}weight")}
            )
        )
        m[1].register_load_state_dict_pre_hook(
            lambda module, state, prefix, *rest: (
                state.update({f"{prefix}weight": state.pop(f"{prefix}w")})
                if f"{prefix}w" in state
                else None
            )
        )
        m.register_state_dict_post_hook(
            lambda module, state, prefix, meta: state.update({"note": {"any": 1}})
        )
        return m  # fmt: skip

    saved = build()
    assert {"1.w", "note"} <= saved.state_dict().keys()
    path = save(saved, tmp_path / "x.safetensors")
    assert "1.weight" in load_file(path)
    assert "note" not in load_tensors(path)
    fresh = build()
    nn.init.zeros_(fresh[1].weight)
    loaded = load(fresh, path)
    assert torch.equal(loaded[1].weight, saved[1].weight)
    assert loaded[1].state == {"a": 1}


def test_layers_with_a_state_stay_dense():
    m = model({"a": 1})
    with pytest.warns(
        UserWarning, match="of the weights stay dense and cannot be quantized: 1.weight"
    ):
        report = quantize_model(m, "int4", progress=False)
    assert [row.name for row in report.layers] == ["0"]
    assert report.left == {"1": "Stateful has an extra state of its own"}
    assert isinstance(m[1], Stateful)


def test_files_are_converted_with_states_that_are_tensors(tmp_path: Path):
    source, target = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    state = torch.arange(5, dtype=torch.uint8)
    tensors = {f"1.{k}": v for k, v in nn.Linear(8, 4).state_dict().items()}
    tensors["1._extra_state"] = state
    save_file({"0.weight": torch.randn(8, 8), "0.bias": torch.ones(8), **tensors}, source)
    quantize_file(source, target, "int4", skip=("1",), progress=False)
    assert same(load(model({"a": 1}), target)[1].state, state)


def test_a_file_with_states_is_not_taken_for_a_dense_one(tmp_path: Path):
    path = save(model({"a": 1}), tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="is a lowbit checkpoint already"):
        foreign.refuse_quantized(path)
    with pytest.raises(ValueError, match="is a lowbit checkpoint already"):
        quantize_file(path, tmp_path / "y.safetensors", "int4", progress=False)
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]
