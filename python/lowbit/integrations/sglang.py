"""lowbit in SGLang: folders of lowbit (`quant_method` "lowbit").

SGLang calls `register` in each of its processes: pyproject.toml names it in the entry points `sglang.srt.plugins`.
"""

from __future__ import annotations

import importlib


def register() -> None:
    """Enters lowbit in SGLang's tables; again changes nothing."""
    # Its modules have theirs as base classes.
    importlib.import_module("lowbit.integrations.sglang_layers").enter()
