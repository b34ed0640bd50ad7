"""What `lowbit info` says of this machine: versions, instruction sets, and which kernels its GPUs run, and why not."""

from __future__ import annotations

import importlib.metadata
from typing import Any

import torch

from lowbit.backends import available
from lowbit.backends.cpu.requests import isa_active, usable_threads


def machine() -> dict[str, Any]:
    """Facts of this machine, as JSON has them; a GPU's "cuda" and "triton" are None where the kernels run."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return {
        "lowbit": _version("lowbit"),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "isa": isa_active(),
        "threads": usable_threads(torch.get_num_threads()),
        "cuda": available.cuda_obstacle() if gpus == 0 else None,
        "gpus": [_gpu(torch.device("cuda", i)) for i in range(gpus)],
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpu(device: torch.device) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "architecture": f"sm_{properties.major}{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory": properties.total_memory,
        "cuda": available.cuda_obstacle(device),
        "triton": None if available.has_triton() else "triton is not installed",
    }


def as_text(found: dict[str, Any]) -> str:
    """`machine` in lines."""
    lines = [
        f"lowbit {found['lowbit'] or '(not installed)'}, torch {found['torch']}",
        f"CPU: {found['isa']}, {found['threads']} threads",
    ]
    for i, gpu in enumerate(found["gpus"]):
        size = gpu["memory"] / 2**30
        lines.append(
            f"GPU {i}: {gpu['name']}, {gpu['architecture']}, {gpu['multiprocessors']} multiprocessors, {size:.1f} GiB"
        )
        for kernels in ("cuda", "triton"):
            why = gpu[kernels]
            lines.append(f"  {kernels}: {'runs' if why is None else f'does not run: {why}'}")
    if not found["gpus"]:
        why = found["cuda"]
        built = "the CUDA kernels are built" if why is None else f"CUDA kernels: {why}"
        lines.append(f"no GPU that torch sees; {built}")
    return "\n".join(lines)
