"""GGUF files as transformers models with their linears and embeddings packed as stored. Names are package `gguf`'s."""

from __future__ import annotations

import functools
import math
import re
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_gguf_pytorch_utils import TensorProcessor

from lowbit.formats import Format, as_format
from lowbit.integrations.configuration import without_weights
from lowbit.integrations.gguf_configs import architecture, config_of
from lowbit.integrations.gguf_experts import SHARED
from lowbit.integrations.gguf_keys import divided
from lowbit.integrations.gguf_rows import (
    ROPE_FACTORS,
    Part,
    Source,
    dense,
    joined,
    rows_of,
    sources,
)
from lowbit.integrations.inexact import Inexact, quantize_anew
from lowbit.io.readers.codes import NEAREST
from lowbit.io.readers.gguf import GGUFFile
from lowbit.io.readers.gguf_blocks import BLOCK_TYPES, DENSE_TYPES
from lowbit.nn import PackedModule, QuantEmbedding, QuantLinear
from lowbit.nn.embedding import packed_embedding
from lowbit.nn.experts import projections
from lowbit.nn.stand_ins import stand_ins
from lowbit.nn.surgery import replace
from lowbit.weights.quantized import QuantTensor

_HEAD = "lm_head"


def load(
    file: GGUFFile,
    dtype: torch.dtype,
    target: Format | None,
    inexact: Inexact = None,
    decoded: bool = False,
) -> PreTrainedModel:
    """Makes the model of a GGUF file.

    Args:
        file: open.
        dtype: of activations, norms and the rows that the embedding returns.
        target: requantize the linears of the layers to this format; None keeps them as stored.
        inexact: as of `lowbit.load_model`.
        decoded: make every weight dense.

    Raises:
        ImportError: accelerate is not installed.
        ValueError: the file is damaged, or lacks a tensor or a key.
        NotImplementedError: the architecture or something that the file asks for is not supported; the message says
            what can be done.
    """
    found = architecture(file)
    kind, config = configured(file)
    config.dtype = dtype
    what = f"{file.path}: transformers cannot make a {kind.__name__}"
    if found.encoder:
        kind = functools.partial(kind, add_pooling_layer=False)
    model = without_weights(kind, config, what)
    kept = target is None and not decoded
    with stand_ins(model, apart=_apart(file, model) if kept else ()):
        processor = found.processor(config=config.to_dict())
        job = _Filling(file, model, processor, dtype, target, inexact, decoded)
        for name, source in sorted(
            sources(file, model, processor, found.optional, found.factors).items(),
            # A linear that is replaced takes its bias along.
            key=lambda item: item[0].endswith(".weight"),
        ):
            job.fill(name, source)
        if model.get_output_embeddings() is not None and config.tie_word_embeddings:
            _tie(model)
    job.warn()
    return model.eval()


def configured(file: GGUFFile) -> tuple[Any, Any]:
    """The class of transformers' model of a GGUF file, and its configuration; errors as of `load`."""
    found, config = architecture(file), config_of(file)
    if found.factors and ROPE_FACTORS in file.tensors:
        _scale_frequencies(file, config)
    made: Any = AutoModel if found.encoder else AutoModelForCausalLM
    kind: Any = made._model_mapping[type(config)]
    config.dtype = torch.bfloat16
    config.architectures = [kind.__name__]
    return kind, config


def _apart(file: GGUFFile, model: PreTrainedModel) -> list[str]:
    """The modules whose gates are of another type than what they multiply, and are kept apart from it: experts, and the
    linear of one that is shared.
    """
    found = []
    for name, module in model.named_modules():
        number = re.search(r"\.(\d+)\.", name)
        shared = name.endswith(SHARED)
        if number is not None and (shared or "gate_up_proj" in projections(module)):
            kind = "shexp" if shared else "exps"
            halves = [f"blk.{number[1]}.ffn_{half}_{kind}.weight" for half in ("gate", "up")]
            if len({file.tensors[half].type for half in halves if half in file.tensors}) == 2:
                found.append(name)
    return found


