"""A step of AdamW on FP8 states with dynamic range expansion, as `lowbit.reference.adamw` states it.

Codes are read and written as bytes, so that GPUs without FP8 conversions run it too. The number of the step and the
learning rate are tensors: a captured graph replays them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .fp8_quantize import as_bits, as_float, decode, encode

GROUP = tl.constexpr(128)
TINY = tl.constexpr(2.0**-100)
TINY_BITS = tl.constexpr(27 << 23)
INFINITE_BITS = tl.constexpr(0x7F800000)
LEAST_DISTANCE = tl.constexpr(2.0**-20)
MAX_STEPS = tl.constexpr(16 * 256.0)  # of the exponent, each 1 / 16


@triton.jit
def read_state(
    codes,  # (P,) uint8
    terms,  # (3, groups) fp32, or (1, groups) without expansion
    at,  # of each value, (groups here, 128)
    valid,
    group,  # (groups here,)
    num_groups,
    MANTISSA: tl.constexpr,
    BIAS: tl.constexpr,
    MAX_CODE: tl.constexpr,
    EXPAND: tl.constexpr,
):
    """The values of groups, fp32."""
    here = group < num_groups
    code = tl.load(codes + at, mask=valid, other=0).to(tl.int32)
    z = decode(code & 0x7F, MANTISSA, BIAS, MAX_CODE)
    z *= tl.load(terms + group, mask=here, other=1.0)[:, None]
    if EXPAND:
        k = tl.load(terms + num_groups + group, mask=here, other=1.0)[:, None]
        center = tl.load(terms + 2 * num_groups + group, mask=here, other=1.0)[:, None]
        # A zero, or NaN in a group with NaN, stays what it is.
        z = tl.where(z > 0, tl.exp2(tl.log2(tl.where(z > 0, z, 1.0)) / k) * center, z)
    return tl.where((code & 0x80) != 0, -z, z)


@triton.jit
def write_state(
    values,  # (groups here, 128) fp32, zero beyond the state
    codes,
    terms,
    at,
    valid,
    group,
    num_groups,
    MAX: tl.constexpr,
    LOG2_MAX: tl.constexpr,
    MANTISSA: tl.constexpr,
    BIAS: tl.constexpr,
    MAX_CODE: tl.constexpr,
    EXPAND: tl.constexpr,
):
    """Stores codes and terms of groups."""
    here = group < num_groups
    bits = as_bits(values) & 0x7FFFFFFF
    magnitude = as_float(bits)
    most = tl.max(bits, 1)
    empty, finite = most < TINY_BITS, most < INFINITE_BITS
    used = finite & (most >= TINY_BITS)
    kept = (bits >= TINY_BITS) & used[:, None]
    mx = as_float(tl.where(used, most, 0x3F800000))
    if EXPAND:
        least = tl.min(tl.where(kept, bits, INFINITE_BITS), 1)
        mn = as_float(tl.where(used, least, 0x3F800000))
        distance = tl.maximum(tl.log2(mx) - tl.log2(mn), LEAST_DISTANCE)
        steps = tl.floor(tl.minimum(16 * (2 * LOG2_MAX - 1) / distance, MAX_STEPS))
        k = tl.where(used, steps / 16, 1.0)
        center = tl.where(used, tl.sqrt(mx) * tl.sqrt(mn), 1.0)
        log_scale = k * tl.log2(mx / center) - LOG2_MAX
        scale = tl.exp2(log_scale)
        ratio = tl.where(kept, magnitude / center[:, None], 1.0)
        y = tl.exp2(k[:, None] * tl.log2(ratio) - log_scale[:, None])
        tl.store(terms + num_groups + group, k, mask=here)
        tl.store(terms + 2 * num_groups + group, center, mask=here)
    else:
        scale = mx / MAX
        y = tl.where(kept, magnitude / scale[:, None], 0.0)
    scale = tl.where(finite, tl.where(empty, 1.0, scale), float("nan"))
    tl.store(terms + group, scale, mask=here)
    code = encode(tl.where(kept, y, 0.0), MANTISSA, BIAS, MAX_CODE, False)
    negative = (as_bits(values) < 0) & used[:, None]
    tl.store(codes + at, tl.where(negative, code | 0x80, code), mask=valid)


@triton.jit
def correction(step, log_beta):
    """1 - beta^step; in fp64, because fp32 would lose its digits at the first steps."""
    return (1.0 - tl.exp(step.to(tl.float64) * log_beta)).to(tl.float32)


@triton.jit
def fp8_adamw_kernel(
    param,  # (P,) fp32, bf16 or fp16, updated
    grad,  # (P,)
    exp_avg,  # (P,) uint8, updated
    exp_avg_terms,  # (3 or 1, groups) fp32, updated
    exp_avg_sq,
    exp_avg_sq_terms,
    step,  # () fp32, from 1 on
    lr,  # () fp32
    numel,
    num_groups,
    beta1,
    log_beta1,
    rest1,  # 1 - beta1, negative to maximize
    beta2,
    log_beta2,
    rest2,  # 1 - beta2
    eps,
    weight_decay,
    MAX: tl.constexpr,
    LOG2_MAX: tl.constexpr,
    MANTISSA: tl.constexpr,
    BIAS: tl.constexpr,
    MAX_CODE: tl.constexpr,
    SQ_MAX: tl.constexpr,
    SQ_LOG2_MAX: tl.constexpr,
    SQ_MANTISSA: tl.constexpr,
    SQ_BIAS: tl.constexpr,
    SQ_MAX_CODE: tl.constexpr,
    EXPAND: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """GROUPS groups of 128 values for each program."""
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    at = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    valid = at < numel
    t, rate = tl.load(step), tl.load(lr)
    g = tl.load(grad + at, mask=valid, other=0.0).to(tl.float32)
    p = tl.load(param + at, mask=valid, other=0.0).to(tl.float32)
    m = read_state(
        exp_avg, exp_avg_terms, at, valid, group, num_groups, MANTISSA, BIAS, MAX_CODE, EXPAND
    )
    v = read_state(
        exp_avg_sq, exp_avg_sq_terms, at, valid, group, num_groups,
        SQ_MANTISSA, SQ_BIAS, SQ_MAX_CODE, EXPAND,
    )  # fmt: skip
    m = beta1 * m + rest1 * g
    v = beta2 * v + rest2 * g * g
    denominator = tl.sqrt(v) / tl.sqrt(correction(t, log_beta2)) + eps
    p = p * (1 - rate * weight_decay)
    # Beyond the state 0 / eps, or 0 / 0 without eps, is not stored.
    p -= rate / correction(t, log_beta1) * (m / tl.where(valid, denominator, 1.0))
    tl.store(param + at, p.to(param.dtype.element_ty), mask=valid)
    write_state(
        m, exp_avg, exp_avg_terms, at, valid, group, num_groups,
        MAX, LOG2_MAX, MANTISSA, BIAS, MAX_CODE, EXPAND,
    )  # fmt: skip
    write_state(
        v, exp_avg_sq, exp_avg_sq_terms, at, valid, group, num_groups,
        SQ_MAX, SQ_LOG2_MAX, SQ_MANTISSA, SQ_BIAS, SQ_MAX_CODE, EXPAND,
    )  # fmt: skip
