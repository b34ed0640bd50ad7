"""Which backend serves a device and a layout: a `base.Backend` for each."""

from __future__ import annotations

import functools

from lowbit.backends.base import Backend
from lowbit.backends.cpu import CPU, STRUCTURED
from lowbit.backends.cuda import CUDA
from lowbit.backends.pytorch import PYTORCH
from lowbit.backends.triton import TRITON
from lowbit.layouts import CANONICAL, K16, M16, N16, ROWS

_BACKENDS: dict[tuple[str, str], Backend] = {
    ("cpu", N16): CPU,
    ("cpu", ROWS): STRUCTURED,
    ("cpu", CANONICAL): PYTORCH,
    ("cpu", K16): TRITON,  # under Triton's interpreter
    ("cuda", K16): TRITON,
    ("cuda", M16): CUDA,
    ("cuda", CANONICAL): PYTORCH,
}


@functools.cache
def find(device_type: str, layout: str) -> Backend:
    """The backend for a device type and a layout.

    Raises:
        ValueError: no backend reads this layout on this device.
    """
    try:
        return _BACKENDS[device_type, layout]
    except KeyError:
        layouts_here = [lay for dev, lay in _BACKENDS if dev == device_type]
        raise ValueError(
            f"layout must be one of {layouts_here} on device {device_type!r}, got {layout!r}"
        ) from None


def of_device(device_type: str) -> Backend:
    """The backend for what depends on no layout: packing, and quantizing activations."""
    return CPU if device_type == "cpu" else PYTORCH
