"""transformers models whose linears stay packed: `load_gguf` makes one from a GGUF file, a LlamaForCausalLM here and
others in `gguf_models`; `load_tokenizer` makes its tokenizer.

The module tree is transformers' own, built on the meta device; each `nn.Linear` is replaced by a
`QuantLinear` and the embedding by a `QuantEmbedding` as their tensors are read, so no dense weight
ever exists.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from lowbit.files import cut
from lowbit.formats import Format, as_format
from lowbit.integrations.gguf_keys import key, token_id
from lowbit.integrations.gguf_llama import (
    check_tensors,
    llama_config,
    rotary_embedding,
)
from lowbit.integrations.gguf_models import NEAREST, is_held, load_causal, warn_of_loss
from lowbit.integrations.memory import return_freed_memory
from lowbit.io.readers.gguf import GGUFFile
from lowbit.methods import quantize
from lowbit.nn import PackedModule, QuantEmbedding, QuantLinear
from lowbit.nn.surgery import replace
from lowbit.weights.quantized import QuantTensor


def load_gguf(
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype = torch.bfloat16,
    format: Format | str | None = None,
) -> PreTrainedModel:
    """Loads a GGUF file with its block-quantized weights packed as stored.

    A tied head shares the embedding's packed tensors. Tensors that the file holds dense (F16, BF16,
    F32) stay dense in `dtype`. Frequencies of the rotary embedding are divided by the file's
    factors (`rope_freqs.weight`) if it has them. All is read into memory: the file may change later.
    Of architectures other than llama, linears and embeddings of a type that no format holds are
    quantized anew to int8_g32, and a warning names them.

    Args:
        path: the file, or any part of a split one.
        dtype: of the activations, the norms and the rows that the embedding returns.
        format: requantize the linears of the layers to this format, one by one, of any type that
            package `gguf` knows; the embedding and the head stay as stored.

    Raises:
        FileNotFoundError, PermissionError: the file cannot be opened.
        ValueError: the file is damaged, or a part, a tensor or a key is missing.
        ImportError: accelerate is not installed, for an architecture other than llama.
        NotImplementedError: the architecture, a tensor type or a feature of the model is not
            supported.
    """
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"dtype must be float32, bfloat16 or float16, got {dtype}")
    target = None if format is None else as_format(format)
    file = GGUFFile(path)
    if file.metadata.get("general.architecture") != "llama":
        return load_causal(file, dtype, target)
    config = llama_config(file)
    config.dtype = dtype
    stored = check_tensors(file, config)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    lossy: dict[str, str] = {}
    for name, leaves in stored.items():
        requantized = target if "layers." in name and name.endswith("_proj") else None
        weight = leaves["weight"]
        if requantized is None and not is_held(file, weight):
            requantized, lossy[weight] = as_format(NEAREST), file.tensors[weight].type.name
        tensors = {leaf: _read(file, key, requantized) for leaf, key in leaves.items()}
        if name.endswith(("q_proj", "k_proj")):
            dim = model.model.layers[0].self_attn.head_dim
            tensors = {leaf: _unpermute(t, dim) for leaf, t in tensors.items()}
        _fill(model, name, tensors, dtype, requantized)
    if config.tie_word_embeddings:
        _tie_head(model)
    model.model.rotary_emb = rotary_embedding(file, config)  # the only buffers of the tree
    model.generation_config = GenerationConfig.from_model_config(config)
    warn_of_loss(file, lossy)
    return model.eval()


def load_tokenizer(path: str | os.PathLike[str]) -> PreTrainedTokenizerFast:
    """The tokenizer that a GGUF file carries, with its chat template.

    Bytes of a token that are not UTF-8 become escapes such as \\xff.

    Raises:
        FileNotFoundError, PermissionError: the file cannot be opened.
        ValueError: the file is damaged, has no tokenizer, or one that transformers cannot make.
    """
    file = GGUFFile(path)
    key(file, "tokenizer.ggml.model", str)
    tokens = key(file, "tokenizer.ggml.tokens", list)
    for name in ("bos", "eos", "unknown", "padding"):
        token_id(file, name, len(tokens))
    with tempfile.TemporaryDirectory() as folder:
        source = file.files[0] if file.plain else _plain_copy(file, Path(folder) / "plain.gguf")
        try:
            # Not AutoTokenizer: for the class name alone it parses the header once more, which
            # takes seconds.
            return PreTrainedTokenizerFast.from_pretrained(
                str(source.parent),
                gguf_file=source.name,
                local_files_only=True,
                trust_remote_code=False,
            )
        # Package tokenizers raises Exception itself.
        except Exception as e:
            raise ValueError(
                f"{path}: transformers cannot make its tokenizer: {type(e).__name__}: {cut(str(e))}"
            ) from e


def _plain_copy(file: GGUFFile, path: Path) -> Path:
    """Writes what a tokenizer is made of, without what other readers of GGUF refuse."""
    writer = gguf.GGUFWriter(path, str(file.metadata["general.architecture"]))
    copy_metadata(file, writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def copy_metadata(file: GGUFFile, writer: gguf.GGUFWriter, prefix: str = "tokenizer.") -> None:
    """Gives a writer that has written nothing yet those keys of a file that it has not."""
    for name, value in file.metadata.items():
        if not name.startswith(prefix) or any(name in known for known in writer.kv_data):
            continue
        if isinstance(value, str):
            writer.add_string(name, value)
        elif isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
        elif isinstance(value, np.ndarray):
            writer.add_array(name, value.tolist())
        elif isinstance(value, list) and all(isinstance(v, str) for v in value):
            writer.add_array(name, value)


def packed_modules(model: nn.Module) -> Iterator[tuple[str, PackedModule]]:
    """The modules of a model that hold packed weights, a tied head included."""
    for name, module in model.named_modules():
        if isinstance(module, PackedModule):
            yield name, module


def _read(file: GGUFFile, name: str, target: Format | None) -> QuantTensor | Tensor:
    """A tensor as stored; one that no format holds, if it is to be requantized, as its values."""
    return file[name] if target is None or is_held(file, name) else file.dequantized(name)


def _unpermute(tensor: QuantTensor | Tensor, head_dim: int) -> QuantTensor | Tensor:
    """Undoes llama.cpp's order of a head's rows: the two of a rotated pair are neighbours."""
    order = torch.arange(tensor.shape[0], dtype=torch.int64, device=tensor.device)
    rows = order.view(-1, head_dim // 2, 2).transpose(1, 2).flatten()
    if not isinstance(tensor, QuantTensor):
        return tensor[rows]
    # The second level of NVFP4 is of all rows.
    return tensor.map(lambda t: t[rows] if len(t) == len(rows) else t)


def _fill(
    model: nn.Module,
    name: str,
    tensors: dict[str, QuantTensor | Tensor],
    dtype: torch.dtype,
    target: Format | None,
) -> None:
    """Gives the module `name` its tensors, replacing it where they are packed."""
    module = model.get_submodule(name)
    weight, bias = tensors["weight"], tensors.get("bias")
    if isinstance(bias, QuantTensor):
        raise NotImplementedError(f"{name}.bias must be dense, got {bias}")
    if bias is None and getattr(module, "bias", None) is not None:
        # A file may leave out some of the biases that transformers has together.
        bias = torch.zeros(weight.shape[0], dtype=dtype, device="cpu")
    if target is not None:
        dense = weight.dequantize() if isinstance(weight, QuantTensor) else weight.float()
        weight = quantize(dense, target)
        del dense
        return_freed_memory()
    if not isinstance(weight, QuantTensor):
        module.register_parameter("weight", nn.Parameter(weight.to(dtype)))
        if bias is not None:
            module.register_parameter("bias", nn.Parameter(bias.to(dtype)))
        return
    made: PackedModule
    if isinstance(module, nn.Linear):
        made = QuantLinear.from_quant_tensor(weight, bias, dtype)
    elif isinstance(module, nn.Embedding):
        made = QuantEmbedding.from_quant_tensor(weight, dtype, module.padding_idx)
    else:
        raise NotImplementedError(f"{name}.weight must be dense, got {weight}")
    replace(model, name, made)
    made.set_weight_dtype(dtype)  # not that of the empty model


def _tie_head(model: LlamaForCausalLM) -> None:
    embedding = model.model.embed_tokens
    if isinstance(embedding, QuantEmbedding):
        head = QuantLinear.tied_to(embedding)
        replace(model, "lm_head", head)
        head.set_weight_dtype(embedding.dtype)
    else:
        model.lm_head.weight = embedding.weight
