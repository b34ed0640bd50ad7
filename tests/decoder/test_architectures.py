"""The compiled decoder on every architecture that it describes, against transformers' own dense forward with eager
attention.
"""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("transformers")

from tiny import CASES, LENGTH, VOCAB, bound, tiny

from lowbit.decoder.compiled import CompiledDecoder
from lowbit.decoder.runner import Runner

IDS = torch.randint(VOCAB, (LENGTH,), generator=torch.Generator().manual_seed(1))
PIECES = [(LENGTH,), (63, 1, 1, 64, 1, 20), (1,) * LENGTH]


@pytest.fixture(autouse=True)
def one_thread():
    """torch's own threads cost more than they save on models this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def compiled(model, threads=1):
    """A decoder keeps the number of threads that it was made with."""
    torch.set_num_threads(threads)
    decoder = CompiledDecoder(model, LENGTH)
    torch.set_num_threads(1)
    return decoder


def forward(model, ids=IDS):
    with torch.inference_mode():
        return model(ids[None]).logits[0]


def logits_after(decoder, pieces, ids=IDS):
    """Of each piece: the logits after it, and the position of its last token."""
    position = 0
    for piece in ids.split(pieces):
        logits = decoder.forward(piece, position).clone()
        position += len(piece)
        yield logits, position - 1


@pytest.mark.parametrize("case", CASES)
def test_logits(case):
    packed, oracle = tiny(case)
    expected = forward(oracle)
    for threads in (1, 3):
        decoder = compiled(packed, threads)
        # Every sequence but the first meets the stale values of the one before.
        for pieces in PIECES:
            for got, last in logits_after(decoder, pieces):
                error = (got - expected[last]).abs().max()
                assert error < bound(oracle, expected), (threads, pieces, last)


@pytest.mark.parametrize("case", ["llama3", "gemma3"])
def test_long_prompts(case):
    """More tokens than go through the layers together, 512."""
    packed, oracle = tiny(case, num_hidden_layers=2, layer_types=None, max_position_embeddings=1100)
    ids = torch.randint(VOCAB, (1100,), generator=torch.Generator().manual_seed(2))
    expected = forward(oracle, ids)
    decoder = CompiledDecoder(packed, 1100)
    for got, last in logits_after(decoder, (1080, 1, 19), ids):
        assert (got - expected[last]).abs().max() < bound(oracle, expected, 1100), last


def layers(model):
    return model.model.layers


def no_biases(model):
    for layer in layers(model):
        for name in ("q_proj", "k_proj", "v_proj"):
            layer.self_attn.get_submodule(name).bias.zero_()


def plain_rope(model):
    model.model.rotary_emb.inv_freq = 1e4 ** (-torch.arange(0, 20, 2) / 20)


def one_base(model):
    rope = model.model.rotary_emb
    rope.sliding_attention_inv_freq = rope.full_attention_inv_freq


def rope_everywhere(model):
    for layer in layers(model):
        layer.self_attn.use_rope = True


def plain_scale(model):
    for layer in layers(model):
        layer.self_attn.scaling = layer.self_attn.head_dim**-0.5


def no_score_cap(model):
    for layer in layers(model):
        layer.self_attn.attn_logit_softcapping = None


def no_head_norms(model):
    for layer in layers(model):
        for norm in (layer.self_attn.q_norm, layer.self_attn.k_norm):
            norm.forward = lambda x: x


def no_out_norms(model):
    for layer in layers(model):
        for norm in (layer.post_attention_layernorm, layer.post_feedforward_layernorm):
            norm.forward = lambda x: x


def silu(model):
    for layer in layers(model):
        layer.mlp.act_fn = torch.nn.SiLU()


def no_residual_scale(model):
    for layer in layers(model):
        layer.residual_multiplier = 1.0


def whole_rope(model):
    model.model.rotary_emb.inv_freq = 1e4 ** (-torch.arange(0, 32, 2) / 32)


def unscaled_embedding(model):
    model.model.embed_tokens.embed_scale.fill_(1)


def setting(name, value):
    def change(model):
        assert hasattr(model.config, name)
        setattr(model.config, name, value)

    change.__name__ = f"{name}={value}"
    return change


def multiplier(model):
    model.model.embedding_multiplier = 1.0


# What a decoder that ignores a feature would compute.
IGNORED = {
    "llama3": [no_biases, plain_rope],
    "linear": [plain_rope],
    "yarn": [plain_rope],
    "mistral": [setting("sliding_window", 1000)],
    "qwen2": [no_biases, setting("sliding_window", 1000)],
    "qwen3": [no_head_norms],
    "smollm3": [rope_everywhere, setting("sliding_window", 1000)],
    "granite": [plain_scale, no_residual_scale, multiplier, setting("logits_scaling", 1.0)],
    "phi3": [whole_rope, setting("sliding_window", 1000)],
    "gemma": [silu, unscaled_embedding],
    "gemma2": [
        silu, plain_scale, no_score_cap, no_out_norms, unscaled_embedding,
        setting("final_logit_softcapping", None), setting("sliding_window", 1000),
    ],
    "gemma3": [
        one_base, plain_scale, no_head_norms, no_out_norms,
        setting("final_logit_softcapping", None), setting("sliding_window", 1000),
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("case", "change"),
    [(case, change) for case, changes in IGNORED.items() for change in changes],
    ids=lambda v: getattr(v, "__name__", v),
)
def test_every_feature_counts(case, change):
    """So that no comparison above passes without it."""
    _, oracle = tiny(case)
    expected = forward(oracle)
    change(oracle)
    assert (forward(oracle) - expected).abs().max() > 100 * bound(oracle, expected)


def test_all_cases_have_features():
    assert IGNORED.keys() == CASES.keys()


@pytest.mark.parametrize("case", CASES)
def test_greedy_tokens(case):
    packed, oracle = tiny(case)
    runner = Runner(packed, LENGTH)
    assert isinstance(runner._decoder, CompiledDecoder)
    prompt = IDS[:40]
    expected = oracle.generate(
        prompt[None], attention_mask=torch.ones_like(prompt[None]), max_new_tokens=60, do_sample=False
    )  # fmt: skip
    assert list(runner.generate(prompt, 60)) == expected[0, 40:].tolist()


@pytest.mark.parametrize("case", ["phi3", "gemma2", "gemma3"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype, case):
    """As near to the fp32 model of the same weights as transformers' forward in that dtype."""
    packed, oracle = tiny(case, dtype)
    exact = forward(oracle)
    error = (forward(packed).float() - exact).norm()
    decoder = compiled(packed)
    ones = torch.stack([logits.float() for logits, _ in logits_after(decoder, (1,) * LENGTH)])
    assert (ones - exact).norm() < 1.25 * error


