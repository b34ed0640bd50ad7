"""Several sequences at a time give what each gives alone."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("transformers")

from test_architectures import IDS, compiled, forward, one_thread  # noqa: F401
from tiny import CASES, LENGTH, VOCAB, bound, tiny

from lowbit.decoder.batch import BatchRunner
from lowbit.decoder.compiled import CompiledDecoder
from lowbit.decoder.runner import Runner
from lowbit.decoder.sampling import Sampling

SEQUENCES = 3


def decoder_of(packed, threads=1, cache_dtype=None):
    torch.set_num_threads(threads)
    decoder = CompiledDecoder(packed, LENGTH, cache_dtype, SEQUENCES)
    torch.set_num_threads(1)
    return decoder


def sequence(i):
    return torch.randint(VOCAB, (LENGTH,), generator=torch.Generator().manual_seed(10 + i))


@pytest.mark.parametrize("case", CASES)
def test_logits(case):
    """Of sequences at different positions, in any order, in a batch of any size."""
    packed, oracle = tiny(case)
    texts = [sequence(i) for i in range(SEQUENCES)]
    expected = [forward(oracle, ids) for ids in texts]
    for threads in (1, 3):
        decoder = decoder_of(packed, threads)
        positions = [100, 1, 62]
        for i, start in enumerate(positions):
            got = decoder.forward(texts[i][:start], 0, i)
            assert (got - expected[i][start - 1]).abs().max() < bound(oracle, expected[i])
        for order in [(0, 1, 2)] * 20 + [(2, 0), (1,), (1, 2)] * 8:
            logits = decoder.step(
                [int(texts[i][positions[i]]) for i in order], [(i, positions[i]) for i in order]
            )
            assert logits.shape == (len(order), VOCAB)
            for row, i in enumerate(order):
                error = (logits[row] - expected[i][positions[i]]).abs().max()
                assert error < bound(oracle, expected[i]), (threads, order, i, positions)
                assert decoder.likeliest(row) == int(logits[row].argmax())
                positions[i] += 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype):
    packed, oracle = tiny("qwen2", dtype)
    ids = sequence(0)
    exact = forward(oracle, ids)
    decoder = decoder_of(packed)
    rows = []
    for position, token in enumerate(ids.tolist()):
        logits = decoder.step([token] * 3, [(i, position) for i in range(3)]).float()
        assert torch.equal(logits[0], logits[1])
        assert torch.equal(logits[0], logits[2])
        rows.append(logits[0].clone())
    error = (forward(packed, ids).float() - exact).norm()
    assert (torch.stack(rows) - exact).norm() < 1.25 * error


@pytest.mark.parametrize("cache", [torch.float32, torch.int8, torch.float8_e4m3fn], ids=str)
def test_sequences_do_not_meet(cache):
    """Neither NaN of others nor of the one before in its place."""
    packed, _ = tiny("mistral")
    decoder, alone = decoder_of(packed, cache_dtype=cache), decoder_of(packed, cache_dtype=cache)
    embedding = packed.model.embed_tokens.weight.data
    saved = embedding[202].clone()
    embedding[202] = math.nan
    broken = torch.full((LENGTH,), 202)
    for i in range(SEQUENCES):
        assert decoder.forward(broken, 0, i).isnan().all()
    ids = torch.arange(100)
    first = alone.forward(ids[:50], 0, 1).clone()
    assert torch.equal(decoder.forward(ids[:50], 0, 1), first)
    for position in range(50, 100):
        token = int(ids[position])
        got = decoder.step([202, token], [(0, position), (1, position)])
        expected = alone.step([0, token], [(0, position), (1, position)])
        assert torch.equal(got[1], expected[1])
        assert got[0].isnan().all()
    embedding[202] = saved


SETTINGS = [None, Sampling(temperature=0.9, top_k=20, repetition_penalty=1.2, seed=5)]


@pytest.mark.parametrize("sampling", SETTINGS, ids=["greedy", "sampled"])
def test_generated_tokens(sampling):
    """More prompts than sequences, which end at different lengths."""
    packed, _ = tiny("gemma2")
    prompts = [IDS[: 5 + 13 * i] for i in range(7)]
    runner = Runner(packed, LENGTH)
    # Tokens that some answers meet early.
    stop = set()
    for prompt in prompts[:3]:
        runner.reset()
        stop.add(list(runner.generate(prompt, 9, sampling=sampling))[-1])
    expected = []
    for prompt in prompts:
        runner.reset()
        expected.append(list(runner.generate(prompt, 30, frozenset(stop), sampling)))
    assert len({len(tokens) for tokens in expected}) > 2
    batch = BatchRunner(packed, LENGTH, SEQUENCES)
    for _ in range(2):
        got = [[] for _ in prompts]
        order = []
        for prompt, token in batch.generate(prompts, 30, frozenset(stop), sampling):
            got[prompt].append(token)
            order.append(prompt)
        assert got == expected
        assert order[:4] == [0, 1, 2, 0] or len(expected[0]) < 2


def test_bad_arguments():
    packed, _ = tiny("llama3")
    with pytest.raises(ValueError, match="sequences must be at least 1, got 0"):
        BatchRunner(packed, LENGTH, 0)
    batch = BatchRunner(packed, 20, 2)
    with pytest.raises(ValueError, match=r"prompt 1 must be 1-D with 1 to 11 tokens .*\(12,\)"):
        next(batch.generate([IDS[:11], IDS[:12]], 10))
    assert list(batch.generate([], 10)) == []
    assert len(list(batch.generate([IDS[:11]], 10))) == 10
    decoder = decoder_of(packed)
    with pytest.raises(IndexError, match=r"ids must be in \[0, 203\), got 203"):
        decoder.step([1, 203], [(0, 0), (1, 0)])
    for place in ((3, 0), (-1, 0), (0, LENGTH), (0, -1)):
        with pytest.raises(ValueError, match="a place must lie in the cache, got sequence"):
            decoder.step([1], [place])
    with pytest.raises(ValueError, match="a sequence must take one token, got 1 again"):
        decoder.step([1, 2], [(1, 0), (1, 1)])
    packed.model.layers[0].mlp.up_proj = torch.nn.Linear(72, 101)
    with pytest.raises(NotImplementedError, match="up_proj of layer 0 is a Linear"):
        BatchRunner(packed, LENGTH, 2)
