"""Tensors of a GGUF file that hold the rows of several: llama.cpp's converter joins them if it is asked to.

Queries, keys and values are rows one after the other (--fuse-qkv), of each expert gates and what they multiply are
(--fuse-gate-up-exps).
"""

from __future__ import annotations

import re

from lowbit.io.readers.gguf import GGUFFile

_JOINED = {
    "attn_qkv": ("attn_q", "attn_k", "attn_v"),
    "ffn_gate_up_exps": ("ffn_gate_exps", "ffn_up_exps"),
}


def joined_in(file: GGUFFile, stored: str) -> tuple[str, list[str]] | None:
    """The tensor that holds the rows of `stored` among others, and the names of all that it holds, in their order.

    None if there is no such tensor, or one of these has a tensor of its own.
    """
    if (found := re.fullmatch(r"(blk\.\d+\.)(\w+)(\.(?:weight|bias))", stored)) is None:
        return None
    layer, own, leaf = found.groups()
    for joined, parts in _JOINED.items():
        names = [f"{layer}{part}{leaf}" for part in parts]
        whole = f"{layer}{joined}{leaf}"
        if own in parts and whole in file.tensors and file.tensors.keys().isdisjoint(names):
            return whole, names
    return None


def has(file: GGUFFile, stored: str) -> bool:
    """Whether a file holds a tensor, alone or in another one."""
    return stored in file.tensors or joined_in(file, stored) is not None
