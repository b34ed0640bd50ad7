"""`lowbit quantize --method gptq --help`: the help of the command, and then the options of that method."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

from typer.core import TyperCommand

_META = "lowbit.method"


class MethodHelp(TyperCommand):
    """A command whose help goes on with the options of the method that is named beside --help."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Notes the method before --help, which ends everything, is met."""
        ctx.meta[_META] = _method(args)
        left: list[str] = super().parse_args(ctx, args)
        return left

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """That of the command, and the method."""
        super().format_help(ctx, formatter)
        if (method := ctx.meta.get(_META)) and importlib.util.find_spec("torch"):
            print(text_of(method))


def _method(args: Sequence[str]) -> str | None:
    for i, arg in enumerate(args):
        if arg.startswith("--method="):
            return arg.partition("=")[2]
        if arg == "--method" and i + 1 < len(args):
            return args[i + 1]
    return None


def text_of(method: str) -> str:
    """What a method does and which KEY=VALUE its --option takes.

    Raises:
        ValueError: there is no such method.
    """
    from lowbit.methods.registry import check_options, describe
    from lowbit.ptq.scaling import SCALINGS

    if method in SCALINGS:
        return f"Method {method} folds scales into the layers before; it needs --calibrate."
    check_options(method, {})
    info = describe()[method]
    needs = {"needs": " It needs --calibrate.", True: " It learns from --calibrate or --imatrix."}
    lines = [f"Method {method}: {info.summary}{needs.get(info.calibrates, '')}"]
    lines += [f"  --option {key}={default}" for key, default in info.options.items()]
    return "\n".join(lines if info.options else [*lines, "  It has no options."])
