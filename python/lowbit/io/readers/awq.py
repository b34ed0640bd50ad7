"""AWQ in its layouts: "gemm" (AutoAWQ, GPTQModel, AutoRound), "gemv", and "gemv_fast" or "llm-awq".

W[n, k] = scale[g, n] * (code[n, k] - zero[g, n]) with g = k // group; the last two store -scale * zero instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lowbit.files import shown
from lowbit.io.readers.codes import (
    FLOATS,
    Spec,
    affine,
    check,
    need,
    pack,
    stream_bytes,
    stream_codes,
)
from lowbit.io.readers.folder import Plan
from lowbit.io.readers.grouped import GroupedReader, check_groups
from lowbit.weights.quantized import QuantTensor

_VERSIONS = ("gemm", "gemv", "gemv_fast", "llm-awq")
_BITS = (2, 3, 4, 5, 6, 8)
# Where the eight codes of a word of "gemm" are, by their columns.
_NIBBLES = (0, 4, 1, 5, 2, 6, 3, 7)


class AWQReader(GroupedReader):
    """An open AWQ folder."""

    name = "awq"
    methods = frozenset({"awq"})
    parts = ("qweight", "qzeros", "scales", "scaled_zeros")

    def _check_config(self) -> None:
        config: dict[str, Any] = self.config
        for ours, theirs in (("bits", "w_bit"), ("group_size", "q_group_size")):
            if ours not in config and theirs in config:
                config[ours] = config[theirs]
        version = config.get("version", config.get("checkpoint_format", "gemm"))
        self._version = str(version).lower()
        if self._version not in _VERSIONS:
            raise ValueError(
                f"{self.path}: version must be one of {_VERSIONS}, got {shown(version)}"
            )
        allowed = _BITS if self._version == "gemm" else (4,)
        self._bits, self._group = self._settings(config, allowed)

    def _plan(self, layer: str, specs: Mapping[str, Spec]) -> Plan:
        if self._version == "gemm":
            return self._plan_gemm(specs)
        fast = self._version != "gemv"
        words_of = torch.int16 if fast else torch.int32
        check("qweight", need(specs, "qweight"), (None, None), (words_of,))
        rows, words = specs["qweight"][0]
        n, k = (4 * rows, words) if fast else (rows, 8 * words)
        if fast and k % 64:
            raise ValueError(f"qweight must have a multiple of 64 columns, got {words}")
        groups = -(-k // (self._group or k))
        # Padded to whole words of zeros.
        check("scales", need(specs, "scales"), (None, n) if fast else (n, None), FLOATS)
        stored = specs["scales"][0][0 if fast else 1]
        if stored < groups:
            raise ValueError(f"scales must have at least {groups} groups, got {stored}")
        if fast:
            zeros = "qzeros" if "qzeros" in specs else "scaled_zeros"
            check(zeros, need(specs, zeros), specs["scales"][0], (specs["scales"][1],))
        else:
            check("qzeros", need(specs, "qzeros"), (n, None), (torch.int32,))
            if specs["qzeros"][0][1] * 8 < groups:
                raise ValueError(
                    f"qzeros must have at least {groups} zeros a row, got {specs['qzeros'][0]}"
                )
        kind = "min" if fast else "int"
        return Plan((n, k), affine(4, self._group or k, k, specs["scales"][1], kind))

    def _plan_gemm(self, specs: Mapping[str, Spec]) -> Plan:
        check("qweight", need(specs, "qweight"), (None, None), (torch.int32,))
        check("scales", need(specs, "scales"), (None, None), FLOATS)
        (k, words), (groups, n) = specs["qweight"][0], specs["scales"][0]
        group = self._group or k
        wanted = -(-n * self._bits // 32)
        if words != wanted or (self._bits == 4 and n % 8):
            raise ValueError(
                f"qweight must have {wanted} words of {self._bits}-bit codes for the {n} out features of "
                f"scales, got {words}"
            )
        check_groups(groups, group, k)
        check("qzeros", need(specs, "qzeros"), (groups, words), (torch.int32,))
        return Plan((n, k), affine(self._bits, group, k, specs["scales"][1], "int"))

    def _decode(self, plan: Plan, tensors: Mapping[str, Tensor]) -> QuantTensor | Tensor:
        assert plan.format is not None
        n, k = plan.shape
        groups = plan.format.num_groups(k)
        scales = tensors["scales"]
        if self._version == "gemm":
            codes, zeros = (self._columns(tensors[part], n) for part in ("qweight", "qzeros"))
            return pack(codes, plan.format, scales=scales.t(), zeros=zeros)
        if self._version == "gemv":
            made = {
                "codes": stream_bytes(tensors["qweight"], 4, k),
                "scales": scales[:, :groups].contiguous(),
                "zeros": stream_codes(tensors["qzeros"], 4, groups),
            }
            return QuantTensor(plan.format, plan.shape, made)
        zeros = tensors["qzeros"] if "qzeros" in tensors else tensors["scaled_zeros"]
        codes = _fast_codes(tensors["qweight"], n, k)
        return pack(codes, plan.format, scales=scales[:groups].t(), zeros=zeros[:groups].t())

    def _columns(self, words: Tensor, n: int) -> Tensor:
        """(R, words) of codes along N as (N, R)."""
        codes = stream_codes(words, self._bits, n)
        if self._bits == 4:
            codes = codes.view(len(words), n // 8, 8)[:, :, list(_NIBBLES)].flatten(1)
        return codes.t().contiguous()


def _fast_codes(words: Tensor, n: int, k: int) -> Tensor:
    """(N / 4, K) int16: 64 columns of four rows lie together; 32 columns are (8, 2, 1) strides of a 4x2x4 block."""
    codes = stream_codes(words, 4, 4 * k).view(n // 4, k // 64, 4, 64).transpose(1, 2)
    codes = codes.reshape(n, k // 32, 4, 2, 4).permute(0, 1, 4, 2, 3)
    return codes.reshape(n, k).contiguous()
