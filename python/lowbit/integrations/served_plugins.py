"""What entry points of serving programs call: it enters lowbit in their tables, or warns why it cannot."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Sequence

_logger = logging.getLogger("lowbit")


def enter_all(program: str, modules: Sequence[str]) -> None:
    """Calls `enter` of modules that have classes of a program as bases.

    A program calls every plugin whatever it is to serve. One whose names are others must not end for that; a model of
    lowbit it then refuses itself, as of a quantization that it does not know.

    Args:
        program: its name.
        modules: dotted names; all are imported before anything is entered.
    """
    try:
        found = [importlib.import_module(name) for name in modules]
    except ImportError as e:
        _logger.warning("lowbit is not registered in this version of %s: %s", program, e)
        return
    for module in found:
        module.enter()
