"""GPTQ of AutoGPTQ and GPTQModel, and AutoRound in the same layout: 2, 3, 4 and 8 bits, 5 to 7 in planes.

W[n, k] = scale[g, n] * (code[k, n] - zero[g, n]) with g = g_idx[k]. "gptq" stores zero - 1, "gptq_v2" and "gptq_p"
the zero itself; where every zero is the middle of the codes, the file shows which it is, whatever its name says.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lowbit.files import shown
from lowbit.io.readers.codes import (
    FLOATS,
    INTEGERS,
    Spec,
    affine,
    check,
    need,
    pack,
    stream_bytes,
    stream_codes,
)
from lowbit.io.readers.folder import Plan, ordered
from lowbit.io.readers.grouped import GroupedReader, check_groups
from lowbit.weights.quantized import QuantTensor

_BITS = (2, 3, 4, 5, 6, 7, 8)
_STREAMS = (2, 3, 4, 8)  # bits whose planes would be no other than the stream, but for 3
# Widths of the planes that the codes of so many bits are cut into, low bits first.
_PLANES = {3: (2, 1), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1)}
_FORMATS = ("gptq", "gptq_v2", "gptq_p")


class GPTQReader(GroupedReader):
    """An open GPTQ folder."""

    name = "gptq"
    methods = frozenset({"gptq"})
    parts = ("qweight", "qzeros", "scales", "g_idx")

    def _check_config(self) -> None:
        self._settings(self.config, _BITS)
        kind = self.config.get("checkpoint_format", "gptq")
        if kind not in _FORMATS:
            raise ValueError(
                f"{self.path}: checkpoint_format must be one of {_FORMATS}, got {shown(kind)}"
            )
        for key in ("dynamic", "extra_config"):
            rules = self.config.get(key) or {}
            if not isinstance(rules, dict) or not all(
                rule is False or isinstance(rule, dict) for rule in rules.values()
            ):
                raise ValueError(
                    f"{self.path}: {key} must map names to settings, got {shown(rules)}"
                )
        self._planar, self._plus_one = kind == "gptq_p", kind == "gptq"

    def _of_layer(self, layer: str) -> dict[str, Any]:
        """The configuration of one layer: the first dynamic rule that its name matches counts."""
        own = (self.config.get("extra_config") or {}).get(layer)
        for pattern, rule in (self.config.get("dynamic") or {}).items():
            if own is None and re.match(pattern.removeprefix("+:").removeprefix("-:"), layer):
                if pattern.startswith("-:") or rule is False:
                    raise ValueError(f"the dynamic rule {shown(pattern)} leaves it dense")
                own = rule
        return {**self.config, **(own or {})}

    def _plan(self, layer: str, specs: Mapping[str, Spec]) -> Plan:
        config = self._of_layer(layer)
        bits, group = self._settings(config, _BITS, layer)
        if not self._is_planar(bits) and bits not in _STREAMS:
            raise ValueError(f"bits must be one of {_STREAMS} in a stream, got {bits}")
        (rows, _), words = _matrix("qweight", need(specs, "qweight"))
        scales = need(specs, "scales")
        check("scales", scales, (None, None), FLOATS)
        groups, n = scales[0]
        check("qweight", specs["qweight"], (None, n), INTEGERS)
        width = 8 * words.itemsize
        if self._is_planar(bits) and (words != torch.int32 or n % 32):
            raise ValueError(
                f"planes of {bits} bits need int32 and 32 out features, got {words}, {n}"
            )
        k, rest = divmod(rows * width, bits)
        if rest or k % (32 if bits in _PLANES else 1):
            raise ValueError(f"qweight must have rows for whole {bits}-bit weights, got {rows}")
        group = min(group or k, k)
        check_groups(groups, group, k)
        check("qzeros", need(specs, "qzeros"), (groups, None), (words,))
        if specs["qzeros"][0][1] * width != n * bits:
            raise ValueError(
                f"qzeros must have {n * bits / width:g} words a group for {n} out features of {bits} bits, "
                f"got {specs['qzeros'][0][1]}"
            )
        symmetric = config.get("sym", True) is True
        format = affine(bits, group, k, scales[1], None if symmetric and bits != 7 else "int")
        plan = Plan((n, k), format, bits=bits)
        if "g_idx" in specs:
            check("g_idx", specs["g_idx"], (k,), INTEGERS)
            index = self._part(layer, "g_idx")
            assert index is not None
            return ordered(plan, index.long(), group, groups)
        return plan

    def _is_planar(self, bits: int) -> bool:
        return bits in (5, 6, 7) or (self._planar and bits in _PLANES)

    def _decode(self, plan: Plan, tensors: Mapping[str, Tensor]) -> QuantTensor | Tensor:
        n, k = plan.shape
        words, scales = tensors["qweight"].t(), tensors["scales"].t()
        bits = plan.bits
        zeros = self._zeros(tensors["qzeros"], bits, n).t()
        if plan.format is None:
            index = tensors["g_idx"].long()
            codes = self._codes(words, bits, k).float()
            return scales[:, index].float() * (codes - zeros[:, index].float())
        format, named = plan.format, {"scales": scales}
        if format.zero is None and not bool((zeros == 1 << bits - 1).all()):
            _warn(f"{self.path}: sym is true and zeros are not all {1 << bits - 1}: they are kept")
            format = affine(bits, format.group, k, tensors["scales"].dtype, "int")
        if format.zero == "int":
            named["zeros"] = zeros
        if plan.order is None and not self._is_planar(bits):
            # The very bytes of a canonical row.
            made = {name: t.contiguous() for name, t in named.items()}
            return QuantTensor(format, (n, k), {"codes": stream_bytes(words, bits, k), **made})
        codes = self._codes(words, bits, k)
        codes = codes if plan.order is None else codes[:, plan.order]
        return pack(codes, format, **named)

    def _codes(self, words: Tensor, bits: int, count: int) -> Tensor:
        if self._is_planar(bits):
            return _planar_codes(words, bits, count)
        return stream_codes(words, bits, count)

    def _zeros(self, words: Tensor, bits: int, count: int) -> Tensor:
        """The true zeros (groups, N): where all are the middle, or one less, that is what they are."""
        zeros = self._codes(words, bits, count)
        middle, plus_one = 1 << bits - 1, self._plus_one and not self._is_planar(bits)
        found = {middle: False, middle - 1: True}.get(int(zeros.min()))
        if int(zeros.min()) != int(zeros.max()) or not self.config.get("sym", True):
            found = None
        if found is not None and found != plus_one:
            _warn(
                f"{self.path}: checkpoint_format is {shown(self.config.get('checkpoint_format', 'gptq'))}, and "
                f"all zeros are {int(zeros.min())}: read as {'gptq' if found else 'gptq_v2'}"
            )
            plus_one = found
        return (zeros + 1) & ((1 << bits) - 1) if plus_one else zeros


def _matrix(part: str, spec: Spec) -> tuple[tuple[int, int], torch.dtype]:
    check(part, spec, (None, None), INTEGERS)
    rows, columns = spec[0]
    return (rows, columns), spec[1]


def _planar_codes(words: Tensor, bits: int, count: int) -> Tensor:
    """Codes of rows that hold, for every 32 codes, a plane of each width in turn."""
    raw = words.contiguous().view(torch.uint8).view(words.shape[0], count // 32, 4 * bits)
    codes = torch.zeros(words.shape[0], count // 32, 32, dtype=torch.uint8, device=words.device)
    start = shift = 0
    for width in _PLANES[bits]:
        plane = raw[..., start : start + 4 * width].reshape(-1, 4 * width)
        codes |= stream_codes(plane, width, 32).view_as(codes) << shift
        start, shift = start + 4 * width, shift + width
    return codes.view(words.shape[0], count)


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=2)
