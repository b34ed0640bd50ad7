"""Importance by imatrix files: what is saved, what of it reaches the layers, and files of other models."""

from __future__ import annotations

import pytest
import torch
from torch import nn

gguf = pytest.importorskip("gguf")

from lowbit.io import imatrix  # noqa: E402
from lowbit.methods import quantize  # noqa: E402
from lowbit.ptq import (  # noqa: E402
    collect_importance,
    load_importance,
    quantize_model,
    save_importance,
)

FORMAT = "kmeans3"
TOKENS = [torch.tensor([[3, 1, 4, 1, 5, 9]]), torch.tensor([[2, 6, 5, 3]])]


class Moe(nn.Module):
    """Two experts of which one is never called, and one whose inputs are all 0."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(32, 32) for _ in range(3))
        self.out = nn.Linear(32, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.experts[0](x) + self.experts[2](0 * x))


def batches(seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scale = torch.logspace(-1, 1, 32)
    return [torch.randn(2, 8, 32, generator=generator) * scale for _ in range(3)]


def llama(layers: int = 2, hidden: int = 64) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=hidden, intermediate_size=96, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture
def saved(tmp_path):
    """(model, file) of a tiny Llama."""
    model, path = llama(), tmp_path / "m.gguf"
    statistics = collect_importance(model, TOKENS, progress=False)
    save_importance(path, model, statistics, dataset="digits", chunk_size=4)
    return model, path


def inputs_of(model: nn.Module, name: str) -> torch.Tensor:
    rows: list[torch.Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(
        lambda _, args: rows.append(args[0].detach().flatten(0, -2).double())
    )
    with torch.no_grad():
        for tokens in TOKENS:
            model(tokens)
    handle.remove()
    return torch.cat(rows)


def test_file_holds_sums_of_squares_under_llama_cpp_names(saved):
    model, path = saved
    found = imatrix.read(path)
    per_layer = (
        "attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down",
    )  # fmt: skip
    expected = {f"blk.{i}.{name}.weight" for i in range(2) for name in per_layer}
    assert found.entries.keys() == expected | {"output.weight"}
    assert (found.datasets, found.chunk_count, found.chunk_size) == (("digits",), 3, 4)
    for name, stored in (
        ("model.layers.1.mlp.down_proj", "blk.1.ffn_down.weight"),
        ("model.layers.0.self_attn.o_proj", "blk.0.attn_output.weight"),
        ("lm_head", "output.weight"),
    ):
        entry = found.entries[stored]
        sums = inputs_of(model, name).square().sum(0)
        torch.testing.assert_close(entry.sums[0].double(), sums, rtol=1e-6, atol=0)
        assert entry.counts.tolist() == [10]


def test_weights_are_those_of_weighted_kmeans(saved):
    model, path = saved
    found = load_importance(path, model)
    dense = {n: m.weight.detach() for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert found.keys() == dense.keys()
    report = quantize_model(model, FORMAT, importance=path, progress=False)
    assert len(report.layers) == 14
    assert not any(row.note for row in report.layers)
    changed = 0
    for row in report.layers:
        made = model.get_submodule(row.name).quant_tensor()
        expected = quantize(dense[row.name], FORMAT, "kmeans", weights=found[row.name])
        plain = quantize(dense[row.name], FORMAT, "kmeans")
        for key, values in expected.tensors.items():
            assert torch.equal(made.tensors[key], values), (row.name, key)
        changed += not torch.equal(made.tensors["table"], plain.tensors["table"])
    assert changed == 14


def test_a_mapping_is_the_same_as_the_file(saved):
    model, path = saved
    other = llama()
    quantize_model(other, FORMAT, importance=load_importance(path, other), progress=False)
    quantize_model(model, FORMAT, importance=path, progress=False)
    mine, theirs = model.state_dict(), other.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)


def test_other_modules_have_their_own_names(tmp_path):
    model = Moe()
    statistics = collect_importance(model, batches(), progress=False)
    save_importance(tmp_path / "m.gguf", model, statistics)
    assert imatrix.read(tmp_path / "m.gguf").entries.keys() == {"experts.0.weight", "out.weight"}
    found = load_importance(tmp_path / "m.gguf", model)
    for name in ("experts.0", "out"):
        torch.testing.assert_close(found[name], statistics[name].diagonal, rtol=2e-7, atol=0)


def test_layers_without_an_entry_are_rounded_with_a_note(tmp_path):
    model, dense = Moe(), Moe()
    dense.load_state_dict(model.state_dict())
    path = tmp_path / "m.gguf"
    save_importance(path, model, collect_importance(model, batches(), progress=False))
    with pytest.warns(
        UserWarning, match=r"^importance says nothing of experts\.1, experts\.2: the"
    ):
        report = quantize_model(model, FORMAT, importance=path, progress=False)
    notes = {row.name: row.note for row in report.layers}
    note = "importance has no entry of it: quantized without calibration, by 'kmeans'"
    assert notes == {"experts.0": None, "experts.1": note, "experts.2": note, "out": None}
    assert f"experts.1: {note}" in str(report)
    expected = quantize(dense.experts[1].weight.detach(), FORMAT, "kmeans")
    made = model.experts[1].quant_tensor()
    assert all(torch.equal(made.tensors[key], t) for key, t in expected.tensors.items())


def test_an_entry_that_nothing_was_counted_of_is_none(tmp_path):
    entries = {
        name: imatrix.Entry(torch.full((1, 32), value), torch.tensor([value]), name)
        for name, value in (("experts.0.weight", 0.0), ("out.weight", 2.0))
    }
    imatrix.write(tmp_path / "m.gguf", imatrix.Imatrix(entries))
    assert load_importance(tmp_path / "m.gguf", Moe()).keys() == {"out"}


def test_formats_with_values_of_their_own_are_quantized_as_ever(saved):
    """A recipe may mix them: int8 is rounded to nearest, and no one is warned."""
    model, path = saved
    recipe = {r".*mlp\..*": FORMAT, r".*q_proj": "int8"}
    report = quantize_model(model, recipe, importance=path, progress=False)
    assert {row.format for row in report.layers} == {FORMAT, "int8"}
    assert not any(row.note for row in report.layers)


def entry_file(path, name: str, values: list[float]):
    sums = torch.tensor([values])
    imatrix.write(path, imatrix.Imatrix({name: imatrix.Entry(sums, torch.ones(1), name)}))
    return path


def bad_files(tmp_path):
    zero = entry_file(tmp_path / "zero", "out.weight", [0.0] * 32)
    long = entry_file(tmp_path / "long", "out.weight", [1.0] * 33)
    other = entry_file(tmp_path / "other", "blk.0.attn_q.weight", [1.0] * 32)
    out = r"tensor 'out\.weight\.in_sum2'"
    return {
        zero: rf"^{zero}: {out}: all 32 values are 0",
        long: rf"^{long}: {out} has 33 values; layer 'out' has 32 input features",
        other: rf"^{other}: is the imatrix of another model: it has 'blk\.0\.attn_q\.weight'; "
               r"expected names such as 'experts\.0\.weight', ",
    }  # fmt: skip


def test_files_that_do_not_fit_change_nothing(tmp_path):
    model = Moe()
    before = {key: t.clone() for key, t in model.state_dict().items()}
    for path, message in bad_files(tmp_path).items():
        with pytest.raises(ValueError, match=message):
            quantize_model(model, FORMAT, importance=path, progress=False)
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())
    assert all(type(m) is nn.Linear for m in (model.out, *model.experts))


def test_a_larger_model_is_told_by_entries_that_nothing_has(saved):
    _, path = saved
    with pytest.warns(
        UserWarning, match=r"7 entries are of matrices that a LlamaForCausalLM has not: blk\.1"
    ):
        load_importance(path, llama(layers=1))
    with pytest.raises(
        ValueError, match=r"blk\.0\.attn_q\.weight\.in_sum2' has 64 values; layer .* has 32 "
    ):
        load_importance(path, llama(hidden=32))


ONES = torch.ones(32)
BAD_MAPPINGS = {
    "name": ({"in": ONES}, ValueError, r"importance names 'in', which is no nn\.Linear"),
    "kind": ({"out": [1.0]}, TypeError, r"importance of 'out' must be a floating tensor, got list"),
    "dtype": ({"out": ONES.long()}, TypeError, r"floating tensor, got torch\.int64"),
    "shape": ({"out": torch.ones(8, 32)}, ValueError, r"must have shape \(32,\), .*got \(8, 32\)"),
    "nan": ({"out": ONES.where(ONES.cumsum(0) != 6, torch.nan)}, ValueError, r"'out': value 5 is nan"),
    "inf": ({"out": ONES / 0}, ValueError, r"'out': value 0 is inf; expected a finite"),
    "negative": ({"out": -ONES}, ValueError, r"'out': value 0 is -1\.0; expected"),
    "zero": ({"out": 0 * ONES}, ValueError, r"'out': all 32 values are 0"),
    "none": ({}, ValueError, r"no entry of a layer to quantize, such as 'experts\.0': it has none"),
}  # fmt: skip


@pytest.mark.parametrize(("importance", "kind", "message"), BAD_MAPPINGS.values(), ids=BAD_MAPPINGS)
def test_bad_mappings(importance, kind, message):
    with pytest.raises(kind, match=message):
        quantize_model(Moe(), FORMAT, importance=importance, progress=False)


def test_one_source_and_a_method_that_takes_it():
    given = {"out": ONES}
    with pytest.raises(ValueError, match="give calibration or importance, not both"):
        quantize_model(Moe(), FORMAT, importance=given, calibration=batches(), progress=False)
    with pytest.raises(ValueError, match="give sensitivities or importance, not both"):
        quantize_model(
            Moe(), FORMAT, method="kmeans", importance=given, progress=False,
            sensitivities={"out": torch.ones(8, 32)},
        )  # fmt: skip
    with pytest.raises(ValueError, match="method 'bitnet' takes no importance: use 'kmeans'"):
        quantize_model(Moe(), "ternary", method="bitnet", importance=given, progress=False)
    with pytest.raises(ValueError, match="method 'gptq' needs calibration"):
        quantize_model(Moe(), FORMAT, method="gptq", importance=given, progress=False)


def test_nothing_to_save(tmp_path):
    model = Moe()
    zeros = collect_importance(model, [torch.zeros(1, 32)], progress=False)
    del zeros["out"]  # its inputs are biases
    with pytest.raises(ValueError, match=r"say nothing of any layer: experts\.0, experts\.1, exp"):
        save_importance(tmp_path / "m.gguf", model, zeros)
    with pytest.raises(ValueError, match="chunk_size must be at least 1, got 0"):
        save_importance(tmp_path / "m.gguf", model, {}, chunk_size=0)
    large = collect_importance(
        nn.Sequential(nn.Linear(2, 2)), [torch.tensor([[1e25, 1.0]])], progress=False
    )
    with pytest.raises(ValueError, match=r"^0: squares of inputs up to 1e\+25 do not fit fp32"):
        save_importance(tmp_path / "m.gguf", nn.Sequential(nn.Linear(2, 2)), large)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"must have an nn\.Linear"):
        collect_importance(nn.Identity(), [torch.ones(1)])
