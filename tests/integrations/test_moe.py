"""Fused experts of transformers 5: every family quantized, generating, calibrated, saved, loaded and dense again. The
oracle is transformers' own forward with the dequantized weights.
"""

from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")
pytest.importorskip("transformers.integrations.moe")

import lowbit  # noqa: E402
from lowbit.nn import QuantExperts, QuantLinear  # noqa: E402
from lowbit.nn.stand_ins import stand_ins  # noqa: E402
from lowbit.ptq import InputStatistics  # noqa: E402

BASE = {
    "vocab_size": 32, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": False, "pad_token_id": 0,
}  # fmt: skip
FOUR = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", {"num_local_experts": 4}),
    "qwen2_moe": ("Qwen2Moe", {**FOUR, "shared_expert_intermediate_size": 48}),
    "qwen3_moe": ("Qwen3Moe", {**FOUR, "head_dim": 16}),
    "gpt_oss": ("GptOss", {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16}),
    "deepseek_v3": (
        "DeepseekV3",
        {
            "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "n_group": 2, "topk_group": 1,
            "n_shared_experts": 1, "first_k_dense_replace": 1, "q_lora_rank": 32, "kv_lora_rank": 32,
            "num_hidden_layers": 2, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16,
            "num_key_value_heads": 4,
        },
    ),
    "olmoe": ("Olmoe", FOUR),
    "granitemoe": ("GraniteMoe", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "phimoe": ("Phimoe", {"num_local_experts": 4, "num_experts_per_tok": 2}),
}  # fmt: skip
every_model = pytest.mark.parametrize("name", MODELS)
# All of it, heads and embeddings as well.
RULES = {"embed_tokens": "int8_g32", ".*": "int4_g32"}


def dense(name: str) -> Any:
    kind, config = MODELS[name]
    torch.manual_seed(0)
    made = getattr(transformers, f"{kind}Config")(**{**BASE, **config})
    model = getattr(transformers, f"{kind}ForCausalLM")(made).eval()
    with torch.no_grad():  # biases, which are 0
        for key, p in model.named_parameters():
            if key.endswith("bias"):
                p.normal_()
    return model


def logits(model: nn.Module, tokens: int = 9) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(2 * tokens).view(2, tokens) % 32).logits


def generated(model: Any) -> list[int]:
    ids = torch.arange(1, 7)[None]
    return model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False
    )[0].tolist()


def quantized(model: Any, rules: Any = RULES, **more: Any) -> tuple[Any, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = lowbit.quantize_model(model, rules, skip=(), progress=False, **more)
    return model, report


def experts(model: nn.Module) -> list[tuple[str, QuantExperts]]:
    return [(n, m) for n, m in model.named_modules() if isinstance(m, QuantExperts)]


@every_model
def test_quantized_generates_as_dequantized(name: str):
    """At least 95 % are packed; the dense model of the same values gives the same tokens, and logits within what other
    orders of fp32 sums make: here 1e-4 of the largest, with rows of at most 96 values and 2 layers."""
    model, report = quantized(dense(name))
    assert report.packed_share >= 0.95
    assert f"{report.packed_share:.1%} of the weights" in str(report)
    count = sum(len(m) for _, m in experts(model))
    assert count == sum(".experts." in row.name for row in report.layers)
    plain = dense(name)
    for key, packed in experts(model):
        values = torch.stack([lowbit.dequantize(layer.quant_tensor()) for layer in packed])
        owner = plain.get_submodule(key.rpartition(".")[0])
        parameter = owner.get_parameter(key.rpartition(".")[2])
        parameter.data = values.transpose(1, 2).contiguous() if owner.is_transposed else values
    for key, module in model.named_modules():
        if isinstance(module, lowbit.nn.PackedModule) and ".experts." not in key:
            plain.get_submodule(key).weight.data = module.weight.clone()
    want, found = logits(plain), logits(model)
    assert (found - want).abs().max() <= 1e-4 * want.abs().max()
    assert generated(model) == generated(plain)
    model.dequantize()
    assert not experts(model)
    assert torch.equal(logits(model), want)
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "qwen3_moe", "deepseek_v3"])
def test_saved_and_loaded(tmp_path: Path, name: str):
    model, _ = quantized(dense(name))
    want, state = logits(model), model.state_dict()
    model.save_pretrained(tmp_path / "a")
    lowbit.save(model, tmp_path / "b")
    model.config.save_pretrained(tmp_path / "b")
    kind = type(model)
    loaded = [
        kind.from_pretrained(tmp_path / "a"),
        kind.from_pretrained(tmp_path / "b"),
        lowbit.load_model(tmp_path / "a"),
        lowbit.load(dense(name), tmp_path / "b"),
    ]
    if name == "gpt_oss":
        loaded += [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for again in loaded:
        found = again.state_dict()
        assert found.keys() == state.keys()
        assert all(torch.equal(found[key], t) for key, t in state.items())
        assert torch.equal(logits(again), want)
    # Filled from a state dict alone.
    other, _ = quantized(dense(name))
    other.load_state_dict(state)
    assert torch.equal(logits(other), want)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "qwen3_moe", "deepseek_v3"])
