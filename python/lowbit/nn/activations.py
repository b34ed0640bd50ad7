"""`set_activations`: packed linears of a model that multiply int8, or x as it is given."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from lowbit import format_names
from lowbit.formats import Format
from lowbit.nn.llm_int8 import LLMInt8Linear
from lowbit.nn.names import DEFAULT_SKIP, compile_patterns
from lowbit.nn.product import PackedProduct


def set_activations(
    model: nn.Module, activations: str | None, *, skip: Iterable[str] = DEFAULT_SKIP
) -> int:
    """Changes what the packed linears of a model take x as, and nothing of their weights; all of them or none.

    It holds at every number of rows: what a token gets does not depend on whether it was part of a prompt. Time is
    saved where many rows meet a weight, in prompts and batches; a single row waits for the weight to be read.

    Args:
        model: with packed linears and convolutions. Those with groups of channels, and those that are the exact part
            of an LLMInt8Linear, keep what they have.
        activations: None takes x as it is given. "int8" quantizes each row of x by absmax / 127, "int8_b32" each 32
            values of a row; another number must divide the groups of the weights or be a multiple of them.
            "int8_table" and "int8_table_b32" also round tables to int8 that are not exact there.
        skip: patterns of modules that stay as they are, as in `quantize_model`.

    Returns:
        The number of layers.

    Raises:
        ValueError: `activations` is another word, there is no such layer, or one cannot: its table is not exact in
            int8, or its groups and the blocks of x do not fit each other. The message names it.

    Example:
        >>> model = lowbit.load_model("model.gguf")  # doctest: +SKIP
        >>> lowbit.nn.set_activations(model, "int8_b32")  # doctest: +SKIP
    """
    kind, group = (None, None) if activations is None else format_names.activation_of(activations)
    patterns = compile_patterns(skip).values()
    inner = {id(m.quantized) for m in model.modules() if isinstance(m, LLMInt8Linear)}
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, PackedProduct)
        and getattr(module, "groups", 1) == 1
        and id(module) not in inner
        and not any(pattern.search(name) for pattern in patterns)
    }
    if not found:
        raise ValueError("model must have packed layers that are not skipped, got none")
    for name, module in found.items():
        try:
            module.check_activations(_kind_for(kind, module.format), group)
        except ValueError as e:
            raise ValueError(f"{name}: {e}") from None
    for module in found.values():
        module.set_activations(_kind_for(kind, module.format), group)
    return len(found)


def _kind_for(kind: str | None, format: Format) -> str | None:
    """A table is rounded only where it must be."""
    return "int8" if kind == "int8_table" and format.int8_step is not None else kind
