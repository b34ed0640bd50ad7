"""lowbit in SGLang: folders of lowbit (`quant_method` "lowbit").

SGLang calls `register` in each of its processes: pyproject.toml names it in the entry points `sglang.srt.plugins`.
"""

from __future__ import annotations

from lowbit.integrations.served_plugins import enter_all


def register() -> None:
    """Enters lowbit in SGLang's tables; again changes nothing. Of an SGLang that has other names than 0.5 it only
    warns: models of others shall run there.
    """
    enter_all("SGLang", ("lowbit.integrations.sglang_layers",))
