"""Embeddings that scale their rows, as Gemma's: quantized, they give the rows that the dense ones give."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")

from transformers.models.bart.modeling_bart import BartScaledWordEmbedding  # noqa: E402
from transformers.models.gemma3.modeling_gemma3 import (  # noqa: E402
    Gemma3TextScaledWordEmbedding as Dense,
)
from transformers.models.t5gemma2.modeling_t5gemma2 import (  # noqa: E402
    T5Gemma2TextScaledWordEmbedding,
)

import lowbit  # noqa: E402
from lowbit.decoder.compiled import CompiledDecoder  # noqa: E402
from lowbit.decoder.runner import Runner  # noqa: E402
from lowbit.integrations.load import load_decoded  # noqa: E402
from lowbit.nn import QuantEmbedding  # noqa: E402
from lowbit.nn.embedding import ScaledEmbedding, ScaledQuantEmbedding, scale_of  # noqa: E402

N, K = 9, 32
SCALE = 7.3  # of which every dtype keeps other bits
INDICES = torch.tensor([[0, 8, 3], [3, 3, 1]])
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ARCHITECTURES = ("Gemma", "Gemma2", "Gemma3")


def dense_and_packed(format: str = "int8_g32") -> tuple[Dense, QuantEmbedding]:
    """Both with the numbers that the packed one stores."""
    torch.manual_seed(0)
    dense = Dense(N, K, 0, SCALE)
    packed = QuantEmbedding.from_embedding(dense, format)
    dense.weight.data = packed.quant_tensor().dequantize()
    return dense, packed


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_in_every_dtype(dtype: torch.dtype) -> None:
    dense, packed = dense_and_packed()
    got, expected = packed.to(dtype)(INDICES), dense.to(dtype)(INDICES)
    assert (got.dtype, packed.padding_idx) == (dtype, 0)
    assert torch.equal(got, expected)


def test_a_cast_and_back_loses_no_bits_of_the_scale() -> None:
    """transformers' buffer does; the number beside it does not."""
    dense, packed = dense_and_packed()
    expected = packed(INDICES)
    assert torch.equal(packed.to(torch.bfloat16).to(torch.float32)(INDICES), expected)
    assert scale_of(dense.to(torch.bfloat16)) == SCALE


def test_copies_and_states() -> None:
    _, packed = dense_and_packed()
    expected = packed(INDICES)
    other = QuantEmbedding.from_embedding(Dense(N, K, 0, SCALE), "int8_g32")
    other.load_state_dict(packed.state_dict())
    copies = (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed)), other)
    for module in copies:
        assert isinstance(module, ScaledQuantEmbedding)
        assert torch.equal(module(INDICES), expected)
    assert "embed_scale=7.3" in repr(packed)
    plain = QuantEmbedding.from_embedding(nn.Embedding(N, K), "int8_g32")
    assert packed.state_dict().keys() == plain.state_dict().keys()


def test_one_node_and_one_graph() -> None:
    model = nn.Sequential(dense_and_packed()[1])
    traced = torch.fx.symbolic_trace(model)
    assert [node.op for node in traced.graph.nodes] == ["placeholder", "call_module", "output"]
    assert torch.equal(traced(INDICES), model(INDICES))
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(INDICES), model(INDICES))


def test_what_scales_and_does_nothing_else() -> None:
    assert scale_of(nn.Embedding(N, K)) is None
    assert (
        scale_of(BartScaledWordEmbedding(N, K, 0, SCALE)) is None
    )  # which rounds the product alone
    assert scale_of(T5Gemma2TextScaledWordEmbedding(N, K, 0, SCALE, eoi_token_index=3)) is None
    with torch.device("meta"):
        assert scale_of(Dense(N, K, 0, SCALE)) == SCALE
    changed = Dense(N, K, 0, SCALE)
    changed.embed_scale.fill_(2.0)
    assert scale_of(changed) == 2.0
    for other in (
        BartScaledWordEmbedding(N, K, 0, SCALE),
        T5Gemma2TextScaledWordEmbedding(N, K, 0),
    ):
        with pytest.raises(NotImplementedError, match="its forward is not nn.Embedding's"):
            QuantEmbedding.from_embedding(other, "nf4")


