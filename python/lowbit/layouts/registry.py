"""The layouts by name."""

from __future__ import annotations

from lowbit.formats import Format
from lowbit.layouts.base import Layout
from lowbit.layouts.canonical import CanonicalLayout
from lowbit.layouts.k16 import K16Layout
from lowbit.layouts.m16 import M16Layout
from lowbit.layouts.n16 import N16Layout
from lowbit.layouts.rows import RowsLayout

LAYOUTS: dict[str, Layout] = {
    each.name: each
    for each in (CanonicalLayout(), N16Layout(), K16Layout(), M16Layout(), RowsLayout())
}


def find(name: str) -> Layout:
    """The layout of a name.

    Raises:
        ValueError: there is none.
    """
    if name not in LAYOUTS:
        raise ValueError(f"layout must be one of {tuple(LAYOUTS)}, got {name!r}")
    return LAYOUTS[name]


def fitting(format: Format) -> tuple[str, ...]:
    """Names of the layouts that weights of a format can take."""
    return tuple(name for name, layout in LAYOUTS.items() if layout.fits(format))
