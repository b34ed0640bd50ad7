"""compressed-tensors (llm-compressor): packed and plain integers, FP8, MXFP8, NVFP4 and MXFP4.

W = (code - zero) * scale with scales per tensor, channel, group or block. Activations are taken as they are: what the
configuration says of them, and their scales, are not used.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lowbit.codebooks.tables import E2M1_TABLE, float8_values
from lowbit.files import shown
from lowbit.formats import FORMATS, Format
from lowbit.io.readers.codes import (
    FLOATS,
    Spec,
    affine,
    check,
    float8,
    integer,
    need,
    of_rows,
    pack,
    stream_codes,
)
from lowbit.io.readers.folder import FolderReader, Plan, ordered
from lowbit.weights.quantized import QuantTensor

_FORMATS = (
    "pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "nvfp4-pack-quantized",
    "mxfp4-pack-quantized", "mxfp8-quantized", "mixed-precision",
)  # fmt: skip
_STRATEGIES = ("tensor", "channel", "group", "block", "tensor_group", "token")
_E8M0 = getattr(torch, "float8_e8m0fnu", torch.uint8)


class CompressedTensorsReader(FolderReader):
    """An open folder of compressed-tensors."""

    name = "compressed-tensors"
    methods = frozenset({"compressed-tensors"})
    parts = (
        "weight_packed", "weight", "weight_scale", "weight_zero_point", "weight_shape", "weight_global_scale",
        "weight_g_idx", "input_scale", "input_zero_point", "input_global_scale", "output_scale", "output_zero_point",
    )  # fmt: skip
    markers = ("weight_packed", "weight_scale")

    def _check_config(self) -> None:
        groups = self.config.get("config_groups")
        if not isinstance(groups, dict) or not all(
            isinstance(g, dict) and isinstance(g.get("targets"), list) for g in groups.values()
        ):
            raise ValueError(
                f"{self.path}: config_groups must map names to groups with targets, got {shown(groups)}"
            )
        for format in (self.config.get("format"), *(g.get("format") for g in groups.values())):
            if format is not None and format not in _FORMATS:
                raise ValueError(
                    f"{self.path}: format must be one of {_FORMATS}, got {shown(format)}"
                )
        sparse = (self.config.get("sparsity_config") or {}).get("format", "dense")
        if sparse != "dense":
            raise ValueError(
                f"{self.path}: format of sparsity_config must be 'dense', got {shown(sparse)}"
            )

    def _scheme(self, layer: str) -> dict[str, Any]:
        """The settings of a layer's weight: by its name, by a pattern, or by a class, which names are taken for."""
        groups = self.config["config_groups"].values()
        for rank in (_by_name, _by_pattern, _by_class):
            for group in groups:
                if any(isinstance(t, str) and rank(t, layer) for t in group["targets"]):
                    weights = group.get("weights")
                    if not isinstance(weights, dict):
                        raise ValueError(f"its group must have weights, got {shown(weights)}")
                    return {"format": group.get("format") or self.config.get("format"), **weights}
        raise ValueError("no group of the configuration has it as a target")

    def _plan(self, layer: str, specs: Mapping[str, Spec]) -> Plan:
        scheme = self._scheme(layer)
        strategy = scheme.get("strategy") or ("group" if scheme.get("group_size") else "tensor")
        if strategy not in _STRATEGIES:
            raise ValueError(f"strategy must be one of {_STRATEGIES}, got {shown(strategy)}")
        if scheme.get("type", "int") == "float":
            bits = integer(scheme, "num_bits", (4, 8))
            return (
                self._plan_fp4(specs, scheme)
                if bits == 4
                else self._plan_fp8(specs, scheme, strategy)
            )
        bits = integer(scheme, "num_bits", (2, 3, 4, 5, 6, 7, 8))
        shape = self._integer_shape(layer, specs, bits)
        group, rows = _grouping(scheme, strategy, shape[1])
        scale = _check_scales(specs, shape, group, rows, strategy, tuple(FLOATS))
        symmetric = scheme.get("symmetric", True) is not False
        if not symmetric and rows != 1:
            raise ValueError(f"zero points need strategy 'group' or 'channel', got {strategy!r}")
        zero = None if symmetric else "int"
        if zero:
            self._check_zeros(specs, shape, -(-shape[1] // group), bits)
        plan = Plan(shape, affine(bits, group, shape[1], scale, zero), bits=bits, rows=rows)
        if "weight_g_idx" not in specs:
            return plan
        check("weight_g_idx", specs["weight_g_idx"], (shape[1],), (torch.int32, torch.int64))
        index = self._part(layer, "weight_g_idx")
        assert index is not None
        if bool((index == -1).all()):  # not used
            return plan
        return ordered(plan, index.long(), group, -(-shape[1] // group))

    def _integer_shape(self, layer: str, specs: Mapping[str, Spec], bits: int) -> tuple[int, int]:
        if "weight_packed" not in specs:
            check("weight", need(specs, "weight"), (None, None), (torch.int8,))
            n, k = specs["weight"][0]
            return n, k
        check("weight_packed", specs["weight_packed"], (None, None), (torch.int32,))
        check("weight_shape", need(specs, "weight_shape"), (2,), (torch.int64, torch.int32))
        stored = self._part(layer, "weight_shape")
        assert stored is not None
        n, k = (int(s) for s in stored)
        rows, words = specs["weight_packed"][0]
        if n != rows or k < 1 or words not in _words(k, bits):
            raise ValueError(
                f"weight_packed must have {n} rows of {' or '.join(map(str, _words(k, bits)))} words for "
                f"weight_shape {(n, k)} in {bits} bits, got {(rows, words)}"
            )
        return n, k

    def _check_zeros(
        self, specs: Mapping[str, Spec], shape: tuple[int, int], groups: int, bits: int
    ) -> None:
        spec = need(specs, "weight_zero_point")
        if spec[1] == torch.int8:
            check("weight_zero_point", spec, (shape[0], groups), (torch.int8,))
            return
        check("weight_zero_point", spec, (None, groups), (torch.int32,))
        if spec[0][0] not in _words(shape[0], bits):
            raise ValueError(
                f"weight_zero_point must have {' or '.join(map(str, _words(shape[0], bits)))} words for "
                f"{shape[0]} out features in {bits} bits, got {spec[0][0]}"
            )

    def _plan_fp8(
        self, specs: Mapping[str, Spec], scheme: Mapping[str, Any], strategy: str
    ) -> Plan:
        check("weight", need(specs, "weight"), (None, None), (torch.float8_e4m3fn,))
        n, k = specs["weight"][0]
        group, rows = _grouping(scheme, strategy, k)
        powers = need(specs, "weight_scale")[1] in (torch.uint8, _E8M0)
        dtypes = (torch.uint8, _E8M0) if powers else tuple(FLOATS)
        scale = _check_scales(specs, (n, k), group, rows, strategy, dtypes)
        return Plan((n, k), float8(group, k, "e8m0" if powers else FLOATS[scale]), rows=rows)

    def _plan_fp4(self, specs: Mapping[str, Spec], scheme: Mapping[str, Any]) -> Plan:
        check("weight_packed", need(specs, "weight_packed"), (None, None), (torch.uint8,))
        n, k = specs["weight_packed"][0][0], 2 * specs["weight_packed"][0][1]
        group = integer(scheme, "group_size", (16, 32))
        nv = group == 16
        dtypes = (torch.float8_e4m3fn,) if nv else (torch.uint8, _E8M0)
        check("weight_scale", need(specs, "weight_scale"), (n, -(-k // group)), dtypes)
        if "weight_zero_point" in specs:
            raise ValueError("weight_zero_point must not be there: E2M1 has no zero points")
        if nv:
            spec = need(specs, "weight_global_scale")
            if spec[1] != torch.float32 or spec[0] not in ((), (1,)):
                raise ValueError(f"weight_global_scale must be one float32, got {spec}")
        return Plan((n, k), FORMATS["nvfp4" if nv else "mxfp4"])

    def _decode(self, plan: Plan, tensors: Mapping[str, Tensor]) -> QuantTensor | Tensor:
        n, k = plan.shape
        scales = tensors["weight_scale"]
        format = plan.format
        if format is not None and format.codec == "lut":
            return _fp4(plan.shape, format, tensors)
        if format is not None and format.codec == "e4m3":
            scales = scales.view(torch.uint8) if format.scale == "e8m0" else scales
            codes = tensors["weight"].view(torch.uint8).contiguous()
            made = {"codes": codes, "scales": _expanded(scales, plan)}
            return QuantTensor(format, plan.shape, made)
        scales, bits = _expanded(scales, plan), plan.bits
        codes = self._codes(tensors, bits, k)
        if format is None:
            index = tensors["weight_g_idx"].long()
            zeros = self._zeros(tensors, bits, n).float()
            return (codes.float() - zeros[:, index]) * scales.float()[:, index]
        if plan.order is not None:
            codes = codes[:, plan.order]
        widened = 0 if bits == 8 else (1 << format.bits - 1) - (1 << bits - 1)
        named = {"scales": scales}
        if format.zero == "int":
            named["zeros"] = self._zeros(tensors, bits, n)
        elif widened:
            codes = codes + widened
        return pack(codes, format, **named)

    def _codes(self, tensors: Mapping[str, Tensor], bits: int, k: int) -> Tensor:
        if "weight_packed" in tensors:
            return _unpack(tensors["weight_packed"], bits, k)
        return _unsigned(tensors["weight"], bits)

    def _zeros(self, tensors: Mapping[str, Tensor], bits: int, n: int) -> Tensor:
        """(N, groups); the middle of the codes where there are none."""
        stored = tensors.get("weight_zero_point")
        if stored is None:
            shape = tensors["weight_scale"].shape
            return torch.full(shape, 1 << bits - 1, dtype=torch.uint8, device="cpu")
        if stored.dtype == torch.int8:
            return _unsigned(stored, bits)
        return _unpack(stored.t(), bits, n).t().contiguous()


def _by_name(target: str, layer: str) -> bool:
    return target == layer


def _by_pattern(target: str, layer: str) -> bool:
    return target.startswith("re:") and re.match(target[3:], layer) is not None


def _by_class(target: str, layer: str) -> bool:
    return target.isidentifier()


def _words(count: int, bits: int) -> tuple[int, ...]:
    """Words of so many codes: as a stream (0.18 and later), and with whole codes in each (before)."""
    stream, whole = -(-count * bits // 32), -(-count // (32 // bits))
    return (stream,) if stream == whole else (stream, whole)


def _unpack(words: Tensor, bits: int, count: int) -> Tensor:
    """Rows of words as codes (R, count), in the layout that their number tells; where both take as many words, that of
    whole codes leaves the top bits of every word zero.
    """
    unused = 32 % bits
    padded = words.shape[1] != -(-count * bits // 32)
    if not padded and unused and words.shape[1] in _words(count, bits)[-1:]:
        top = (words.long() & 0xFFFFFFFF) >> (32 - unused)
        padded = count > 32 // bits and not bool(top.any())
    if not padded:
        return stream_codes(words, bits, count)
    each = 32 // bits
    shifts = torch.arange(each, dtype=torch.int64, device=words.device) * bits
    codes = (words.long().unsqueeze(-1) >> shifts) & ((1 << bits) - 1)
    return codes.flatten(1)[:, :count].to(torch.uint8)


def _unsigned(values: Tensor, bits: int) -> Tensor:
    codes = values.int() + (1 << bits - 1)
    low, high = (int(v) for v in codes.aminmax())
    if low < 0 or high >= 1 << bits:
        raise ValueError(
            f"integers must be in [{-(1 << bits - 1)}, {1 << bits - 1}), got "
            f"{(low if low < 0 else high) - (1 << bits - 1)}"
        )
    return codes.to(torch.uint8)


def _grouping(scheme: Mapping[str, Any], strategy: str, k: int) -> tuple[int, int]:
    """Columns and rows that share a scale; 0 rows means all."""
    if strategy in ("group", "tensor_group"):
        return integer(scheme, "group_size"), 1
    if strategy == "block":
        block = scheme.get("block_structure")
        if not (
            isinstance(block, list)
            and len(block) == 2
            and all(isinstance(b, int) and 0 < b < 2**31 for b in block)
        ):
            raise ValueError(f"block_structure must be two positive integers, got {shown(block)}")
        return block[1], block[0]
    return k, 0 if strategy == "tensor" else 1


def _check_scales(
    specs: Mapping[str, Spec],
    shape: tuple[int, int],
    group: int,
    rows: int,
    strategy: str,
    dtypes: tuple[torch.dtype, ...],
) -> torch.dtype:
    """The dtype of the scales, if there are as many as the strategy says."""
    spec = need(specs, "weight_scale")
    n, k = shape
    wanted = (-(-n // rows) if rows else 1, -(-k // group))
    found = spec[0] if len(spec[0]) == 2 else (1, 1) if spec[0] in ((), (1,)) else (*spec[0], 1)
    if found != wanted or spec[1] not in dtypes:
        raise ValueError(
            f"weight_scale must have shape {wanted} for strategy {strategy!r} of a weight {shape}, in "
            f"{' or '.join(map(str, dtypes))}, got {spec[1]} of shape {spec[0]}"
        )
    return spec[1]


def _expanded(scales: Tensor, plan: Plan) -> Tensor:
    """The scales (N, groups) of tensors, rows or blocks of rows."""
    blocks = scales if scales.dim() == 2 else scales.reshape(-1, 1)
    return of_rows(blocks, plan.rows or plan.shape[0], plan.shape[0])


def _fp4(shape: tuple[int, int], format: Format, tensors: Mapping[str, Tensor]) -> QuantTensor:
    codes, scales = tensors["weight_packed"], tensors["weight_scale"]
    if format.scale == "e8m0":
        return QuantTensor(format, shape, {"codes": codes, "scales": scales.view(torch.uint8)})
    factor, exact = second_level(tensors["weight_global_scale"].reshape(1))
    if exact:
        made = {"codes": codes, "scales": scales, "scales2": factor}
        return QuantTensor(format, shape, made)
    wide = Format(
        name="e2m1_g16_fp32", codec="lut", bits=4, group=16, scale="fp32", table=format.table
    )
    divided = scales.to(torch.float32) / tensors["weight_global_scale"].reshape(1)
    return QuantTensor(wide, shape, {"codes": codes, "scales": divided})


def second_level(divisor: Tensor) -> tuple[Tensor, bool]:
    """1 / divisor, and whether multiplying by it gives, for every E4M3 scale and E2M1 value, the bf16 number that
    dividing by `divisor` does.
    """
    factor = 1 / divisor
    scales = torch.tensor(float8_values("e4m3"), dtype=torch.float32, device=divisor.device)
    scales = scales[scales.isfinite()]
    values = torch.tensor(E2M1_TABLE, dtype=torch.float32, device=divisor.device)[:, None]
    ours, theirs = (values * s for s in (scales * factor, scales / divisor))
    return factor, torch.equal(ours.to(torch.bfloat16), theirs.to(torch.bfloat16))
