"""Sampled tokens are those of transformers' generate for the same seed; how often each is drawn, by its definition."""

from __future__ import annotations

import math

import pytest
import torch

transformers = pytest.importorskip("transformers")

from test_architectures import IDS, one_thread  # noqa: E402, F401
from test_generic import gpt2  # noqa: E402
from tiny import LENGTH, tiny  # noqa: E402

from lowbit.decoder.runner import Runner  # noqa: E402
from lowbit.decoder.sampling import Sampler, Sampling  # noqa: E402

SETTINGS = {
    "temperature": {"temperature": 0.7},
    "top_k": {"temperature": 1.3, "top_k": 5},
    "top_p": {"temperature": 1.0, "top_p": 0.8},
    "min_p": {"temperature": 0.9, "min_p": 0.1},
    "penalty": {"temperature": 0.8, "repetition_penalty": 1.4},
    "all": {
        "temperature": 1.2, "top_k": 40, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.1
    },
    "greedy with a penalty": {"temperature": 0.0, "repetition_penalty": 1.5},
}  # fmt: skip


def generated(model, settings, seed):
    """By transformers."""
    torch.manual_seed(seed)
    kept = {k: v for k, v in settings.items() if v}
    draws = {"top_k": 0, **kept} if settings["temperature"] else kept
    prompt = IDS[None, :20]
    with torch.inference_mode():
        return model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=40,
            do_sample=bool(settings["temperature"]), **draws,
        )[0, 20:].tolist()  # fmt: skip


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_tokens_are_those_of_transformers(settings):
    packed, oracle = tiny("gemma3")
    runner = Runner(packed, LENGTH)
    found = []
    for seed in (0, 1):
        expected = generated(oracle, settings, seed)
        runner.reset()
        got = list(runner.generate(IDS[:20], 40, sampling=Sampling(**settings, seed=seed)))
        assert got == expected
        found.append(got)
    assert (found[0] == found[1]) == (settings["temperature"] == 0)
    runner.reset()
    assert list(runner.generate(IDS[:20], 40)) not in found


def test_other_decoders_sample():
    model = gpt2()
    settings = SETTINGS["all"]
    runner = Runner(model, LENGTH)
    got = list(runner.generate(IDS[:20], 40, sampling=Sampling(**settings, seed=3)))
    assert got == generated(model, settings, 3)


LOGITS = torch.tensor([1.0, -0.5, 2.0, 0.0, 1.9, -3.0])


def softmax(logits):
    total = sum(math.exp(x) for x in logits)
    return [math.exp(x) / total for x in logits]


def kept(probabilities, keep):
    total = sum(p for i, p in enumerate(probabilities) if i in keep)
    return [p / total if i in keep else 0.0 for i, p in enumerate(probabilities)]


PLAIN = softmax(LOGITS.tolist())
DISTRIBUTIONS = {
    "temperature": ({"temperature": 2.0}, softmax((LOGITS / 2).tolist())),
    "top_k": ({"temperature": 1.0, "top_k": 2}, kept(PLAIN, {2, 4})),
    # 0.38 + 0.35 < 0.8 <= 0.38 + 0.35 + 0.14
    "top_p": ({"temperature": 1.0, "top_p": 0.8}, kept(PLAIN, {0, 2, 4})),
    "min_p": ({"temperature": 1.0, "min_p": 0.3}, kept(PLAIN, {0, 2, 4})),
    "penalty": (
        {"temperature": 1.0, "repetition_penalty": 2.0},
        softmax([1.0, -1.0, 1.0, 0.0, 1.9, -3.0]),
    ),
}


@pytest.mark.parametrize(("settings", "expected"), DISTRIBUTIONS.values(), ids=DISTRIBUTIONS)
def test_frequencies(settings, expected):
    sampler = Sampler(Sampling(**settings, seed=0))
    draws, seen = 4000, torch.tensor([1, 2])
    counts = torch.bincount(
        torch.tensor([sampler(LOGITS, seen) for _ in range(draws)]), minlength=len(LOGITS)
    ).tolist()
    for count, p in zip(counts, expected, strict=True):
        assert abs(count - draws * p) <= 5 * math.sqrt(draws * p * (1 - p))


def test_seeds():
    def draws(seed):
        sampler = Sampler(Sampling(temperature=5.0, seed=seed))
        return [sampler(LOGITS, torch.tensor([0])) for _ in range(50)]

    assert draws(7) == draws(7) != draws(8)
    assert draws(None) != draws(None)


def test_logits_stay_as_they_are():
    logits = LOGITS.clone()
    Sampler(Sampling(**SETTINGS["all"], seed=0))(logits, torch.tensor([0, 2]))
    assert torch.equal(logits, LOGITS)


def test_nan_is_no_token():
    logits = LOGITS.clone()
    logits[3] = math.nan
    with pytest.raises(ValueError, match="the logits are NaN"):
        Sampler(Sampling(temperature=1.0, top_k=1))(logits, torch.tensor([0]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": -0.1}, r"temperature must be in \[0, inf\), got -0.1"),
        ({"temperature": math.nan}, r"temperature must be in \[0, inf\), got nan"),
        ({"temperature": math.inf}, r"temperature must be in \[0, inf\), got inf"),
        ({"top_k": -1}, r"top_k must be in \[0, inf\), got -1"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0.0"),
        ({"top_p": 1.1}, r"top_p must be in \(0, 1\], got 1.1"),
        ({"min_p": 2.0}, r"min_p must be in \[0, 1\], got 2.0"),
        ({"repetition_penalty": 0.0}, r"repetition_penalty must be in \(0, inf\), got 0.0"),
    ],
)
def test_bad_settings(arguments, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**arguments)
