"""Every matrix of a model is in the report, with the share that is packed; much that stays dense is said aloud, and so
are patterns that match nothing."""

from __future__ import annotations

import functools
import warnings

import pytest
import torch
import transformers
from torch import nn
from torch.nn.utils import prune

from lowbit import nn as qnn
from lowbit import qat
from lowbit.ptq import allocate, quantize_llm_int8, quantize_model

transformers.logging.set_verbosity_error()


def of_transformers(name: str, **config: object) -> nn.Module:
    made = getattr(transformers, f"{name}Config")(**config)
    return getattr(transformers, f"{name}ForCausalLM", None)(made)


MOE = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip


class Odd(nn.Module):
    """Weights that are parametrized in every way, or belong to modules without a quantized form."""

    def __init__(self) -> None:
        super().__init__()
        linears = nn.utils.parametrizations
        self.table = nn.Parameter(torch.randn(1, 9, 32))
        self.normed = linears.weight_norm(nn.Linear(32, 32))
        self.spectral = linears.spectral_norm(nn.Linear(32, 32))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.old_norm = nn.utils.weight_norm(nn.Linear(32, 32))
        self.pruned = prune.l1_unstructured(nn.Linear(32, 32), "weight", 9)
        self.bilinear, self.lstm = nn.Bilinear(8, 8, 8), nn.LSTM(8, 8)
        self.conv, self.attention = nn.Conv1d(4, 4, 3), nn.MultiheadAttention(8, 2)
        self.plain = nn.Linear(64, 64)
        self.plain.register_parameter("extra", nn.Parameter(torch.randn(3, 3)))


def head(sizes: int = 64, share: int = 1) -> nn.Module:
    """A plain model: a tied embedding, linears, and a convolution of a share of the weights."""
    model = nn.ModuleDict({"embed": nn.Embedding(9, sizes), "up": nn.Linear(sizes, 100 * share)})
    model["lm_head"] = nn.Linear(sizes, 9, bias=False)
    model["lm_head"].weight = model["embed"].weight
    return model


MODELS = {
    "mixtral": functools.partial(of_transformers, "Mixtral", num_local_experts=4, **MOE),
    "gpt_oss": functools.partial(
        of_transformers, "GptOss", num_local_experts=4, head_dim=8, num_experts_per_tok=2, **MOE
    ),
    "qwen3_moe": functools.partial(
        of_transformers, "Qwen3Moe", num_experts=4, moe_intermediate_size=32, head_dim=8,
        num_experts_per_tok=2, **MOE,
    ),
    "odd": Odd,
    "plain": head,
}  # fmt: skip
if hasattr(transformers, "GPT2LMHeadModel"):
    MODELS["gpt2"] = lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=4, n_positions=64)
    )
WARNED = {"odd"}


def matrices(model: nn.Module) -> dict[str, int]:
    """But for the biases of experts, which are vectors as soon as the experts are layers."""
    named = ((n, p) for n, p in model.named_parameters() if not n.endswith("proj_bias"))
    return {name: p.numel() for name, p in named if p.dim() > 1}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("quantize", [quantize_model, quantize_llm_int8])
