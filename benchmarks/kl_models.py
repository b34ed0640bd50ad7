"""The language models of kl.py, in fp32: what goes into their linears on one half of a text, and how far a model with
other weights is from them on the other half.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pydoc_data import topics
from typing import Any

import torch
import torch.nn.functional as F
from real_models import locate
from torch import Tensor, nn

from lowbit.integrations.transformers import load_gguf_decoded, load_tokenizer
from lowbit.ptq import InputStatistics, collect

WINDOW = 512
# The second half of every window is predicted.
SCORED = WINDOW // 2
# Linears that read what another one reads.
SAME_INPUT = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}


@dataclass(frozen=True)
class Model:
    """A model, and how much text it is measured on.

    Attributes:
        name: as in `real_models.locate`.
        title: for tables.
        calibration, test: windows.
        permuted: whether its channels are put into a random order first.
    """

    name: str
    title: str
    calibration: int
    test: int
    permuted: bool = False


MODELS = {
    "smollm2": Model(
        "SmolLM2-135M",
        "SmolLM2-135M-Instruct (Llama, 106 M weights in 210 linears; channels permuted)",
        16,
        8,
        permuted=True,
    ),
    "gemma3": Model("Gemma-3-270M", "Gemma-3-270M (100 M weights in 126 linears)", 8, 4),
    "qwen2": Model(
        "Qwen2.5-Coder-0.5B", "Qwen2.5-Coder-0.5B-Instruct (358 M weights in 168 linears)", 8, 4
    ),
}


class Subject:
    """A model with its inputs and its predictions. `weights` and `inputs` are by the names of the linears; with
    `run` False only the former are there.
    """

    def __init__(self, model: Model, run: bool = True) -> None:
        path = locate(model.name)
        tokenizer = load_tokenizer(path)
        self.model = load_gguf_decoded(path, dtype=torch.float32).eval()
        if model.permuted:
            permute(self.model, 0)
        # Every second topic of Python's manual.
        order = sorted(topics.topics)
        self.calibration, self.test = (
            _windows(tokenizer, order[half::2], count)
            for half, count in ((1, model.calibration), (0, model.test))
        )
        self._parameters = {
            f"model.{name}": m.weight
            for name, m in self.model.model.named_modules()
            if isinstance(m, nn.Linear)
        }
        self.weights = {name: p.detach().clone() for name, p in self._parameters.items()}
        if not run:
            return
        self.inputs = self._watch()
        self._dense = [self._predict(ids) for ids in self.test]
        self.perplexity = self._perplexity(self._dense)

    @torch.no_grad()
    def _watch(self) -> dict[str, InputStatistics]:
        readers = {name: _reader(name) for name in self._parameters}
        with collect(self.model, sorted(set(readers.values()))) as statistics:
            for ids in self.calibration:
                self.model.model(ids[None], use_cache=False)
        return {name: statistics[reader] for name, reader in readers.items()}

    @torch.no_grad()
    def _predict(self, ids: Tensor) -> Tensor:  # (WINDOW - SCORED, vocabulary) fp32
        """Logs of the distributions of the scored tokens."""
        logits = self.model(ids[None], use_cache=False, logits_to_keep=SCORED + 1).logits
        return logits[0, :-1].float().log_softmax(-1)

    def _perplexity(self, predictions: list[Tensor]) -> float:
        losses = [
            F.nll_loss(p, ids[-SCORED:]) for p, ids in zip(predictions, self.test, strict=True)
        ]
        return math.exp(float(torch.stack(losses).mean()))

    @torch.no_grad()
    def score(self, weights: dict[str, Tensor]) -> dict[str, float]:
        """KL(dense || model with these weights (N, K)) in nats per token, the perplexity of the latter, and the share
        of tokens of which both find the same most likely.
        """
        try:
            self._fill(weights)
            divergence, agreement, made = 0.0, 0.0, []
            for dense, ids in zip(self._dense, self.test, strict=True):
                own = self._predict(ids)
                divergence += float(F.kl_div(own, dense, reduction="batchmean", log_target=True))
                agreement += float((own.argmax(-1) == dense.argmax(-1)).float().mean())
                made.append(F.nll_loss(own, ids[-SCORED:]))
        finally:
            self._fill(self.weights)
        count = len(self.test)
        return {
            "kl": divergence / count,
            "perplexity": math.exp(float(torch.stack(made).mean())),
            "agreement": agreement / count,
        }

    @torch.no_grad()
    def _fill(self, weights: dict[str, Tensor]) -> None:
        for name, values in weights.items():
            self._parameters[name].copy_(values)


def _reader(name: str) -> str:
    """The linear whose inputs stand for those of `name`."""
    block, _, last = name.rpartition(".")
    return f"{block}.{SAME_INPUT.get(last, last)}"


def _windows(tokenizer: Any, names: list[str], count: int) -> Tensor:  # (count, WINDOW)
    text = "\n".join(topics.topics[name] for name in names)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) < count * WINDOW:
        raise ValueError(f"the text has {len(ids)} tokens; expected {count * WINDOW}")
    return torch.tensor(ids[: count * WINDOW]).view(count, WINDOW)


@torch.no_grad()
def permute(model: Any, seed: int) -> None:
    """Puts hidden and intermediate channels of a Llama, and those of v within each head, into a random order.

    The function stays the same, but weights that were stored with one scale are apart: a model that comes from a file
    of 4 bits no longer lies on a grid that some formats have, too.
    """
    generator = torch.Generator().manual_seed(seed)

    def order(size: int) -> Tensor:
        return torch.randperm(size, generator=generator)

    config, inner = model.config, model.model
    hidden = order(config.hidden_size)
    heads, kv = config.num_attention_heads, config.num_key_value_heads
    size = config.hidden_size // heads
    inner.embed_tokens.weight.copy_(inner.embed_tokens.weight[:, hidden])
    if model.lm_head.weight is not inner.embed_tokens.weight:
        model.lm_head.weight.copy_(model.lm_head.weight[:, hidden])
    inner.norm.weight.copy_(inner.norm.weight[hidden])
    for block in inner.layers:
        attention, mlp = block.self_attn, block.mlp
        middle = order(config.intermediate_size)
        within = [order(size) for _ in range(kv)]
        values = torch.cat([head * size + o for head, o in enumerate(within)])
        read = torch.cat([head * size + within[head * kv // heads] for head in range(heads)])
        for norm in (block.input_layernorm, block.post_attention_layernorm):
            norm.weight.copy_(norm.weight[hidden])
        for linear, rows, columns in (
            (attention.q_proj, None, hidden),
            (attention.k_proj, None, hidden),
            (attention.v_proj, values, hidden),
            (attention.o_proj, hidden, read),
            (mlp.gate_proj, middle, hidden),
            (mlp.up_proj, middle, hidden),
            (mlp.down_proj, hidden, middle),
        ):
            weight = linear.weight if rows is None else linear.weight[rows]
            linear.weight.copy_(weight[:, columns])
