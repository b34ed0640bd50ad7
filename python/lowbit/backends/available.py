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
_HAS_TRITON = importlib.util.find_spec("triton") is not None


def cuda_obstacle() -> str | None:
    """Why the CUDA kernels do not run; None if they are built and LOWBIT_CUDA=0 was not set at import."""
    return _CUDA_OBSTACLE


def has_triton() -> bool:
    """Whether the Triton kernels can run."""
    return _HAS_TRITON


def kernel_layout(device: torch.device, format: Format) -> str:
    """The layout that the kernels of a device read for a format."""
    if device.type == "cpu":
        return N16 if _n16.fits(format) else ROWS
    if device.type != "cuda" or not LAYOUTS[K16].fits(format):
        return CANONICAL
    if cuda_obstacle() is None and _m16.fits(format):
        return M16
    return K16 if has_triton() else CANONICAL


def kernel_weight(qt: QuantTensor) -> KernelWeight:
    """The weight in the layout of the kernels of its device.

    Raises:
        ValueError: the columns of outliers are not ascending or not in the row.
    """
    layout = kernel_layout(qt.device, qt.format)
    if qt.device.type == "cuda":
        _log_layout(layout)
    return to_kernel(qt, layout)


@functools.cache
def _log_layout(layout: str) -> None:
    why = cuda_obstacle() or "the CUDA kernels do not know the format"
    why = "" if layout == M16 else f": {why}"
    _logger.info("weights on the GPU take the layout %s%s", layout, why)