def tiny(kind: str, tied: bool = True):
    config = getattr(transformers, f"{kind}{'Text' * (kind == 'Gemma3')}Config")(
        vocab_size=40, hidden_size=32, intermediate_size=64, num_hidden_layers=2, head_dim=16,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64, sliding_window=4,
        tie_word_embeddings=tied, pad_token_id=0, eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(1)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape) * 0.2
    return model


TOKENS = torch.arange(12)[None] * 3
RECIPE = {r".*_proj": "int8_g32", r"model\.embed_tokens|lm_head": "int8_g32"}


@torch.inference_mode()
def logits(model) -> torch.Tensor:
    return model(TOKENS).logits[0]


def quantized(kind: str, tied: bool):
    """(the packed model, the dense one with its numbers)."""
    model, dense = tiny(kind, tied), tiny(kind, tied)
    rows = lowbit.quantize_model(model, RECIPE, skip=(), progress=False).layers
    assert {"model.embed_tokens", "lm_head"} <= {row.name for row in rows}
    for name, module in model.named_modules():
        if hasattr(module, "quant_tensor"):
            dense.get_submodule(name).weight.data = module.quant_tensor().dequantize()
    return model, dense


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_models(kind: str, tied: bool, tmp_path: Path) -> None:
    """Quantized, copied, written, loaded into a dense model and into a packed one, decoded again."""
    packed, dense = quantized(kind, tied)
    embedding = packed.model.embed_tokens
    assert isinstance(embedding, ScaledQuantEmbedding)
    assert packed.lm_head.shares_weight(embedding) == tied
    expected = logits(packed)
    torch.testing.assert_close(expected, logits(dense), rtol=1e-4, atol=1e-4)

    assert torch.equal(logits(copy.deepcopy(packed)), expected)
    lowbit.save(packed, tmp_path / "model.safetensors")
    loaded = lowbit.load(tiny(kind, tied), tmp_path / "model.safetensors")
    assert loaded.lm_head.shares_weight(loaded.model.embed_tokens) == tied
    assert torch.equal(logits(loaded), expected)
    assert torch.equal(logits(lowbit.load(loaded, tmp_path / "model.safetensors")), expected)

    packed.config.architectures = [type(packed).__name__]
    packed.config.dtype = torch.float32
    packed.config.save_pretrained(tmp_path)
    assert torch.equal(logits(lowbit.load_model(tmp_path)), expected)
    decoded = load_decoded(tmp_path)
    assert isinstance(decoded.model.embed_tokens, ScaledEmbedding)
    assert torch.equal(logits(decoded), logits(dense))


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_native_decoder(kind: str, dtype: torch.dtype) -> None:
    packed, dense = (model.to(dtype) for model in quantized(kind, True))
    assert CompiledDecoder.obstacle(packed) is None
    got, expected = Runner(packed, 12).forward(TOKENS[0]).float(), logits(dense)[-1].float()
    assert (got - expected).norm() < (1e-5 if dtype == torch.float32 else 0.03) * expected.norm()
    packed.model.embed_tokens.embed_scale *= 2
    other = Runner(packed, 12).forward(TOKENS[0]).float()
    assert (other - expected).norm() > 0.05 * expected.norm()


def test_an_embedding_that_does_more_stays_dense() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = BartScaledWordEmbedding(N, K, 0, SCALE)
            self.up = nn.Linear(K, N)

    with pytest.warns(UserWarning, match="of the weights stay dense"):
        report = lowbit.quantize_model(Model(), {".*": "int8_g32"}, progress=False)
    assert "forward of its own" in report.left["embed"]
