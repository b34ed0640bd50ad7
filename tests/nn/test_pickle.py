"""Round trips of weights and optimizers through pickle, torch.save and deepcopy, bit for bit."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowbit
from lowbit.formats import Format, parse
from lowbit.optim import FP8AdamW
from weights import random_weight


def through_torch(value: Any, weights_only: bool) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


TRIPS: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda value: pickle.loads(pickle.dumps(value)),
    "torch.save": lambda value: through_torch(value, False),
    "weights_only": lambda value: through_torch(value, True),
}
FORMATS = [
    *lowbit.formats().values(),
    *map(parse, ("int3_g64_o4", "int8_row_a8", "nf4_g64_dq8")),
    Format.lut(bits=2, table=(-1.5, -0.25, 0.1, 3.0), group=32),
]


def same_bits(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(*(t.contiguous().flatten().view(torch.uint8) for t in (a, b)))


@pytest.mark.parametrize("trip", TRIPS)
@pytest.mark.parametrize("format", FORMATS, ids=lambda f: f.name)
def test_quant_tensors(format: Format, trip: str) -> None:
    weight = random_weight(format, 33, 128)
    made = TRIPS[trip]({"w": weight, "x": [weight]})
    assert made["w"] is made["x"][0]
    assert made["w"].format == format
    assert made["w"].shape == (33, 128)
    assert list(made["w"].tensors) == list(weight.tensors)
    assert all(same_bits(t, made["w"].tensors[name]) for name, t in weight.tensors.items())


def test_a_fresh_process_reads_weights_only(tmp_path: Path) -> None:
    weight = random_weight(parse("nvfp4"), 33, 128)
    torch.save({"w": weight}, tmp_path / "w.pt")
    code = (
        "import sys, torch, lowbit; w = torch.load(sys.argv[1], weights_only=True)['w']; print(w)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "w.pt")], capture_output=True, text=True
    )
    assert done.stdout == f"{weight!r}\n", done.stderr


def trained(dtype: torch.dtype, **options: Any) -> tuple[list[nn.Parameter], FP8AdamW]:
    """Two groups with other dtypes of their states; the last parameter has no state yet."""
    params = [nn.Parameter(torch.randn(5, 50).to(dtype)) for _ in range(3)]
    groups = [{"params": params[:1], **options}, {"params": params[1:], "lr": 0.1}]
    optimizer = FP8AdamW(groups, exp_avg_sq_dtype=torch.float8_e5m2)
    for p in params[:2]:
        p.grad = torch.randn_like(p)
    optimizer.step()
    return params, optimizer


def assert_same_steps(a: tuple[list[nn.Parameter], FP8AdamW], b: FP8AdamW) -> None:
    params, optimizer = a
    others = [p for group in b.param_groups for p in group["params"]]
    for p, other in zip(params, others, strict=True):
        assert p is not other
        assert same_bits(p.detach(), other.detach())
        state, copied = optimizer.state.get(p, {}), b.state.get(other, {})
        assert list(state) == list(copied)
        assert all(same_bits(t, copied[name]) for name, t in state.items())
        p.grad = torch.randn_like(p)
        other.grad = p.grad.clone()
    optimizer.step()
    b.step()
    assert all(same_bits(p.detach(), o.detach()) for p, o in zip(params, others, strict=True))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("expand", (True, False))
@pytest.mark.parametrize("trip", ("deepcopy", "pickle", "torch.save"))
def test_optimizers(trip: str, expand: bool, dtype: torch.dtype) -> None:
    made = trained(dtype, expand=expand, exp_avg_dtype=torch.float8_e5m2)
    before = {n: t.dtype for n, t in made[1].state[made[0][0]].items()}
    copied = TRIPS[trip](made[1])
    assert {n: t.dtype for n, t in made[1].state[made[0][0]].items()} == before
    assert_same_steps(made, copied)


@pytest.mark.parametrize("trip", ("deepcopy", "torch.save", "weights_only"))
def test_state_dicts_of_optimizers(trip: str) -> None:
    params, optimizer = made = trained(torch.bfloat16)
    others = [nn.Parameter(p.detach().clone()) for p in params]
    groups = [{"params": others[:1]}, {"params": others[1:]}]
    other = FP8AdamW(groups, exp_avg_sq_dtype=torch.float8_e5m2)
    other.load_state_dict(TRIPS[trip](optimizer.state_dict()))
    assert_same_steps(made, other)


def test_a_model_and_its_optimizer_stay_together() -> None:
    model = nn.Linear(8, 8)
    optimizer = FP8AdamW(model.parameters())
    model(torch.randn(2, 8)).sum().backward()
    optimizer.step()
    model, optimizer = pickle.loads(pickle.dumps((model, optimizer)))
    assert optimizer.param_groups[0]["params"][0] is model.weight
    assert optimizer.state[model.weight]["exp_avg"].dtype == torch.float8_e4m3fn
