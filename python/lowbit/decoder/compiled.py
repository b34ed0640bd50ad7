"""The decoder of csrc/decoder/decoder.h on the tensors of a transformers model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lowbit import _C
from lowbit.backends.cpu import requests
from lowbit.decoder.balance import key_balance
from lowbit.decoder.description import Description, Layer, angles, describe
from lowbit.nn import PackedModule
from lowbit.strides import address, contiguous

Struct = TypeVar("Struct")
# Fields of a Description that DecoderConfig holds under the same names.
_CONFIG = (
    "hidden", "heads", "kv_heads", "head_dim", "intermediate", "vocab", "eps", "late_norms", "activation",
    "score_scale", "score_cap", "embedding_scale", "residual_scale", "logit_divisor", "logit_cap",
)  # fmt: skip


# csrc/kernel.h Dtype of keys and values.
_CACHE_CODES = {
    torch.float32: 0,
    torch.bfloat16: 1,
    torch.float16: 2,
    torch.int8: 3,
    torch.float8_e4m3fn: 5,
}
CACHE_DTYPES = tuple(_CACHE_CODES)


class CompiledDecoder:
    """Decodes a model that fits a `Description`.

    Args:
        cache_dtype: of keys and values. int8: codes, and for each head and position a fp32
            scale of a value and of 32 dimensions of a key. float8_e4m3fn: codes, and a fp32 scale
            of a value and of a key. By default bf16 for a model of bf16, and fp32 for others.
        sequences: how many the cache has room for.

    Raises:
        NotImplementedError: the model does not fit.
        ValueError: the cache has no such dtype.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        max_length: int,
        cache_dtype: torch.dtype | None = None,
        sequences: int = 1,
    ) -> None:
        described = describe(model)
        if cache_dtype is None:
            bf16 = described.dtype == torch.bfloat16
            cache_dtype = torch.bfloat16 if bf16 else torch.float32
        if cache_dtype not in CACHE_DTYPES:
            raise ValueError(f"cache_dtype must be one of {CACHE_DTYPES}, got {cache_dtype}")
        self._logits = torch.empty(sequences, described.vocab, dtype=described.dtype, device="cpu")
        # The compiled decoder holds addresses; these tensors must live as long as it does.
        self._kept: list[object] = [self._logits]
        config = _filled(
            _C.DecoderConfig(),
            dtype=requests.CODES[described.dtype],
            cache_dtype=_CACHE_CODES[cache_dtype],
            max_length=max_length,
            sequences=sequences,
            threads=torch.get_num_threads(),
            **{name: getattr(described, name) for name in _CONFIG},
        )
        ropes = {
            name: self._rope(*angles(model, name, max_length)) for name in described.rope_names
        }
        balanced = cache_dtype == torch.int8
        made = _filled(
            _C.DecoderModel(),
            embedding=self._linear(described.embedding),
            head=self._linear(described.head),
            layers=[self._layer(layer, described, ropes, balanced) for layer in described.layers],
            ropes=list(ropes.values()),
            norm=self._norm(described.norm, described),
            logits=self._address(self._logits),
        )
        self._decoder = _C.Decoder(config, made)

    @staticmethod
    def obstacle(model: PreTrainedModel) -> str | None:
        """Why it cannot decode a model, or None."""
        try:
            describe(model)
        except NotImplementedError as e:
            return str(e)
        return None

    def forward(
        self,
        ids: Tensor,  # (T,) int64
        position: int,
        sequence: int = 0,
    ) -> Tensor:  # (vocabulary,)
        """Appends tokens to a sequence at a position; returns the logits after the last, in the same memory.

        Raises:
            TypeError, IndexError: the ids are not int64 on the CPU, or beyond the vocabulary.
        """
        if ids.dtype != torch.int64 or ids.device.type != "cpu":
            raise TypeError(f"ids must be int64 on the CPU, got {ids.dtype} on {ids.device}")
        self._check(*(int(bound) for bound in ids.aminmax()))
        ids = ids.contiguous()
        self._decoder.run_ptr(
            ids=address(ids), count=len(ids), sequence=sequence, position=position
        )
        return self._logits[0]

    def step(
        self, ids: Sequence[int], places: Sequence[tuple[int, int]]
    ) -> Tensor:  # (tokens, vocabulary)
        """Appends one token to each of several sequences, at (sequence, position); returns the logits after them.

        Raises:
            IndexError: an id is beyond the vocabulary.
            ValueError: a place is not in the cache, or a sequence has two tokens.
        """
        self._check(min(ids), max(ids))
        self._decoder.step(list(ids), list(places))
        return self._logits[: len(ids)]

    def likeliest(self, row: int = 0) -> int:
        """The token of the largest logit of a row.

        Raises:
            ValueError: a logit is NaN.
        """
        return self._decoder.likeliest(row)

    def _check(self, low: int, high: int) -> None:
        vocabulary = self._logits.shape[1]
        if low < 0 or high >= vocabulary:
            raise IndexError(f"ids must be in [0, {vocabulary}), got {low if low < 0 else high}")

    def _address(self, t: Tensor | None) -> int:
        if t is None:
            return 0
        t = t.detach().contiguous()
        self._kept.append(t)
        return address(t)

    def _layer(
        self,
        layer: Layer,
        described: Description,
        ropes: dict[str, _C.DecoderRope],
        balanced: bool,
    ) -> _C.DecoderLayer:
        rotary = 0 if layer.rope is None else ropes[layer.rope].dim
        balance = self._balance(layer, described, rotary) if balanced else None
        linears = {
            what: [self._linear(module) for module in modules]
            for what, modules in layer.linears.items()
        }
        return _filled(
            _C.DecoderLayer(),
            qkv=linears["qkv"],
            o=linears["o"][0],
            gate_up=linears["gate_up"],
            down=linears["down"][0],
            rope=-1 if layer.rope is None else described.rope_names.index(layer.rope),
            window=layer.window,
            key_balance=self._address(balance),
            **{what: self._norm(norm, described) for what, norm in layer.norms.items()},
        )

    def _balance(self, layer: Layer, described: Description, rotary: int) -> Tensor | None:
        # A norm behind the projection takes the size of a bias away.
        if "k_norm" in layer.norms:
            return None
        q, kv = (n * described.head_dim for n in (described.heads, described.kv_heads))
        qkv = layer.linears["qkv"]
        bias = cast("Tensor | None", getattr(qkv[1] if len(qkv) > 1 else qkv[0], "bias", None))
        if bias is None:
            return None
        bias = bias if len(qkv) > 1 else bias[q : q + kv]
        return key_balance(bias, described.head_dim, rotary)

    def _norm(self, norm: nn.Module, described: Description) -> int:
        return self._address(cast("Tensor", norm.weight).float() + described.norm_offset)

    def _rope(self, cos: Tensor, sin: Tensor) -> _C.DecoderRope:
        # rotate_half(x) * sin is (x with its halves swapped) * (sin with its first half negated).
        dim = cos.shape[1]
        sin[:, : dim // 2].neg_()
        return _filled(_C.DecoderRope(), dim=dim, cos=self._address(cos), sin=self._address(sin))

    def _linear(self, module: nn.Module) -> _C.DecoderLinear:
        bias = cast("Tensor | None", getattr(module, "bias", None))
        bias_dtype = 0 if bias is None else requests.CODES[bias.dtype]
        if not isinstance(module, PackedModule):
            weight: Any = module.weight
            n, k = weight.shape
            return _C.dense_linear(
                n=n,
                k=k,
                weight=self._address(weight),
                bias=self._address(bias),
                bias_dtype=bias_dtype,
            )
        w = module.kernel_weight().map(contiguous).operands
        self._kept.append(w)
        scale = getattr(module, "input_scale", None)
        return requests.bound(w).decoder_linear(
            bias=self._address(bias),
            bias_dtype=bias_dtype,
            x_scale=0.0 if scale is None else float(scale),
        )


def _filled(struct: Struct, **fields: object) -> Struct:
    """The struct with fields set; an unknown name is an AttributeError."""
    for name, value in fields.items():
        setattr(struct, name, value)
    return struct
