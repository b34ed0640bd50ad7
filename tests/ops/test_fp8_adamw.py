"""FP8 states of AdamW and its step on every instruction set and in Triton."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor

from lowbit import _C
from lowbit.backends.cpu import adamw as cpu
from lowbit.backends.triton import adamw as triton
from lowbit.ops import adamw as ops
from lowbit.reference import adamw as reference
from lowbit.reference.adamw import State, Step

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
DTYPES = (E4M3, E5M2)
NUMPY = {E4M3: ml_dtypes.float8_e4m3fn, E5M2: ml_dtypes.float8_e5m2}
FP8_MAX = {E4M3: 448.0, E5M2: 57344.0}
RUNNERS = [isa for isa in ("scalar", "avx2", "avx512") if isa in _C.isa_detected()] + ["triton"]
SIZES = (1, 128, 130, 300)


def spread(size: int, seed: int = 0, width: float = 4.0) -> Tensor:
    """Values of both signs whose magnitudes span several powers of ten, with some zeros."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(size, generator=g) * (width * torch.randn(size, generator=g)).exp() * 1e-4
    return torch.where(torch.rand(size, generator=g) < 0.02, 0.0, x)


def run(name: str, param: Tensor, grad: Tensor, m: State, v: State, step: Step) -> None:
    if name == "triton":
        pytest.importorskip("triton")
        triton.adamw_(param, grad, m, v, step)
    else:
        cpu.adamw_(param, grad, m, v, step, name)


def step_of(count: float = 1.0, maximize: bool = False, **changes: float) -> Step:
    lr = changes.pop("lr", 1e-3)
    numbers = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01} | changes
    return Step(torch.tensor(count), torch.tensor(lr), **numbers, maximize=maximize)