@pytest.mark.parametrize("case", ["mistral", "gemma"])
def test_norms_round_where_transformers_does(case):
    """Of a layer that adds nothing and a head that copies, the logits are a norm, before or behind its weight."""
    packed, _ = tiny(case, torch.bfloat16, num_hidden_layers=1, tie_word_embeddings=False)
    for linear in (packed.model.layers[0].self_attn.o_proj, packed.model.layers[0].mlp.down_proj):
        linear.scales.zero_()
    packed.lm_head.weight.data = torch.eye(VOCAB, 72, dtype=torch.bfloat16)
    ids = torch.arange(100)
    expected = forward(packed, ids)
    decoder = compiled(packed)
    got = torch.stack([logits for logits, _ in logits_after(decoder, (1,) * 100, ids)])
    # Sums in another order round a few another way; one rounding more would every tenth.
    assert (got == expected)[:, :72].float().mean() > 0.998


@pytest.mark.parametrize("case", ["mistral", "gemma2", "phi3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stale_values_do_not_return(case, dtype):
    """A sequence after one whose keys and values were all NaN gives what a new decoder gives."""
    packed, _ = tiny(case, dtype)
    stale, fresh = compiled(packed), compiled(packed)
    embedding = packed.model.embed_tokens.weight.data
    saved = embedding[202].clone()
    embedding[202] = math.nan
    assert stale.forward(torch.full((LENGTH,), 202), 0).isnan().all()
    embedding[202] = saved
    for pieces in PIECES[1:]:
        for (got, _), (expected, _) in zip(
            logits_after(stale, pieces), logits_after(fresh, pieces), strict=True
        ):
            assert torch.equal(got, expected)


def test_what_left_the_window_is_not_read():
    """Of one layer with a window, tokens before it may be NaN."""
    packed, oracle = tiny("mistral", num_hidden_layers=1)
    expected = forward(oracle)
    decoder = compiled(packed)
    decoder.forward(IDS[:140], 0)
    embedding = packed.model.embed_tokens.weight.data
    used = set(IDS.tolist())
    unused = next(i for i in range(VOCAB) if i not in used)
    embedding[unused] = math.nan
    decoder.forward(torch.full((60,), unused), 0)
    for i in range(140, LENGTH):
        got = decoder.forward(IDS[i : i + 1], i)
        assert (got - expected[i]).abs().max() < bound(oracle, expected)
    # The window of position 128 begins at 59.
    assert decoder.forward(IDS[128:129], 128).isnan().all()


def test_a_prompt_of_several_parts():
    """A call takes 512 tokens at a time; the last layer's keys and values of their last one are read by the next, which
    sees little else.
    """
    packed, oracle = tiny("mistral", max_position_embeddings=1100, sliding_window=2)
    ids = torch.randint(VOCAB, (1025,), generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        expected = oracle(ids[None]).logits[0]
    for count in (513, 1025):
        got = CompiledDecoder(packed, 1025).forward(ids[:count], 0)
        assert (got - expected[count - 1]).abs().max() < bound(oracle, expected)