def test_on_load(tmp_path: Path, name: str):
    dense(name).save_pretrained(tmp_path)
    kind = type(dense(name))
    config = lowbit.LowbitConfig(RULES, skip=())
    model = kind.from_pretrained(tmp_path, quantization_config=config)
    want, _ = quantized(kind.from_pretrained(tmp_path))
    assert model.state_dict().keys() == want.state_dict().keys()
    assert torch.equal(logits(model), logits(want))
    assert generated(model) == generated(want)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_some_experts_alone(tmp_path: Path, name: str):
    """A recipe may name them; the others are linears, saved and loaded as such."""
    model, report = quantized(dense(name), {r"layers\.0\.mlp\.experts\.gate_up_proj\.[02]": "nf4"})
    assert len(report.layers) == 2
    (_, made), (_, down) = experts(model)
    assert [type(layer) for layer in made] == [QuantLinear, nn.Linear, QuantLinear, nn.Linear]
    assert [type(layer) for layer in down] == [nn.Linear] * 4
    want = logits(model)
    model.save_pretrained(tmp_path / "a")
    assert torch.equal(logits(type(model).from_pretrained(tmp_path / "a")), want)
    assert torch.equal(logits(lowbit.load_model(tmp_path / "a")), want)
    dense(name).save_pretrained(tmp_path / "dense")
    rules = lowbit.LowbitConfig({r"layers\.0\.mlp\.experts\.gate_up_proj\.[02]": "nf4"})
    again = type(model).from_pretrained(tmp_path / "dense", quantization_config=rules)
    assert torch.equal(logits(again), want)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_nothing_changes_without_a_match_or_with_an_error(name: str):
    model = dense(name)
    before = list(model.state_dict()), [*model.named_modules()], [*model.parameters()]
    want = logits(model)

    def same() -> None:
        assert list(model.state_dict()) == before[0]
        assert all(a is b for a, b in zip(model.parameters(), before[2], strict=True))
        assert [*model.named_modules()] == before[1]
        assert torch.equal(logits(model), want)
        assert model.model.layers[0].mlp.experts.config is model.config

    quantized_nothing = lowbit.quantize_model(model, {"lm_head": None}, progress=False)
    assert not quantized_nothing.layers
    same()

    def fail(layer: str, *_: Any) -> None:
        if layer.endswith("layers.0.mlp.experts.down_proj.2"):
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        lowbit.quantize_model(model, "nf4", progress=False, on_layer=fail)
    same()