def test_every_matrix_is_in_the_report(name, quantize):
    model = MODELS[name]().eval()
    before = matrices(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report = quantize(model, "int8_row_a8", progress=False)
    after = matrices(model)
    quantized = {f"{row.name}.weight" for row in report.layers}
    # The parameter of all experts, of whom each has a row.
    quantized |= {row.name.rpartition(".")[0] for row in report.layers}
    # By the names of parameters, and by those of modules.
    assert report.dense_weights.items() >= after.items()
    assert quantized | report.dense_weights.keys() >= before.keys()
    assert sum(report.dense_weights.values()) == sum(after.values())
    for left, why in report.left.items():
        assert isinstance(model.get_submodule(left), nn.Module)
        assert why
    for parameter in after:
        owner, _, own = parameter.split(".parametrizations.")[0].rpartition(".")
        if ".parametrizations." in parameter:
            owner, own = parameter.split(".parametrizations.")[0], parameter.rpartition(".")[2]
        assert own == "weight" or own in report.left[owner]
    packed = sum(before.values()) - sum(after.values())
    assert report.packed_share == packed / sum(before.values())
    assert f"{report.packed_share:.1%} of the weights in matrices are packed" in str(report)
    assert report.to_dict()["packed_share"] == report.packed_share
    told = [str(w.message) for w in caught if "stay dense" in str(w.message)]
    assert len(told) == (name in WARNED)
    assert not [w for w in caught if "match nothing" in str(w.message)]
    if told:
        largest = max(report.unasked, key=report.dense_weights.__getitem__)
        assert largest in told[0]
    assert caught == [] or caught[0].filename == __file__


def test_the_reasons():
    with pytest.warns(UserWarning, match="stay dense"):
        report = quantize_model(Odd(), "int4", progress=False)
    assert report.left == {
        "": "Odd has no quantized form: table",
        "normed": "weight of this ParametrizedLinear is parametrized: original0, original1",
        "spectral": "weight of this ParametrizedLinear is parametrized: original",
        "old_norm": "weight is computed anew in every call (weight_norm, pruning): weight_g, weight_v",
        "pruned": "weight is computed anew in every call (weight_norm, pruning): weight_orig",
        "bilinear": "Bilinear has no quantized form",
        "lstm": "LSTM has no quantized form: weight_ih_l0, weight_hh_l0",
        "attention": "MultiheadAttention has no quantized form: in_proj_weight",
        "attention.out_proj": "the parent of this NonDynamicallyQuantizableLinear reads its weight directly",
        "plain": "only the weight is quantized: extra",
    }
    assert "left dense: the model (Odd has" in str(report)


class OwnConv(nn.Conv1d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


ASKED = [
    ("int4", ["conv"]),
    ("int4", [".*"]),
    ({"up": "int4"}, []),
    ({"conv": None, ".*": "int4"}, []),
]


@pytest.mark.parametrize(("rules", "skip"), ASKED, ids=str)
def test_what_was_asked_for_is_left_without_a_word(rules, skip):
    model = nn.ModuleDict({"up": nn.Linear(32, 32), "conv": OwnConv(32, 32, 3)})
    report = quantize_model(model, rules, skip=skip, progress=False)
    assert "conv" in report.left
    assert not report.unasked
    model = nn.ModuleDict({"up": nn.Linear(32, 32), "conv": OwnConv(32, 32, 3)})
    with pytest.warns(UserWarning, match=r"^75% of the weights .*: conv\.weight \("):
        quantize_model(model, "int4", progress=False)


@pytest.mark.parametrize(("size", "warned"), [(5, False), (6, True)])
def test_five_percent(size: int, warned: bool):
    model = nn.ModuleDict({"up": nn.Linear(95, 2), "own": nn.ParameterList([torch.ones(2, size)])})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report = quantize_model(model, "int4", progress=False)
    assert report.packed_share == 95 / (95 + size)
    assert bool(caught) == warned


def test_what_is_quantized_already_counts_as_packed():
    model = nn.ModuleDict({"a": nn.Linear(32, 32), "b": nn.Linear(32, 32)})
    assert quantize_model(model, {"a": "int4"}, progress=False).packed_share == 0.5
    assert quantize_model(model, "int8", progress=False).packed_share == 1
    assert quantize_model(model, "int8", progress=False).packed_share == 1


def test_an_attribute_with_the_name_of_ours_leaves_the_layer():
    model = nn.ModuleDict({"a": nn.Linear(32, 32), "b": nn.Linear(32, 32)})
    model["a"].format = "mine"
    with pytest.warns(UserWarning, match="a stays dense: a cannot be replaced: its format"):
        report = quantize_model(model, "int4", progress=False)
    assert type(model["a"]) is nn.Linear
    assert "its format" in report.left["a"]
    assert report.packed_share == 0.5


def calls(model: nn.Module) -> dict[str, object]:
    spec = qat.Spec("int4")
    none: dict[str, object] = {"progress": False}
    return {
        "model": lambda rules, skip: quantize_model(model, rules, skip=skip, **none),
        "llm_int8": lambda rules, skip: quantize_llm_int8(
            model, rules if isinstance(rules, str) else dict.fromkeys(rules, "int8_row_a8"), skip=skip, **none
        ),
        "allocate": lambda rules, skip: allocate(model, ["int4", "int8"], 6, skip=skip, **none),
        "mapping": lambda rules, skip: allocate(
            {n: m.weight for n, m in model.named_modules() if isinstance(m, nn.Linear)},
            ["int4", "int8"], 6, skip=skip, **none,
        ),
        "prepare": lambda rules, skip: qat.prepare(
            model, spec if isinstance(rules, str) else dict.fromkeys(rules, spec), skip=skip
        ),
    }  # fmt: skip


@pytest.mark.parametrize("call", calls(nn.Module()))
def test_patterns_that_match_nothing(call: str):
    def run(rules: object, skip: tuple[str, ...]) -> list[str]:
        model = nn.ModuleDict({"a": nn.Linear(32, 32), "b": nn.Linear(32, 32)})
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            calls(model)[call](rules, skip)
        assert all(w.filename == __file__ for w in caught)
        return [str(w.message) for w in caught]

    default = "int8_row_a8" if call == "llm_int8" else "int4"
    assert run(default, ("lm_head", "b")) == []
    (told,) = run(default, ("lm_haed", "b", "layers.0"))
    assert told == "skip has patterns that match nothing in the model: 'lm_haed', 'layers.0'"
    if call not in ("allocate", "mapping"):
        rules = dict.fromkeys(["a", "c", "^a.weight$"], "int4")
        (told,) = run(rules, ())
        assert told.endswith(
            "recipe has patterns that match nothing in the model: 'c', '^a.weight$'"
        )


def test_prepare_says_what_it_leaves():
    model = nn.ModuleDict(
        {"a": nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)), "b": nn.Linear(8, 8)}
    )
    with pytest.warns(UserWarning, match="a is left as it is: weight of this .* is parametrized"):
        assert qat.prepare(model, qat.Spec("int4")) == ["b"]
    assert not isinstance(model["a"], qnn.PackedModule)
