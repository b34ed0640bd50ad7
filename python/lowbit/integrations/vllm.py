"""lowbit in vLLM: folders of lowbit (`quant_method` "lowbit"), and on CPUs integers of GPTQ, AWQ, compressed-tensors.

vLLM calls `register` in each of its processes: pyproject.toml names it in the entry points `vllm.general_plugins`.
Nothing is to be called or imported: `vllm serve FOLDER` is all.
"""

from __future__ import annotations

import importlib


def register() -> None:
    """Enters lowbit in vLLM's tables; again changes nothing."""
    # Its modules have theirs as base classes.
    importlib.import_module("lowbit.integrations.vllm_layers").enter()
    importlib.import_module("lowbit.integrations.vllm_integers").enter()
