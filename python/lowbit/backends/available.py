"""Which kernels can run here, found once, and the layout that they read."""

from __future__ import annotations

import functools
import importlib.util
import logging
import os

import torch

from lowbit.formats import Format
from lowbit.layouts import CANONICAL, K16, LAYOUTS, M16, N16, ROWS, KernelWeight, to_kernel
from lowbit.weights.quantized import QuantTensor

_logger = logging.getLogger("lowbit")
_m16, _n16 = LAYOUTS[M16], LAYOUTS[N16]


def _find_cuda_obstacle() -> str | None:
    if importlib.util.find_spec("lowbit._cuda") is None:
        return "the package was built without its CUDA kernels"
    return "LOWBIT_CUDA=0 is set" if os.environ.get("LOWBIT_CUDA") == "0" else None


# Found once: torch.compile cannot look for modules.
_CUDA_OBSTACLE = _find_cuda_obstacle()
_PROBED: dict[int, tuple[str | None, int]] = {}
_HAS_TRITON = importlib.util.find_spec("triton") is not None


def cuda_obstacle(device: torch.device | None = None) -> str | None:
    """Why the CUDA kernels do not run on a GPU, by default the current one: they are not built, LOWBIT_CUDA=0 was set
    at import, or the driver or the GPU cannot load them. None if they run, or would if there were a GPU.
    """
    if _CUDA_OBSTACLE is not None:
        return _CUDA_OBSTACLE
    index = None if device is None else device.index
    if index is None:
        if not torch.cuda.is_available():
            return None
        index = torch.cuda.current_device()
    return _probe(index)[0]


def cuda_code(device: torch.device) -> int:
    """The architecture (90 for sm_90) that the CUDA kernels which run on a GPU were compiled for: an older one than the
    GPU's if the driver translates them.
    """
    return _probe(device.index or 0)[1]


@torch.compiler.assume_constant_result
def _probe(index: int) -> tuple[str | None, int]:
    """What `_cuda.probe` says of a GPU, asked once."""
    if index not in _PROBED:
        from lowbit import _cuda

        _PROBED[index] = _cuda.probe(index)
        if _PROBED[index][0] is not None:
            _logger.warning("the CUDA kernels do not run on GPU %d: %s", index, _PROBED[index][0])
    return _PROBED[index]


def has_triton() -> bool:
    """Whether the Triton kernels can run."""
    return _HAS_TRITON


def kernel_layout(device: torch.device, format: Format) -> str:
    """The layout that the kernels of a device read for a format."""
    if device.type == "cpu":
        return N16 if _n16.fits(format) else ROWS
    if device.type != "cuda" or not LAYOUTS[K16].fits(format):
        return CANONICAL
    if _m16.fits(format) and cuda_obstacle(device) is None:
        return M16
    return K16 if has_triton() else CANONICAL


def kernel_weight(qt: QuantTensor) -> KernelWeight:
    """The weight in the layout of the kernels of its device.

    Raises:
        ValueError: the columns of outliers are not ascending or not in the row.
    """
    layout = kernel_layout(qt.device, qt.format)
    if qt.device.type == "cuda":
        _log_layout(layout, None if layout == M16 else cuda_passed_over(qt.device, qt.format))
    return to_kernel(qt, layout)


def passed_over(device: torch.device, format: Format, layout: str) -> tuple[tuple[str, str], ...]:
    """Kernels of a GPU that do not serve a layout, and why."""
    if device.type != "cuda" or layout == M16:
        return ()
    found = [("cuda", cuda_passed_over(device, format))]
    if layout != K16 and not has_triton():
        found.append(("triton", "triton is not installed"))
    elif layout != K16:
        found.append(("triton", f"its kernels do not know the format {format.name}"))
    return tuple(found)


def cuda_passed_over(device: torch.device, format: Format) -> str:
    """Why a weight on a GPU is not left to the CUDA kernels."""
    return cuda_obstacle(device) or f"they do not know the format {format.name}"


@functools.cache
def _log_layout(layout: str, why: str | None) -> None:
    said = "" if why is None else f": the CUDA kernels do not run, {why}"
    _logger.info("weights on the GPU take the layout %s%s", layout, said)
