"""What the compiled decoder has no words for: it says so, and transformers' own forward and cache decode instead."""

from __future__ import annotations

import pytest
import torch

transformers = pytest.importorskip("transformers")

from tiny import LENGTH, VOCAB, bound, tiny  # noqa: E402

import lowbit  # noqa: E402
from lowbit.decoder.compiled import CompiledDecoder  # noqa: E402
from lowbit.decoder.eager import EagerDecoder  # noqa: E402
from lowbit.decoder.generic import GenericDecoder  # noqa: E402
from lowbit.decoder.runner import Runner  # noqa: E402

SIZES = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 160, "pad_token_id": 0,
    "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
IDS = torch.randint(VOCAB, (40,), generator=torch.Generator().manual_seed(1))


def olmo2():
    torch.manual_seed(0)
    model = transformers.Olmo2ForCausalLM(transformers.Olmo2Config(**SIZES)).eval()
    lowbit.quantize_model(model, "int8", skip=("lm_head",))
    return model


def gpt2():
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=VOCAB, n_embd=64, n_layer=2, n_head=4, n_positions=160, bos_token_id=None, eos_token_id=None
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config).eval()


@pytest.mark.parametrize("make", [olmo2, gpt2])
def test_another_architecture_gives_the_models_tokens(make, caplog):
    model = make()
    runner = Runner(model, LENGTH)
    assert isinstance(runner._decoder, GenericDecoder)
    assert caplog.text.count("transformers decodes the model, not the compiled decoder") == 1
    assert f"the model is a {type(model).__name__}, not one of LlamaForCausalLM" in caplog.text
    expected = model.generate(
        IDS[None], attention_mask=torch.ones_like(IDS[None]), max_new_tokens=30, do_sample=False
    )[0, len(IDS) :].tolist()
    for _ in range(2):
        runner.reset()
        assert list(runner.generate(IDS, 30)) == expected
    with torch.inference_mode():
        logits = model(IDS[None]).logits[0]
    runner.reset()
    for piece in IDS.split([20, 1, 1, 18]):
        got = runner.forward(piece)
        error = (got - logits[runner.position - 1]).abs().max()
        assert error < 1e-4 * logits.abs().max()


def test_positions_follow_one_another():
    decoder = GenericDecoder(gpt2())
    decoder.forward(IDS, 0)
    with pytest.raises(ValueError, match="position must be 0 or 40, got 39"):
        decoder.forward(IDS[:1], 39)


def test_a_model_without_keys_and_values():
    config = transformers.MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=1)
    with pytest.raises(NotImplementedError, match="must keep a cache .* got a MambaForCausalLM"):
        Runner(transformers.MambaForCausalLM(config), 8)


def own_mlp(model):
    class MLP(type(model.model.layers[1].mlp)):
        def forward(self, x):
            return 2 * super().forward(x)

    model.model.layers[1].mlp.__class__ = MLP


def own_norm(model):
    model.model.layers[2].self_attn.q_norm = torch.nn.RMSNorm(20)


def other_activation(model):
    model.config.hidden_activation = "quick_gelu"
    for layer in model.model.layers:
        layer.mlp.act_fn = transformers.activations.ACT2FN["quick_gelu"]


def other_head(model):
    class Doubled(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model.lm_head.__class__ = Doubled


def dense_layer(model):
    mlp = model.model.layers[0].mlp
    mlp.up_proj = torch.nn.Linear(72, 101, bias=False)


def own_last_norm(model):
    model.model.norm = torch.nn.RMSNorm(72)


def fewer_heads(model):
    model.config.num_attention_heads = 4


def own_embedding(model):
    class Shifted(torch.nn.Embedding):
        def forward(self, x):
            return super().forward(x) + 1

    model.model.embed_tokens = Shifted(VOCAB, 72)


def hooked(model):
    model.model.layers[1].mlp.register_forward_hook(lambda module, x, y: 2 * y)


def hooked_before(model):
    model.model.norm.register_forward_pre_hook(lambda module, x: (x[0] + 1,))


def patched(model):
    attention = model.model.layers[0].self_attn.o_proj
    attention.forward = lambda x: 2 * type(attention).forward(attention, x)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (hooked, "model.layers.1.mlp, a Gemma3MLP, has hooks, which it would not call"),
        (hooked_before, "model.norm, a Gemma3RMSNorm, has hooks, which it would not call"),
        (patched, "model.layers.0.self_attn.o_proj, a QuantLinear, has a forward that is patched"),
        (own_mlp, "mlp of layer 1 is a MLP, not transformers' own"),
        (own_norm, "self_attn.q_norm of layer 2 is a RMSNorm, not transformers' own"),
        (other_activation, "its activation is 'quick_gelu'"),
        (other_head, "lm_head is a Doubled, not a QuantLinear"),
        (dense_layer, "mlp.up_proj of layer 0 is a Linear, not a QuantLinear"),
        (own_last_norm, "model.norm is a RMSNorm, not transformers' own"),
        (fewer_heads, "self_attn.q_proj of layer 0 has shape (120, 72), not (80, 72)"),
        (own_embedding, "model.embed_tokens is a Shifted, not a QuantEmbedding"),
    ],
)
def test_obstacles(change, why, caplog):
    packed, _ = tiny("gemma3")
    change(packed)
    assert CompiledDecoder.obstacle(packed) == why
    runner = Runner(packed, LENGTH)
    assert why in caplog.text
    with torch.inference_mode():
        expected = packed(IDS[None]).logits[0]
    runner.forward(IDS[:39])
    assert (runner.forward(IDS[39:]) - expected[-1]).abs().max() < bound(packed, expected)


def test_hooks_of_transformers_do_nothing():
    packed, _ = tiny("gemma3")
    packed(IDS[None], output_hidden_states=True)
    assert any(m._forward_hooks for m in packed.modules())
    assert CompiledDecoder.obstacle(packed) is None


def test_hooks_of_a_llama_on_torch_are_called():
    """Another decoder of a llama, which torch's calls are."""
    packed, _ = tiny("linear")
    dense_layer(packed)
    assert EagerDecoder.serves(packed)
    assert isinstance(Runner(packed, LENGTH)._decoder, EagerDecoder)
    packed.model.layers[0].mlp.register_forward_hook(lambda module, x, y: 2 * y)
    assert not EagerDecoder.serves(packed)
    runner = Runner(packed, LENGTH)
    with torch.inference_mode():
        expected = packed(IDS[None]).logits[0, -1]
    assert (runner.forward(IDS) - expected).abs().max() < bound(packed, expected)


def test_gate_and_up_in_one_weight_of_odd_size():
    packed, _ = tiny("phi3", intermediate_size=96)
    assert "gate and up are one weight of 96 features each" in CompiledDecoder.obstacle(packed)