class _Filling:
    def __init__(
        self,
        file: GGUFFile,
        model: PreTrainedModel,
        processor: TensorProcessor,
        dtype: torch.dtype,
        target: Format | None,
        inexact: Inexact,
        decoded: bool,
    ) -> None:
        self.file, self.model, self.processor = file, model, processor
        self.dtype, self.target, self.decoded = dtype, target, decoded
        self.nearest = as_format(NEAREST) if inexact is None else inexact
        self.lossy: dict[str, float] = {}

    def fill(self, name: str, source: Source) -> None:
        """Gives a parameter its values, replacing its module where they are packed."""
        parent, _, leaf = name.rpartition(".")
        module = self.model.get_submodule(parent)
        weight = self._read(module, leaf, source)
        packable = leaf == "weight" and isinstance(module, nn.Linear | nn.Embedding)
        if packable and not self.decoded and source.parts:
            weight = self._packed(parent, module, weight, source)
        if not packable or self.decoded or not isinstance(weight, QuantTensor):
            values = dense(weight).to(self.dtype)
            module.register_parameter(leaf, nn.Parameter(values))
            return
        made: PackedModule
        if isinstance(module, nn.Embedding):
            made = packed_embedding(module, weight, self.dtype)
        else:
            made = QuantLinear.from_quant_tensor(weight, module._parameters["bias"], self.dtype)
        replace(self.model, parent, made)
        made.set_weight_dtype(self.dtype)  # not that of the empty model

    def warn(self) -> None:
        """Names the tensors, with their types, that are quantized anew because no format holds them."""
        if self.lossy:
            assert isinstance(self.nearest, Format)
            types = {self.file.tensors[name].type for name in self.lossy}
            warnings.warn(
                f"{self.file.path}: no format holds {len(self.lossy)} tensors of type "
                f"{', '.join(sorted(t.name for t in types))}; they are quantized anew "
                f"to {self.nearest.name}, with a loss: a relative error of up to {max(self.lossy.values()):.2g}: "
                f"{', '.join(list(self.lossy)[:8])}",
                stacklevel=5,
            )

    def _read(self, module: nn.Module, leaf: str, source: Source) -> QuantTensor | Tensor:
        """What the file has for a parameter, in transformers' order."""
        shape = module.get_parameter(leaf).shape
        if not source.parts:
            return torch.zeros(shape, dtype=torch.float32, device="cpu")
        weight = joined([self._part(part, shape[1:]) for part in source.parts])
        return weight if source.order is None else rows_of(weight, source.order)

    def _part(self, part: Part, columns: torch.Size) -> QuantTensor | Tensor:
        """(N, *columns)."""
        info, rows, width = self.file.tensors[part.stored], part.rows, math.prod(columns)
        name, lies = part.alone or (part.stored, range(math.prod(info.shape) // width))
        read = rows if isinstance(rows, range) else range(len(lies))
        weight: QuantTensor | Tensor
        if len(info.shape) == 1 and not columns:
            values = dense(self.file[part.stored]).numpy()[lies.start : lies.stop]
            processed = self.processor.process(values, name).weights
            weight = torch.from_numpy(processed)[read.start : read.stop]
        elif info.type in BLOCK_TYPES or info.type in DENSE_TYPES:
            weight = self.file.rows(part.stored, read, width)
        else:
            weight = self.file.dequantized(part.stored, read)
        if isinstance(weight, Tensor):
            weight = weight.reshape(len(read), *columns)
        return weight if isinstance(rows, range) else rows_of(weight, rows)

    def _packed(
        self, parent: str, module: nn.Module, weight: QuantTensor | Tensor, source: Source
    ) -> QuantTensor | Tensor:
        """The weight in the format that it shall have, if any."""
        if self.target is not None and isinstance(module, nn.Linear) and parent != _HEAD:
            return quantize_anew(dense(weight), self.target)[0]
        stored = [part.stored for part in source.parts]
        kinds = {self.file.tensors[name].type for name in stored}
        # A format holds them, or a dense tensor; of several types a dense one would.
        held = kinds <= DENSE_TYPES.keys() or (len(kinds) == 1 and kinds <= BLOCK_TYPES.keys())
        if held or not isinstance(self.nearest, Format):
            return weight
        made, error = quantize_anew(dense(weight), self.nearest)
        for name in stored:
            self.lossy[name] = max(error, self.lossy.get(name, 0.0))
        return made


def _tie(model: PreTrainedModel) -> None:
    embedding, head = model.get_input_embeddings(), model.get_submodule(_HEAD)
    if isinstance(embedding, QuantEmbedding):
        made = QuantLinear.tied_to(embedding)
        replace(model, _HEAD, made)
        made.set_weight_dtype(embedding.dtype)
    else:
        head.register_parameter("weight", embedding._parameters["weight"])


def _scale_frequencies(file: GGUFFile, config: Any) -> None:
    """Gives a configuration the factors that the file divides the rotary embedding's frequencies by, as Llama 3.1."""
    rope, factors = config.rope_parameters, file[ROPE_FACTORS]
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    half = dim // 2
    if factors.shape != (half,):
        raise ValueError(
            f"{file.path}: tensor {ROPE_FACTORS!r} must have shape {(half,)}, got {tuple(factors.shape)}"
        )
    if isinstance(factors, QuantTensor) or not bool((factors > 0).all()):
        raise ValueError(f"{file.path}: tensor {ROPE_FACTORS!r} must hold positive numbers")
    if bool((factors == 1).all()):
        return
    if rope["rope_type"] not in ("default", "linear"):
        raise NotImplementedError(
            f"{file.path}: tensor {ROPE_FACTORS!r} beside rope scaling {rope['rope_type']!r}; expected 'none' or "
            "'linear'"
        )
    config.rope_parameters = divided(rope, factors.tolist(), config.max_position_embeddings)
