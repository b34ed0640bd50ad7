"""Processes that run checks of packed weights together, and the layers and tiny models of these."""

from __future__ import annotations

import copy
import datetime
import json
import multiprocessing
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

import lowbit
from lowbit.formats import parse
from lowbit.nn import PackedModule, QuantLinear
from weights import random_weight

WORLD = 4
FORMATS = (
    "nf4_g32", "uint4_g32", "kmeans3_pr", "km3x2", "q4_k", "nvfp4", "e4m3", "nf4_g32_dq8", "int4_g32_o3",
    "int2_g32_r4int4", "ternary_trits_g32", "vq8_d4", "int4",
)  # fmt: skip
N, K = 42, 192  # rows: 21 and 21, or 11, 11, 11 and 9
BASE = {
    "vocab_size": 50, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 8,
    "num_key_value_heads": 4, "max_position_embeddings": 32, "pad_token_id": 0,
}  # fmt: skip
RULES = {"embed_tokens|lm_head": "int8_g32", ".*": "int4_g32"}
MIXED = {
    "embed_tokens|lm_head": "int8_g32", "q_proj": "nf4_g32_dq8", "k_proj": "nvfp4", "up_proj": "km4",
    "down_proj": "int2_g32_r4",
    ".*": "int4_g32_o2",
}  # fmt: skip
IDS = torch.arange(1, 8)[None]
NEAR = 1e-5


def near(found: Tensor, want: Tensor) -> bool:
    return bool((found - want).abs().max() <= NEAR * want.abs().max())


def linear(format: str, n: int = N, k: int = K, bias: bool = False, seed: int = 0) -> QuantLinear:
    b = torch.randn(n, generator=torch.Generator().manual_seed(seed)) if bias else None
    return QuantLinear.from_quant_tensor(random_weight(parse(format), n, k, seed), b)


def model(kind: str = "Llama", rules: Any = RULES, **more: Any) -> Any:
    key = repr((kind, rules, more))
    _made[key] = _made.get(key) or make_model(kind, rules, **more)
    return copy.deepcopy(_made[key])


_made: dict[str, Any] = {}


def make_model(kind: str, rules: Any, **more: Any) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**BASE, **more})
    made = getattr(transformers, f"{kind}ForCausalLM")(config).eval().requires_grad_(False)
    if rules:
        lowbit.quantize_model(made, rules, skip=(), progress=False)
    return made


def logits(m: Any) -> Tensor:
    return m(input_ids=IDS).logits


def greedy(m: Any) -> list[int]:
    mask = torch.ones_like(IDS)
    return m.generate(IDS, attention_mask=mask, max_new_tokens=6, do_sample=False)[0].tolist()


def packed_bytes(m: nn.Module) -> int:
    """Of what is packed here; a weight that is shared counts once."""
    layers = {id(layer._buffers): layer for layer in m.modules() if isinstance(layer, PackedModule)}
    return sum(layer.own_part().nbytes for layer in layers.values())


def nbytes(m: nn.Module) -> int:
    """Of all parameters and buffers here."""
    tensors = [
        t.to_local() if isinstance(t, DTensor) else t for t in (*m.parameters(), *m.buffers())
    ]
    return sum(t.nbytes for t in tensors if not t.is_meta)


def raises(kind: type[Exception], message: str, call: Callable[[], Any]) -> None:
    with pytest.raises(kind, match=message):
        call()


class Context:
    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.mesh = init_device_mesh("cpu", (WORLD,))
        self.pairs = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))["tp"]
        self.meshes = (self.pairs, self.mesh)


def run_checks(rank: int, folder: str, checks: dict[str, Callable[[Context], None]]) -> None:
    """One of the processes: writes what went wrong in each check to a file of its own."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD))
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=WORLD,
        timeout=datetime.timedelta(seconds=60),
    )
    context, failed = Context(folder), {}
    for name, check in checks.items():
        try:
            check(context)
        except BaseException:
            failed[name] = traceback.format_exc()
            break  # others wait for this rank
    Path(folder, f"rank{rank}.json").write_text(json.dumps(failed))
    if failed:
        os._exit(1)
    dist.destroy_process_group()


def failures_of(folder: Path, checks: dict[str, Callable[[Context], None]]) -> list[dict[str, str]]:
    """What went wrong in each check, on each rank; after the first failure none is run."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["torch", "transformers.models.mixtral.modeling_mixtral", "lowbit.integrations.plans"]
    )
    ranks = [
        context.Process(target=run_checks, args=(r, str(folder), checks)) for r in range(WORLD)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(300)
        process.kill()
    files = [folder / f"rank{r}.json" for r in range(WORLD)]
    return [json.loads(f.read_text()) if f.exists() else {"": "no result"} for f in files]
