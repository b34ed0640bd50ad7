"""FP8AdamW in the place of torch.optim.AdamW: steps, groups of parameters, state dicts and bad input."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch
from torch import Tensor

from lowbit import optim

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def parameters(seed: int = 0) -> list[torch.nn.Parameter]:
    g = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(s, generator=g)) for s in ((20, 13), (7,), (3, 5, 64))]


def descend(
    optimizer: torch.optim.Optimizer, params: list[torch.nn.Parameter], steps: int, seed: int = 5
) -> None:
    """Steps on a bumpy function of the parameters."""
    g = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        noise = [torch.randn(p.shape, generator=g) for p in params]
        sum(
            (((p - 0.5) ** 2 * (1 + e.abs())).sum() for p, e in zip(params, noise, strict=True))
        ).backward()
        optimizer.step()


def test_first_step_is_that_of_torch() -> None:
    """States start at zero, so the first step rounds nothing."""
    ours, theirs = parameters(), parameters()
    options = {"lr": 0.01, "betas": (0.8, 0.99), "eps": 1e-6, "weight_decay": 0.1}
    descend(optim.FP8AdamW(ours, **options), ours, 1)
    descend(torch.optim.AdamW(theirs, **options), theirs, 1)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_follows_torch() -> None:
    """Hundreds of steps end where AdamW ends, within a tenth of the way."""
    start, ours, theirs = parameters(), parameters(), parameters()
    descend(optim.FP8AdamW(ours, lr=0.01), ours, 150)
    descend(torch.optim.AdamW(theirs, lr=0.01), theirs, 150)
    for a, b, s in zip(ours, theirs, start, strict=True):
        assert (a - b).norm() < 0.1 * (s - b).norm()


def test_groups_of_parameters() -> None:
    """Each group has its own numbers and dtypes; parameters without a gradient are left alone."""
    a, b, c = parameters()
    optimizer = optim.FP8AdamW(
        [{"params": [a], "lr": 0.0}, {"params": [b, c], "exp_avg_sq_dtype": E5M2, "expand": False}],
        lr=0.1, weight_decay=0.0,
    )  # fmt: skip
    before = [p.detach().clone() for p in (a, b, c)]
    a.grad, b.grad = torch.ones_like(a), torch.ones_like(b)
    optimizer.step()
    assert torch.equal(a, before[0])
    torch.testing.assert_close(b.detach(), before[1] - 0.1)
    assert torch.equal(c, before[2])
    assert c not in optimizer.state
    assert optimizer.state[a]["exp_avg_terms"].shape == (3, 3)
    assert optimizer.state[b]["exp_avg_terms"].shape == (1, 1)
    assert optimizer.state[b]["exp_avg_sq"].dtype == E5M2
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(2))], "betas": (0.5, 0.5)})
    assert optimizer.param_groups[2]["expand"] is True


@pytest.mark.parametrize(("expand", "expected"), ((True, 2.1875), (False, 2.0625)))
def test_bytes_of_state(expand: bool, expected: float) -> None:
    param = torch.nn.Parameter(torch.zeros(256, 512))
    param.grad = torch.ones_like(param)
    optimizer = optim.FP8AdamW([param], expand=expand)
    optimizer.step()
    tensors = [t for name, t in optimizer.state[param].items() if name != "step"]
    assert sum(t.nbytes for t in tensors) == expected * param.numel()


@pytest.mark.parametrize("expand", (True, False))
def test_state_dict_round_trip(expand: bool) -> None:
    """Through a file, into an optimizer that has run on its own: the next steps are bit for bit the same."""
    params = parameters()
    optimizer = optim.FP8AdamW(params, lr=0.01, exp_avg_sq_dtype=E5M2, expand=expand)
    descend(optimizer, params, 3)
    file = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict(), "params": params}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    others = loaded["params"]
    other = optim.FP8AdamW(others, lr=1.0, exp_avg_sq_dtype=E5M2, expand=expand)
    keep = [p.detach().clone() for p in others]
    descend(other, others, 1)
    with torch.no_grad():
        for p, value in zip(others, keep, strict=True):
            p.copy_(value)
    other.load_state_dict(loaded["optimizer"])
    assert other.state[others[0]]["exp_avg"].dtype == E4M3
    assert other.param_groups[0]["lr"] == 0.01
    twin = copy.deepcopy(other)
    for a, b in ((optimizer, params), (other, others)):
        descend(a, b, 3, seed=6)
    for p, q in zip(params, others, strict=True):
        assert torch.equal(p, q)
    # Loading copies: the saved states are as they were.
    assert loaded["optimizer"]["state"][0]["step"] == 3
    assert twin.state_dict()["state"][0]["exp_avg"].dtype == E4M3


def test_learning_rate_in_a_tensor() -> None:
    """What a captured graph replays: the rate and the count are read when the step runs."""
    (a, *_), (b, *_) = parameters(), parameters()
    rate = torch.tensor(0.5)
    one, other = optim.FP8AdamW([a], lr=rate), optim.FP8AdamW([b], lr=0.5)
    for value in (0.5, 0.01):
        rate.fill_(value)
        other.param_groups[0]["lr"] = value
        for p in (a, b):
            p.grad = torch.ones_like(p)
        one.step()
        other.step()
        assert torch.equal(a, b)
    assert one.state[a]["step"] == 2


def test_unusual_parameters() -> None:
    """Not contiguous, empty, and of dimension 0; autograd notices the write; a closure runs with gradients."""
    base = torch.randn(6, 40)
    strided = torch.nn.Parameter(base.clone().t())
    dense = torch.nn.Parameter(base.t().contiguous())
    empty, scalar = torch.nn.Parameter(torch.zeros(0, 3)), torch.nn.Parameter(torch.ones(()))
    optimizer = optim.FP8AdamW([strided, dense, empty, scalar], lr=0.1)
    version = strided._version

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = sum((p**2).sum() for p in (strided, dense, empty, scalar))
        loss.backward()
        return loss

    first, second = optimizer.step(closure), optimizer.step(closure)
    assert second < first
    assert torch.equal(strided, dense)
    assert strided._version > version
    saved = scalar * scalar
    optimizer.step(closure)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.backward()


BAD_OPTIONS = (
    ({"lr": -1.0}, ValueError, "lr must not be negative, got -1.0"),
    ({"lr": math.nan}, ValueError, "lr must not be negative, got nan"),
    ({"lr": torch.ones(2)}, ValueError, "lr must have one element"),
    ({"betas": (1.0, 0.9)}, ValueError, r"betas\[0\] must be at least 0 and below 1.0, got 1.0"),
    ({"betas": (0.9, -0.1)}, ValueError, r"betas\[1\] must be at least 0"),
    ({"eps": -1e-8}, ValueError, "eps must be at least 0"),
    ({"weight_decay": math.inf}, ValueError, "weight_decay must be at least 0 and below inf, got inf"),
    ({"exp_avg_dtype": torch.float32}, TypeError, "exp_avg_dtype must be float8_e4m3fn or float8_e5m2"),
    ({"exp_avg_sq_dtype": torch.int8}, TypeError, "exp_avg_sq_dtype must be"),
)  # fmt: skip


@pytest.mark.parametrize(("options", "error", "match"), BAD_OPTIONS)
def test_bad_options(options: dict, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        optim.FP8AdamW(parameters(), **options)


def test_bad_parameters_and_states() -> None:
    with pytest.raises(
        TypeError, match="params must be float32, bfloat16 or float16, got torch.float64"
    ):
        optim.FP8AdamW([torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))])
    (param, *_) = parameters()
    optimizer = optim.FP8AdamW([param])
    param.grad = torch.ones_like(param).to_sparse()
    with pytest.raises(NotImplementedError, match="gradients must be dense, got one of layout"):
        optimizer.step()
    param.grad = torch.ones_like(param)
    optimizer.step()
    saved = optimizer.state_dict()
    bad = {**saved, "param_groups": [{**saved["param_groups"][0], "exp_avg_sq_dtype": E5M2}]}
    with pytest.raises(ValueError, match="exp_avg_sq must be torch.float8_e5m2"):
        optim.FP8AdamW([param]).load_state_dict(bad)
    with pytest.raises(ValueError, match=r"exp_avg must be torch.float8_e4m3fn of shape \(2, 2\)"):
        optim.FP8AdamW([torch.nn.Parameter(torch.zeros(2, 2))]).load_state_dict(saved)
    with pytest.raises(
        ValueError, match=r"its groups lack \['exp_avg_dtype', 'exp_avg_sq_dtype', 'expand'\]"
    ):
        optim.FP8AdamW([param]).load_state_dict(torch.optim.AdamW([param]).state_dict())