@pytest.mark.parametrize("method", ["gptq", "kmeans"])
def test_calibrated_expert_by_expert(method: str):
    """Experts that a token reached learn from their tokens alone; the others are rounded, and the report says so."""
    name, format = "qwen3_moe", "kmeans3_g64" if method == "kmeans" else "int4_g32"
    model = dense(name)
    seen: dict[str, InputStatistics] = {}

    def keep(layer: str, args: Any) -> None:
        seen.setdefault(layer, InputStatistics(args[0].shape[-1])).update(args[0])

    batches = [torch.tensor([[1, 2, 3]]), torch.tensor([[4, 5, 1]])]
    with stand_ins(model):
        handles = [
            module.register_forward_pre_hook(lambda _, args, key=key: keep(key, args))
            for key, module in model.named_modules()
            if ".experts." in key and isinstance(module, nn.Linear)
        ]
        with torch.no_grad():
            for batch in batches:
                model(batch)
        for handle in handles:
            handle.remove()
    dense_weights = {
        f"{key}.{e}": rows.clone()
        for key, p in model.named_parameters()
        if p.dim() == 3
        for e, rows in enumerate(p.detach())
    }
    silent = dense_weights.keys() - seen.keys()
    assert silent
    assert seen
    with pytest.warns(UserWarning, match="calibration says nothing of"):
        report = lowbit.quantize_model(
            model,
            {r"layers\.0\.mlp\.experts": format},
            method=method,
            calibration=batches,
            progress=False,
        )
    rows = {row.name: row for row in report.layers}
    assert rows.keys() == {key for key in dense_weights if ".0.mlp" in key}
    for key, row in rows.items():
        found = model.get_submodule(key).quant_tensor()
        if key in silent:
            assert "no input has reached it in calibration" in (row.note or "")
            want = lowbit.quantize(dense_weights[key], format)
        else:
            assert row.note is None
            given = {"hessian": seen[key].relative_hessian}
            if method == "kmeans":
                given = {"weights": seen[key].relative_diagonal}
            want = lowbit.quantize(dense_weights[key], format, method, **given)
        assert torch.equal(lowbit.dequantize(found), lowbit.dequantize(want))


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_compiled(name: str):
    model, _ = quantized(dense(name))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    want, found = logits(model), logits(compiled)
    assert (found - want).abs().max() <= 1e-5 * want.abs().max()


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_gates_apart_from_what_they_multiply(name: str):
    """Views of the parameter's rows, which it is again; quantized, saved as such and compiled it computes the same."""
    model = dense(name)
    want, before = logits(model), dict(model.named_parameters())
    owner = "model.layers.0.mlp.experts"
    with stand_ins(model, apart=[owner]) as forms:
        assert len(forms) == 12
        for key, form in forms.items():
            stack = key.rpartition(".")[0].removeprefix(owner + ".")
            fused = before[f"{owner}.{'down_proj' if stack == 'down_proj' else 'gate_up_proj'}"]
            assert torch.equal(model.get_submodule(key).weight, form.linear(fused))
        assert (logits(model) - want).abs().max() <= 1e-5 * want.abs().max()
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    assert all(after[key] is p for key, p in before.items())
    assert torch.equal(logits(model), want)
    with stand_ins(model, apart=[owner]):
        quantized(model)
    want, found = logits(quantized(dense(name))[0]), logits(model)
    assert (found - want).abs().max() <= 1e-5 * want.abs().max()
    if name == "mixtral":
        return  # one after the other, as without halves
    compiled = logits(torch.compile(model, fullgraph=True, backend="aot_eager"))
    assert (compiled - found).abs().max() <= 1e-5 * want.abs().max()


def test_out_of_range_and_sentinels():
    model, _ = quantized(dense("mixtral"))
    module = model.model.layers[0].mlp.experts
    x, weights = torch.randn(3, 64), torch.rand(3, 2)
    with torch.no_grad():
        with pytest.raises(ValueError, match=r"experts must be in \[0, 4\), got 4"):
            module(x, torch.tensor([[0, 1], [2, 4], [3, 3]]), weights)
        with pytest.raises(ValueError, match=r"got -1"):
            module(x, torch.tensor([[0, 1], [2, -1], [3, 3]]), weights)
        module._is_expert_parallel = True
        y = module(x, torch.tensor([[0, 1], [4, 4], [3, 4]]), weights)
        assert torch.equal(y[1], torch.zeros(64))
        module._is_expert_parallel = False
        assert torch.equal(y[0], module(x[:1], torch.tensor([[0, 1]]), weights[:1])[0])
        assert module(x[:0], torch.zeros(0, 2, dtype=torch.int64), weights[:0]).shape == (0, 64)


def test_switching_the_implementation_changes_dense_experts_alone():
    model, _ = quantized(dense("mixtral"), {"experts": "nf4"})
    want = logits(model)
    for how in ("eager", "batched_mm", "grouped_mm"):
        model.set_experts_implementation(how)
        assert (logits(model) - want).abs().max() <= 1e-4 * want.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype):
    model, _ = quantized(dense("gpt_oss").to(dtype))
    assert logits(model).dtype == dtype
    assert model.get_submodule("model.layers.0.mlp.experts.gate_up_proj.0").weight.dtype == dtype


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_trained_adapters_of_experts():
    peft = pytest.importorskip("peft")
    model, _ = quantized(dense("qwen3_moe"))
    made = peft.get_peft_model(
        model, peft.LoraConfig(target_modules=r".*experts\.down_proj\.\d+", init_lora_weights=False)
    )
    made(input_ids=torch.arange(6)[None], labels=torch.arange(6)[None]).loss.backward()
    grads = [p.grad for n, p in made.named_parameters() if "lora_" in n and p.grad is not None]
    assert grads
    assert any(bool(g.any()) for g in grads)


def test_no_copies_of_what_is_quantized():
    """Every weight that is quantized is a view of the parameter that it is a part of."""
    model = dense("mixtral")
    fused = {p.untyped_storage().nbytes() for p in model.parameters() if p.dim() == 3}
    found: list[int] = []

    def look(name: str, weight: torch.Tensor, _: Any) -> None:
        if ".experts." in name:
            found.append(weight.untyped_storage().nbytes())

    lowbit.quantize_model(model, "nf4", progress=False, on_layer=look, atomic=False)
    assert set(found) == fused
    assert len(found) == 8
