"""Which modules a pattern means, and what is done with each of them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from lowbit.formats import Format, as_format


@dataclass(frozen=True)
class Rule:
    """What is done with the modules that a pattern means.

    Attributes:
        format: a Format or its name; None leaves the modules as they are.
        method: as in `lowbit.quantize`; None takes that of the call.
        options: further keywords of the method. Without a method here they are added to those of
            the call, and win over them.
    """

    format: Format | None
    method: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.format is not None:
            object.__setattr__(self, "format", as_format(self.format))

    def completed(self, method: str | None, options: Mapping[str, Any]) -> Rule:
        """The rule with the method and the options of the call where it has none of its own."""
        if self.method is not None:
            return self
        return replace(self, method=method, options={**options, **self.options})


Rules = Format | str | Mapping[str, "Rule | Format | str | None"]


class Selection:
    """The rule of every module name.

    A pattern is a regular expression that must match whole dotted components, anywhere in the name:
    "lm_head" means "lm_head" and "model.lm_head" and whatever lies below them, "layers.1" does not
    mean "layers.10", "mlp|self_attn" and r"layers\\.\\d\\.mlp" mean what they say, and
    r"^layers\\.1\\.up$" is one module alone.

    Args:
        rules: one format for every module, or patterns with their formats or `Rule`s, of which the
            first that matches counts; None leaves the module as it is, and so does no match.
        skip: patterns of modules that are left as they are.

    Raises:
        TypeError, ValueError: a pattern is not a string or not a regular expression; a format is
            unknown.
    """

    def __init__(self, rules: Rules, skip: Iterable[str] = ()) -> None:
        self.by_name = isinstance(rules, Mapping)
        if isinstance(skip, str):
            raise TypeError(f"skip must be a sequence of patterns, got the string {skip!r}")
        self._skip = [compile_pattern(pattern) for pattern in skip]
        given = rules.items() if isinstance(rules, Mapping) else [("(?s:.*)", rules)]
        self._rules = [(compile_pattern(pattern), as_rule(rule)) for pattern, rule in given]

    def skipped(self, name: str) -> bool:
        """Whether a module is left as it is, by its name."""
        return any(pattern.search(name) for pattern in self._skip)

    def rule(self, name: str) -> Rule:
        """What is done with the module `name`; its format is None if it is left as it is."""
        if self.skipped(name):
            return Rule(None)
        return next((rule for pattern, rule in self._rules if pattern.search(name)), Rule(None))

    def format(self, name: str) -> Format | None:
        """The format of the module `name`; None if it is left as it is."""
        return self.rule(name).format


def as_rule(rule: Rule | Format | str | None) -> Rule:
    """The rule that a format, its name, None or a Rule stands for."""
    return rule if isinstance(rule, Rule) else Rule(None if rule is None else as_format(rule))


def compile_pattern(pattern: str) -> re.Pattern[str]:
    """The expression that finds the modules a pattern means, by `search`.

    Raises:
        TypeError, ValueError: as `Selection`.
    """
    if not isinstance(pattern, str):
        raise TypeError(f"a pattern must be a string, got {pattern!r}")
    try:
        return re.compile(rf"(?:^|(?<=\.))(?:{pattern})(?=\.|$)")
    except re.error as e:
        raise ValueError(f"pattern {pattern!r} is not a regular expression: {e}") from None
