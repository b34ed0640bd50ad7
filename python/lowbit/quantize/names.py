"""Which modules a pattern means, and which format each of them gets."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from lowbit.formats import Format, as_format

Recipe = Format | str | Mapping[str, Format | str | None]


class Selection:
    """The format of every module name.

    A pattern is a regular expression that must match whole dotted components, anywhere in the name:
    "lm_head" means "lm_head" and "model.lm_head" and whatever lies below them, "layers.1" does not
    mean "layers.10", "mlp|self_attn" and r"layers\\.\\d\\.mlp" mean what they say.

    Args:
        recipe: one format for every module, or patterns with their formats, of which the first that
            matches counts; None leaves the module as it is, and so does no match.
        skip: patterns of modules that are left as they are.

    Raises:
        TypeError, ValueError: a pattern is not a string or not a regular expression; a format is
            unknown.
    """

    def __init__(self, recipe: Recipe, skip: Iterable[str] = ()) -> None:
        self.by_name = isinstance(recipe, Mapping)
        if isinstance(skip, str):
            raise TypeError(f"skip must be a sequence of patterns, got the string {skip!r}")
        self._skip = [compile_pattern(pattern) for pattern in skip]
        rules = recipe.items() if isinstance(recipe, Mapping) else [(".*", recipe)]
        self._rules = [
            (compile_pattern(pattern), None if format is None else as_format(format))
            for pattern, format in rules
        ]

    def skipped(self, name: str) -> bool:
        """Whether a module is left as it is, by its name."""
        return any(pattern.search(name) for pattern in self._skip)

    def format(self, name: str) -> Format | None:
        """The format of the module `name`; None if it is left as it is."""
        if self.skipped(name):
            return None
        return next((format for pattern, format in self._rules if pattern.search(name)), None)


def compile_pattern(pattern: str) -> re.Pattern[str]:
    """The regular expression that finds `pattern` in a dotted name, as `Selection` says."""
    if not isinstance(pattern, str):
        raise TypeError(f"a pattern must be a string, got {pattern!r}")
    try:
        return re.compile(rf"(?:^|(?<=\.))(?:{pattern})(?=\.|$)")
    except re.error as e:
        raise ValueError(f"pattern {pattern!r} is not a regular expression: {e}") from None