# The states


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_expansion_by_hand(dtype: torch.dtype) -> None:
    """Formulas in plain Python, the cast by ml_dtypes."""
    x, top = spread(128).double(), FP8_MAX[dtype]
    codes, terms = reference.quantize(x, dtype, expand=True)
    nonzero = [abs(a) for a in x.tolist() if a]
    mx, mn = max(nonzero), min(nonzero)
    k = math.floor(math.log2(top * top / 2) / math.log2(mx / mn) * 16) / 16
    c = math.sqrt(mx) * math.sqrt(mn)
    s = (mx / c) ** k / top
    z = [math.copysign((abs(a) / c) ** k / s, a) if a else 0.0 for a in x.tolist()]
    expected = np.array(z, dtype=np.float32).astype(NUMPY[dtype]).view(np.uint8)
    assert codes.view(torch.uint8).numpy().tolist() == expected.tolist()
    torch.testing.assert_close(terms, torch.tensor([[s], [k], [c]]))
    # Both ends of the group lie near the ends of FP8, and nothing but zero is zero.
    values = codes.double().abs()
    assert values.max() == top
    assert bool(((values == 0) == (x == 0)).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_plain_scales_are_absmax(dtype: torch.dtype) -> None:
    x = spread(256, width=1.0)
    codes, terms = reference.quantize(x, dtype, expand=False)
    scales = x.view(2, 128).abs().amax(1) / torch.full((2,), FP8_MAX[dtype])
    assert torch.equal(terms, scales[None])
    expected = (x.view(2, 128) / scales[:, None]).to(dtype).view(-1)
    assert torch.equal(codes.view(torch.uint8), expected.view(torch.uint8))
    assert torch.equal(
        reference.dequantize(codes, terms),
        (expected.float().view(2, 128) * scales[:, None]).view(-1),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_expansion_rounds_within_its_step(dtype: torch.dtype) -> None:
    """A power of k makes a relative step of 2^-mantissa k times smaller, and k below 1 makes it larger."""
    half = 2.0 ** -(4 if dtype == E4M3 else 3)
    for width in (0.01, 0.5, 3.0, 8.0):
        x = spread(1280, width=width).double()
        codes, terms = reference.quantize(x, dtype, expand=True)
        back = reference.dequantize(codes, terms, torch.float64)
        z = codes.double().abs().view(-1, 128)
        normal = z >= torch.finfo(dtype).smallest_normal
        error = (back / x).log2().abs().nan_to_num(0.0).view(-1, 128)
        # log2 of a ratio of at most 1 / (1 - half), over k; terms are rounded to fp32.
        bound = -math.log2(1 - half) / terms[1].double()[:, None] + 1e-5
        assert bool((error <= bound)[normal].all()), width


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, which interprets Triton
@pytest.mark.parametrize("name", RUNNERS)
@pytest.mark.parametrize("expand", (True, False))
def test_special_groups(name: str, expand: bool) -> None:
    """Zero gradients, one magnitude, values that count as zero, NaN and infinity; a tail group of two."""
    groups = torch.zeros(5, 128)
    groups[1] = 3.0 * (-1.0) ** torch.arange(128)
    groups[2] = 1e-20
    groups[2, :3] = torch.tensor([1e-33, 0.0, 1.0])
    groups[3] = 1.0
    groups[3, 5] = math.nan
    groups[4, 7] = math.inf
    grad = torch.cat((groups.flatten(), torch.tensor([0.0, -2.0])))
    param = torch.ones_like(grad)
    m, v = states(grad, E4M3, E4M3, expand)
    # beta 0: the first moment is the gradient.
    run(name, param, grad, m, v, step_of(beta1=0.0, weight_decay=0.0, lr=0.5))
    back = reference.dequantize(*m)
    assert torch.equal(param[:128], torch.ones(128))
    assert not m.codes[:128].view(torch.uint8).any()
    assert torch.equal(m.terms[:, 0], torch.ones(len(m.terms)))
    torch.testing.assert_close(back[128:256], groups[1], rtol=2e-5, atol=0)
    torch.testing.assert_close(param[128:256], 1 - 0.5 * groups[1].sign(), rtol=1e-6, atol=1e-6)
    if expand:
        assert m.terms[1, 1] == reference.MAX_EXPONENT
        assert back[256] == back[257] == 0
        torch.testing.assert_close(back[259:384], groups[2, 3:], rtol=0.45, atol=0)
    assert back[258] == pytest.approx(1.0, rel=1e-4)
    assert bool(back[384:640].isnan().all())
    assert bool(m.terms[0, 3:5].isnan().all())
    assert back[640] == 0
    assert back[641] == pytest.approx(-2.0, rel=1e-4)


def states(
    like: Tensor, exp_avg: torch.dtype, exp_avg_sq: torch.dtype, expand: bool
) -> tuple[State, State]:
    """New states."""
    shape = (reference.num_terms(expand), reference.num_groups(like.numel()))
    return tuple(
        State(torch.zeros(like.shape, dtype=dtype), torch.ones(shape))
        for dtype in (exp_avg, exp_avg_sq)
    )  # type: ignore[return-value]


# The step


@pytest.mark.parametrize("name", RUNNERS)
@pytest.mark.parametrize("expand", (True, False), ids=("expand", "plain"))
@pytest.mark.parametrize(
    "types", [*itertools.product(DTYPES, DTYPES)], ids=lambda t: f"{t[0]}-{t[1]}"
)
def test_step_against_float64(
    name: str, expand: bool, types: tuple[torch.dtype, torch.dtype]
) -> None:
    """Three steps, each from the states that the one before left."""
    for size in SIZES:
        param = spread(size, 9, 1.0) * 1e4
        m, v = states(param, *types, expand)
        for count in (1, 2, 3):
            step, grad = step_of(count), spread(size, count)
            check_step(name, param, grad, m, v, step)


def check_step(name: str, param: Tensor, grad: Tensor, m: State, v: State, step: Step) -> None:
    """Runs a step and compares it with float64 on the same states."""
    old_m, old_v = (reference.dequantize(*s, torch.float64) for s in (m, v))
    g, old = grad.double(), param.double()
    exact_m = step.beta1 * old_m + (1 - step.beta1) * g
    exact_v = step.beta2 * old_v + (1 - step.beta2) * g * g
    count, lr = step.number.item(), step.lr.item()
    rate = lr / (1 - step.beta1**count)
    denominator = exact_v.sqrt() / math.sqrt(1 - step.beta2**count) + step.eps
    exact = old * (1 - lr * step.weight_decay) - rate * exact_m / denominator
    run(name, param, grad, m, v, step)
    # 3 roundings of p, and states that are dequantized within 2^-16 (|log2 of a value over the center| below 40).
    terms = step.beta1 * old_m.abs() + (1 - step.beta1) * g.abs()
    bound = 3 * 2.0**-24 * old.abs() + 2.0**-15 * rate * terms / denominator
    error = (param.double() - exact).abs()
    assert bool((error <= bound).all()), (error - bound).max()
    for values, spare, state in ((exact_m, 2.0**-15 * terms, m), (exact_v, 2.0**-15 * exact_v, v)):
        check_state(values, spare, state)


def check_state(values: Tensor, spare: Tensor, state: State) -> None:
    """Terms and codes are those of fp64 values, each known within `spare`."""
    dtype = state.codes.dtype
    top, info = FP8_MAX[dtype], torch.finfo(dtype)
    for i, group in enumerate(values.split(128)):
        here = slice(128 * i, 128 * i + len(group))
        z = state.codes[here].double().abs()
        magnitude = group.abs()
        if not magnitude.any():
            assert not z.any()
            continue
        scale, *rest = state.terms[:, i].double().tolist()
        k, c = rest or (1.0, 1.0)
        low, high = magnitude[magnitude > 0].min().item(), magnitude.max().item()
        if rest:
            # Cancellation makes the smallest value uncertain; the largest hardly is.
            least = spare[here][magnitude == low].max().item() / low
            exact_k = min(math.log2(top * top / 2) / max(math.log2(high / low), 2.0**-20), 256.0)
            slack = exact_k * (least * 2 / math.log2(high / low) + 2e-4) if high > low else 0
            assert exact_k - 1 / 16 - slack <= k <= exact_k + slack
            assert k * 16 == int(k * 16)
            assert c == pytest.approx(math.sqrt(high * low), rel=least + 1e-4)
        assert scale * top == pytest.approx((high / c) ** k, rel=1e-4 * max(k, 1))
        exact = (magnitude / c) ** k / scale
        step = 2.0 ** (exact.clamp_min(info.smallest_normal).log2().floor()) * info.eps
        uncertain = ((magnitude + spare[here]) / c) ** k / scale - exact
        # To nearest; in doubt where the value is uncertain, or near the top of its binade.
        allowed = step * (0.5 + 1e-3) + 1.1 * uncertain + 1e-3 * exact
        error = (z - exact).abs()
        assert bool((error <= allowed).all()), (error / step).max()
        signs = state.codes[here].double().sign() * group.sign()
        assert bool((signs >= 0)[magnitude > 2 * spare[here]].all())


@pytest.mark.parametrize("expand", (True, False), ids=("expand", "plain"))
@pytest.mark.parametrize("maximize", (False, True), ids=("minimize", "maximize"))
def test_the_reference_is_torch(expand: bool, maximize: bool) -> None:
    """Three steps of torch's AdamW in float64, each from the states that the one before left."""
    theirs = torch.nn.Parameter(spread(300, 9, 1.0).double() * 1e4)
    ours = theirs.detach().clone()
    m, v = states(ours, E4M3, E5M2, expand)
    # eps is about as large as the root of v, and weight decay halves the parameters.
    numbers = {"eps": 0.1, "weight_decay": 20.0, "maximize": maximize}
    optimizer = torch.optim.AdamW([theirs], lr=0.01, betas=(0.8, 0.95), **numbers)
    for count in (1, 2, 3):
        theirs.grad = spread(300, count).double() * 1e3
        before = [reference.dequantize(*state, torch.float64) for state in (m, v)]
        optimizer.state[theirs] = {
            "step": torch.tensor(count - 1.0), "exp_avg": before[0], "exp_avg_sq": before[1],
        }  # fmt: skip
        optimizer.step()
        reference.adamw_(
            ours, theirs.grad, *m, *v, count, 0.01, 0.8, 0.95, **numbers, dtype=torch.float64
        )
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-12, atol=1e-15)
        for name, state in (("exp_avg", m), ("exp_avg_sq", v)):
            codes, terms = reference.quantize(
                optimizer.state[theirs][name], state.codes.dtype, expand
            )
            assert torch.equal(state.codes.view(torch.uint8), codes.view(torch.uint8))
            torch.testing.assert_close(state.terms, terms)


@pytest.mark.parametrize("name", RUNNERS)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_half_parameters(name: str, dtype: torch.dtype) -> None:
    """fp32 inside, one rounding of the parameter."""
    param = (spread(300, 9, 0.5) * 1e4).to(dtype)
    grad = (spread(300, 1, 0.5) * 100).to(dtype)
    wide = param.float()
    halves, wholes = states(param, E4M3, E4M3, True), states(param, E4M3, E4M3, True)
    run(name, param, grad, *halves, step_of(lr=0.1))
    run(name, wide, grad.float(), *wholes, step_of(lr=0.1))
    assert torch.equal(param, wide.to(dtype))
    for a, b in zip(halves, wholes, strict=True):
        assert torch.equal(a.terms, b.terms)
        assert torch.equal(a.codes.view(torch.uint8), b.codes.view(torch.uint8))


def test_threads_do_not_matter() -> None:
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        param, grad = spread(100_000, 9), spread(100_000, 1)
        state = states(param, E4M3, E5M2, True)
        run("avx512" if "avx512" in RUNNERS else "scalar", param, grad, *state, step_of())
        results.append((param, state[0].codes.float(), state[1].codes.float(), state[0].terms))
    torch.set_num_threads(2)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("name", RUNNERS)
def test_maximize_and_numbers(name: str) -> None:
    """The negated gradient, other betas and a late step."""
    param, grad = spread(300, 9, 1.0), spread(300, 1)
    other = param.clone()
    step = step_of(40.0, beta1=0.0, beta2=0.95, eps=1e-3, weight_decay=0.3, lr=0.1)
    run(name, param, grad, *states(grad, E4M3, E4M3, True), step._replace(maximize=True))
    run(name, other, -grad, *states(grad, E4M3, E4M3, True), step)
    assert torch.equal(param, other)
    check_step(name, param, grad, *states(grad, E4M3, E4M3, True), step)


# The op


def test_op() -> None:
    """The fake through torch's own checker (its check of mutation cannot compare FP8)."""
    m, v = states(torch.zeros(130), E4M3, E5M2, True)
    args = (torch.randn(130), torch.randn(130), *m, *v, torch.tensor(1.0), torch.tensor(0.1))
    numbers = (0.9, 0.999, 1e-8, 0.01, False)
    torch.library.opcheck(ops.fp8_adamw, (*args, *numbers), test_utils="test_faketensor")


def test_vmap_does_not_repeat_a_step() -> None:
    """Arguments that are not batched would be stepped for every element."""
    m, v = states(torch.zeros(130), E4M3, E5M2, True)
    rest = (*m, *v, torch.tensor(1.0), torch.tensor(0.1), 0.9, 0.999, 1e-8, 0.01, False)
    param, grads = torch.zeros(130), torch.ones(2, 130)
    with pytest.raises(RuntimeError, match="fp8_adamw works in place, and vmap cannot repeat it"):
        torch.func.vmap(lambda grad: ops.fp8_adamw(param, grad, *rest))(grads)
    assert not param.any()


def test_bad_operands_of_the_op() -> None:
    m, v = states(torch.zeros(130), E4M3, E4M3, True)
    good = [torch.zeros(130), torch.zeros(130), *m, *v, torch.tensor(1.0), torch.tensor(0.1)]
    numbers = (0.9, 0.999, 1e-8, 0.01, False)
    for place, value, error, match in (
        (0, torch.zeros(130, dtype=torch.int32), TypeError, "param must be float32"),
        (1, torch.zeros(130).half(), TypeError, "grad must have the dtype of param"),
        (1, torch.zeros(131), ValueError, r"grad must be torch.float32 of shape \(130,\)"),
        (2, torch.zeros(130), TypeError, "exp_avg must be float8_e4m3fn or float8_e5m2"),
        (3, torch.ones(3, 1), ValueError, r"exp_avg_terms must be torch.float32 of shape \(3, 2\)"),
        (
            5,
            torch.ones(1, 2),
            ValueError,
            r"exp_avg_sq_terms must be torch.float32 of shape \(3, 2\)",
        ),
        (5, torch.ones(2, 3).t(), ValueError, "exp_avg_sq_terms must be contiguous"),
        (6, torch.tensor(1), ValueError, "step must be torch.float32"),
        (7, torch.ones(1), ValueError, r"lr must be torch.float32 of shape \(\)"),
    ):
        args = [*good[:place], value, *good[place + 1 :]]
        with pytest.raises(error, match=match):
            ops.fp8_adamw(*args, *numbers)


# Machine code for GPUs that are not here, from a process without the interpreter.
_WORKER = """
import json, sys, torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.disasm import get_sass
from lowbit import triton_kernels as package
from lowbit.backends.triton.adamw import meaning

for arch in json.loads(sys.argv[1]):
    kernel = package.fp8_adamw.fp8_adamw_kernel
    constants = meaning(torch.float8_e4m3fn, torch.float8_e5m2, True)
    pointers = {"param": "fp32", "grad": "fp32", "exp_avg": "u8", "exp_avg_sq": "u8", "exp_avg_terms": "fp32",
                "exp_avg_sq_terms": "fp32", "step": "fp32", "lr": "fp32"}
    signature = {
        key: "*" + pointers[key] if key in pointers else "constexpr" if key in constants
        else "i32" if key in ("numel", "num_groups") else "fp32"
        for key in kernel.arg_names}
    attrs = {(i,): [["tt.divisibility", 16]] for i, key in enumerate(kernel.arg_names)
             if key in pointers or key == "numel"}
    made = triton.compile(ASTSource(kernel, signature, constants, attrs), target=GPUTarget("cuda", arch, 32),
                          options={"num_warps": 4, "enable_fp_fusion": False})
    print(json.dumps(get_sass(made.asm["cubin"])), flush=True)
"""


def test_machine_code() -> None:
    """Compiles with and without FP8 instructions of the GPU; vectors of 16 bytes, no spills."""
    pytest.importorskip("triton")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", _WORKER, json.dumps([80, 90])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for sass in map(json.loads, done.stdout.splitlines()):
        assert "LDG.E.128" in sass
        assert not re.findall(r"\b(?:STL|LDL)\b", sass)
