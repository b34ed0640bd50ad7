"""Tokens that an attention mask hides do not count in calibration: statistics are those of the real tokens alone."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import Tensor, nn

from lowbit.ptq import OBSERVERS, attach, collect, output_fisher, quantize_llm_int8, quantize_model

transformers.logging.set_verbosity_error()
NAMES = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"]
LENGTHS, TOTAL = (4, 5, 6, 12), 12
ROWS = [torch.randint(3, 64, (n,)) for n in LENGTHS]


def llama() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def padded(left: bool = False) -> tuple[Tensor, Tensor]:
    ids = torch.zeros(len(ROWS), TOTAL, dtype=torch.long)
    mask = torch.zeros(len(ROWS), TOTAL, dtype=torch.long)
    for i, row in enumerate(ROWS):
        where = slice(TOTAL - len(row), TOTAL) if left else slice(0, len(row))
        ids[i, where], mask[i, where] = row, 1
    return ids, mask


def gathered(model: nn.Module, names: list[str], *calls: dict[str, object]) -> dict[str, object]:
    with torch.no_grad(), collect(model, names) as found:
        for call in calls:
            model(**call)
    return found


def assert_alike(got: dict, wanted: dict) -> None:
    for name, statistics in wanted.items():
        assert got[name].samples == statistics.samples
        torch.testing.assert_close(got[name].absmax, statistics.absmax, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(got[name].hessian, statistics.hessian, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(got[name].absmean, statistics.absmean, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("dtype", [torch.long, torch.bool, torch.float32])
def test_statistics(left: bool, dtype: torch.dtype):
    model = llama()
    ids, mask = padded(left)
    position = (mask.cumsum(1) - 1).clamp(min=0)
    wanted = gathered(model, NAMES, *({"input_ids": row[None]} for row in ROWS))
    got = gathered(
        model, NAMES, {"input_ids": ids, "attention_mask": mask.to(dtype), "position_ids": position}
    )
    assert_alike(got, wanted)
    # Without a mask all tokens count, and after a call that had one.
    all_of = gathered(model, NAMES, {"input_ids": ids, "attention_mask": mask}, {"input_ids": ids})
    assert all_of[NAMES[0]].samples == sum(LENGTHS) + ids.numel()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


class Wrapper(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner = model

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.inner(**batch).logits


class Flat(nn.Module):
    """Works on (batch * tokens, K), and sends some of the rows to an expert."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up, self.expert = nn.Embedding(64, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embed(ids).flatten(0, 1)
        return self.up(x).index_add(0, torch.arange(5), self.expert(x[:5]))


def test_flattened_rows_and_routed_ones():
    """Rows that a router has chosen fit no mask, and count as they are."""
    model = Flat()
    ids, mask = padded()
    with torch.no_grad(), collect(model, ["up", "expert"]) as found:
        model(ids, mask)  # by position
    x = model.embed(ids)[mask.bool()].detach()
    assert (found["up"].samples, found["expert"].samples) == (len(x), 5)
    torch.testing.assert_close(found["up"].hessian, x.T @ x / len(x))


def test_a_mask_of_a_module_inside():
    inner = llama()
    model = Wrapper(inner)
    ids, mask = padded()
    wanted = gathered(inner, NAMES, *({"input_ids": row[None]} for row in ROWS))
    names = [f"inner.{name}" for name in NAMES]
    with torch.no_grad(), collect(model, names) as found:
        model({"input_ids": ids, "attention_mask": mask})
    assert_alike({name: found[f"inner.{name}"] for name in NAMES}, wanted)


def test_a_call_that_raises_leaves_no_mask():
    model = Flat()
    ids, mask = padded()
    with torch.no_grad(), collect(model, ["up"]) as found:
        with pytest.raises(RuntimeError):
            model(ids[:1, :3], mask[:1, :3])
        model.up(torch.ones(3, 8))
    assert found["up"].samples == 3 + 3


def test_encoder_and_decoder():
    """Each has its own mask, also of the same shape; a decoder without one counts all its tokens."""
    config = transformers.T5Config(
        vocab_size=64,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=1,
        num_heads=4,
        decoder_start_token_id=0,
    )
    model = transformers.T5ForConditionalGeneration(config).eval()
    ids, mask = padded()
    names = ["encoder.block.0.layer.0.SelfAttention.q", "decoder.block.0.layer.0.SelfAttention.q"]
    call = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": ids}
    found = gathered(model, names, call)
    assert [found[name].samples for name in names] == [sum(LENGTHS), ids.numel()]
    found = gathered(
        model,
        names,
        {**call, "decoder_attention_mask": mask.flip(0)[:, :7], "decoder_input_ids": ids[:, :7]},
    )
    assert [found[name].samples for name in names] == [sum(LENGTHS), int(mask[:, :7].sum())]


@pytest.mark.parametrize("name", sorted(OBSERVERS))
def test_observers(name: str):
    model = llama()
    ids, mask = padded()
    observers = [OBSERVERS[name]() for _ in range(2)]
    seen = []
    with (
        attach(model, {NAMES[1]: type("Keep", (), {"update": lambda _, x: seen.append(x)})()}),
        torch.no_grad(),
    ):
        for row in ROWS:
            model(row[None])
    observers[0].update(torch.cat([x.flatten(0, -2) for x in seen]))
    with attach(model, {NAMES[1]: observers[1]}), torch.no_grad():
        model(input_ids=ids, attention_mask=mask)
    scales = [observer.grid().scale for observer in observers]
    assert scales[0] == pytest.approx(scales[1], rel=1e-4)


def test_fisher():
    """Padding is neither an input nor a prediction."""
    model = llama()
    row = ROWS[0]
    ids, mask = padded()
    wanted = output_fisher(model, NAMES, [row[None]])
    got = output_fisher(model, NAMES, [{"input_ids": ids[:1], "attention_mask": mask[:1]}])
    for name in NAMES:
        torch.testing.assert_close(got[name].inputs, wanted[name].inputs, rtol=1e-3, atol=1e-7)
        torch.testing.assert_close(got[name].outputs, wanted[name].outputs, rtol=1e-3, atol=1e-5)


# Almost every feature of so small a model is an outlier, and what is left of a row is small.
@pytest.mark.filterwarnings("ignore:weight. .* so small")
@pytest.mark.parametrize("how", ["gptq", "llm_int8"])
def test_models_are_quantized_by_their_real_tokens(how: str, monkeypatch: pytest.MonkeyPatch):
    ids, mask = padded()
    # Padding that would change everything: its embedding is far larger than the others.
    models, state = [llama(), llama()], None
    for model in models:
        state = state or model.state_dict()
        model.load_state_dict(state)
        model.model.embed_tokens.weight.data[0] = 50.0
    calls = [[(row[None],) for row in ROWS], [{"input_ids": ids, "attention_mask": mask}]]
    for model, calibration in zip(models, calls, strict=True):
        if how == "gptq":
            quantize_model(model, "int4_g16", method=how, calibration=calibration, progress=False)
        else:
            quantize_llm_int8(model, threshold=1.5, calibration=calibration, progress=False)
    for name in NAMES:
        a, b = (model.get_submodule(name) for model in models)
        if how == "gptq":
            a, b = (layer.quant_tensor().dequantize() for layer in (a, b))
            # Sums in another order: a weight between two codes may fall to either side.
            assert (a != b).double().mean() < 0.01
        else:
            assert torch.equal(a.features, b.features)
