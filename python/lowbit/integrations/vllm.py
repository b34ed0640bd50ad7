"""lowbit in vLLM: folders of lowbit (`quant_method` "lowbit"), and on CPUs integers of GPTQ, AWQ, compressed-tensors.

vLLM calls `register` in each of its processes: pyproject.toml names it in the entry points `vllm.general_plugins`.
Nothing is to be called or imported: `vllm serve FOLDER` is all.
"""

from __future__ import annotations

from lowbit.integrations.served_plugins import enter_all


def register() -> None:
    """Enters lowbit in vLLM's tables; again changes nothing. Of a vLLM that has other names than 0.32 and 0.33 it only
    warns: models of others shall run there.
    """
    enter_all("vLLM", ("lowbit.integrations.vllm_layers", "lowbit.integrations.vllm_integers"))
