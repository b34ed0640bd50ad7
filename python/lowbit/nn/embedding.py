"""QuantEmbedding: rows of a quantized (num_embeddings, embedding_dim) weight, for nn.Embedding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.formats import Format
from lowbit.methods import quantize
from lowbit.nn.base import PackedModule, zero_weight
from lowbit.nn.leaf import Proxy, node_of
from lowbit.ops import checks
from lowbit.ops.weights import call_embedding
from lowbit.weights.quantized import QuantTensor


class QuantEmbedding(PackedModule):
    """An embedding whose weight is quantized.

    Attributes:
        num_embeddings, embedding_dim: N and K.
        weight: stands for the dense weight (`lowbit.nn.weight.PackedWeight`).
        padding_idx: as in nn.Embedding; it plays no part in the result.
        dtype: of the rows. It follows `.to(dtype)`, `.half()` and the like; the weight does not.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        *,
        format: Format | str,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Makes an embedding whose tensors are zero, to be filled by `load_state_dict`."""
        weight = zero_weight(format, num_embeddings, embedding_dim, device)
        self._init(weight, dtype or torch.get_default_dtype(), padding_idx)

    def _init(self, weight: QuantTensor, dtype: torch.dtype, padding_idx: int | None) -> None:
        if dtype not in checks.FLOAT_DTYPES:
            raise TypeError(f"dtype must be float32, bfloat16 or float16, got {dtype}")
        super().__init__(weight, dtype)
        self._resized()
        self.padding_idx = padding_idx

    def _resized(self) -> None:
        self.num_embeddings, self.embedding_dim = self.shape

    @classmethod
    def from_embedding(
        cls, embedding: nn.Embedding, format: Format | str, method: str | None = None
    ) -> QuantEmbedding:
        """Quantizes a dense embedding; its rows keep their dtype, and the scale that Gemma's have.

        Raises:
            TypeError: `embedding` is not an nn.Embedding.
            NotImplementedError: it renormalizes its rows, or is a subclass with another forward.
        """
        if not isinstance(embedding, nn.Embedding):
            raise TypeError(f"embedding must be an nn.Embedding, got {type(embedding).__name__}")
        if type(embedding).forward is not nn.Embedding.forward and scale_of(embedding) is None:
            raise NotImplementedError(
                f"embedding is a {type(embedding).__name__}: its forward is not nn.Embedding's"
            )
        if embedding.max_norm is not None:
            raise NotImplementedError(f"max_norm must be None, got {embedding.max_norm}")
        weight = quantize(embedding.weight.detach(), format, method)
        made = packed_embedding(embedding, weight, embedding.weight.dtype)
        return made.train(embedding.training)

    @classmethod
    def from_quant_tensor(
        cls,
        weight: QuantTensor,
        dtype: torch.dtype | None = None,
        padding_idx: int | None = None,
    ) -> QuantEmbedding:
        """Makes an embedding of a quantized (N, K) weight.

        Args:
            weight: on the device where the embedding shall run.
            dtype: of the rows: fp32, bf16 or fp16; by default torch's default dtype.
            padding_idx: kept as an attribute.
        """
        made = cls.__new__(cls)
        made._init(weight, dtype or torch.get_default_dtype(), padding_idx)
        return made

    def to_embedding(self, dtype: torch.dtype | None = None) -> nn.Embedding:
        """The dense embedding with the values that the weight stands for, in `dtype`, by default that of the rows."""
        values = self.quant_tensor().dequantize().to(dtype or self.dtype)
        n, k = values.shape
        made = nn.Embedding(n, k, self.padding_idx, device="meta", dtype=values.dtype)
        made.weight = nn.Parameter(values)
        return made.train(self.training)

    def forward(self, indices: Tensor) -> Tensor:
        """Rows of the weight: indices (...) int64 or int32 give (..., K)."""
        if isinstance(indices, Proxy):
            return node_of(self, indices)
        if self.split is not None:
            return self.split.embedding(self, indices)
        return self.rows(indices)

    def rows(self, indices: Tensor, tensors: Mapping[str, Any] | None = None) -> Tensor:
        """Rows of the weight that is here; its `tensors`, by the names of buffers, where they are not the buffers."""
        w, others = self._terms(self._buffers if tensors is None else tensors)
        return call_embedding(indices, w, self.dtype, *others)

    def extra_repr(self) -> str:
        """Shape, padding, dtype, format and bytes."""
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        shape = f"{self.num_embeddings}, {self.embedding_dim}{padding}"
        return f"{shape}, dtype={self.dtype}, {super().extra_repr()}"


class ScaledQuantEmbedding(QuantEmbedding):
    """A QuantEmbedding whose rows are multiplied by a number, as those of transformers' Gemma are.

    Attributes:
        embed_scale: the number; it is rounded to the dtype of the rows, as transformers rounds it.
    """

    embed_scale: float = 1.0
    takes_over = ("scalar_embed_scale", "embed_scale")

    def to_embedding(self, dtype: torch.dtype | None = None) -> nn.Embedding:
        """As `QuantEmbedding`; it scales its rows."""
        weight = super().to_embedding(dtype).weight.detach()
        return ScaledEmbedding(weight, self.padding_idx, self.embed_scale).train(self.training)

    def forward(self, indices: Tensor) -> Tensor:
        """Rows of the weight, scaled: indices (...) int64 or int32 give (..., K)."""
        if isinstance(indices, Proxy):
            return node_of(self, indices)
        scale = torch.tensor(self.embed_scale, dtype=self.dtype, device="cpu")
        return super().forward(indices) * scale

    def extra_repr(self) -> str:
        """That of QuantEmbedding, and the scale."""
        return f"{super().extra_repr()}, embed_scale={self.embed_scale:g}"


class ScaledEmbedding(nn.Embedding):
    """What a ScaledQuantEmbedding is when it is dense; `scale_of` knows it."""

    embed_scale: Tensor

    def __init__(self, weight: Tensor, padding_idx: int | None, scale: float) -> None:
        """Makes it of a weight (N, K), whose dtype the rows have."""
        n, k = weight.shape
        super().__init__(n, k, padding_idx, device="meta", dtype=weight.dtype)
        self.weight = nn.Parameter(weight)
        self.scalar_embed_scale = scale
        buffer = torch.tensor(scale, dtype=torch.float32, device=weight.device)
        self.register_buffer("embed_scale", buffer, persistent=False)

    def forward(self, indices: Tensor) -> Tensor:
        """Rows of the weight, scaled."""
        rows: Tensor = super().forward(indices)
        return rows * self.embed_scale.to(self.weight.dtype)


def scale_of(embedding: nn.Embedding) -> float | None:
    """What a dense embedding multiplies its rows by and does nothing else, as transformers' Gemma; None of others."""
    number, buffer = (
        vars(embedding).get("scalar_embed_scale"),
        embedding._buffers.get("embed_scale"),
    )
    if number is None or buffer is None:
        return None
    # T5Gemma 2 puts a parameter of its own in the place of some rows.
    if len(embedding._buffers) > 1 or len(embedding._parameters) > 1:
        return None
    number = float(number)
    if buffer.is_meta or torch.equal(buffer, torch.full_like(buffer, number)):
        return number  # with the bits that a cast of the buffer has lost
    return float(buffer)


def packed_embedding(
    dense: nn.Embedding, weight: QuantTensor, dtype: torch.dtype
) -> QuantEmbedding:
    """What takes the place of a dense embedding, one that scales its rows (`scale_of`) included.

    Args:
        dense: plain, or with a scale.
        weight: the quantized weight, of the shape of the dense one.
        dtype: of the rows.
    """
    scale = scale_of(dense)
    if scale is None:
        return QuantEmbedding.from_quant_tensor(weight, dtype, dense.padding_idx)
    made = ScaledQuantEmbedding.from_quant_tensor(weight, dtype, dense.padding_idx)
    assert isinstance(made, ScaledQuantEmbedding)
    made.embed_scale = scale
    return made
