"""Which modules a pattern means, and what is done with each of them."""

from __future__ import annotations

import importlib
import math
import re
import sys
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from lowbit.formats import FORMATS, Format, as_format
from lowbit.text import printable

# The parser of `re`, whose tree tells in how many ways a pattern can match.
_sre: Any = importlib.import_module("re._parser" if sys.version_info >= (3, 11) else "sre_parse")

DEFAULT_SKIP = ("lm_head",)
# A file does not say which module a matrix belongs to; these are the names of heads, embeddings and
# norms in the models of transformers.
FILE_SKIP = (
    "lm_head",
    r"\w*embed\w*",
    "wte|wpe|shared|relative_attention_bias",
    r"\w*norm\w*|ln_\w+",
)
# A repetition without an end counts as one of so many times: several share the letters of a name.
_LENGTH = 32
_MOST_WAYS = 10**7
_SHOWN = 8


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
        TypeError, ValueError: a pattern is not what `compile_pattern` takes; a format is unknown.
    """

    def __init__(self, rules: Rules, skip: Iterable[str] = ()) -> None:
        self.by_name = isinstance(rules, Mapping)
        if isinstance(skip, str):
            raise TypeError(f"skip must be a sequence of patterns, got the string {skip!r}")
        skipping = compile_patterns(skip)
        given = rules if isinstance(rules, Mapping) else {"(?s:.*)": rules}
        compiled = {pattern: compile_pattern(pattern) for pattern in given}
        self._skip = list(skipping.values())
        self._rules = [(compiled[pattern], as_rule(rule)) for pattern, rule in given.items()]
        self._patterns = {"skip": skipping, "the recipe": compiled if self.by_name else {}}

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

    def warn_unmatched(self, names: Iterable[str], stacklevel: int = 2) -> None:
        """Warns of the patterns that match none of these names."""
        every = list(names)
        for where, patterns in self._patterns.items():
            warn_unmatched(where, patterns, every, stacklevel + 1)


def rules_of(format: Rules | None, bits: int | None = None, group_size: int | None = None) -> Rules:
    """The rules that are given as a format, or as other libraries take them: as bits of integers and a group.

    Args:
        format: as of `Selection`; None with `bits`.
        bits: 2, 3, 4, 5, 6 or 8, of symmetric integers.
        group_size: weights that share a scale, in place of those of the format; -1 for a row.

    Raises:
        TypeError, ValueError: both or none of `format` and `bits` are given, a number is out of range, or there is a
            `group_size` and a recipe.
    """
    if (format is None) == (bits is None):
        raise ValueError(
            f"give a format, as 'nf4', or bits: got {'neither' if format is None else 'both'}"
        )
    if bits is not None:
        known = [f.bits for name, f in FORMATS.items() if name == f"int{f.bits}"]
        if isinstance(bits, bool) or bits not in known:
            raise ValueError(f"bits must be one of {known}, got {bits!r}")
        format = f"int{bits}"
    if group_size is None:
        return format  # type: ignore[return-value]
    if isinstance(format, Mapping):
        raise ValueError(
            "group_size is for one format: in a recipe each has its own, as 'int4_g64'"
        )
    if (
        isinstance(group_size, bool)
        or not isinstance(group_size, int)
        or group_size < -1
        or not group_size
    ):
        raise ValueError(
            f"group_size must be a positive integer, or -1 for a row, got {group_size!r}"
        )
    found = as_format(format)  # type: ignore[arg-type]
    base = re.sub(r"_(?:g\d+|row)(?=_|$)", "", found.name)
    group, suffix = (None, "row") if group_size == -1 else (group_size, f"g{group_size}")
    return replace(found, name=f"{base}_{suffix}", group=group)


def skip_of(
    skip: Iterable[str] | None, modules_to_not_convert: Iterable[str] | None
) -> Iterable[str]:
    """What is skipped, by either name of the argument; by default the head.

    Raises:
        ValueError: both are given.
    """
    if skip is not None and modules_to_not_convert is not None:
        raise ValueError("give skip or modules_to_not_convert, which is the same, not both")
    given = modules_to_not_convert if skip is None else skip
    return DEFAULT_SKIP if given is None else given


def as_rule(rule: Rule | Format | str | None) -> Rule:
    """The rule that a format, its name, None or a Rule stands for."""
    return rule if isinstance(rule, Rule) else Rule(None if rule is None else as_format(rule))


def compile_patterns(skip: Iterable[str]) -> dict[str, re.Pattern[str]]:
    """The expressions of a sequence of patterns, by pattern.

    Raises:
        TypeError, ValueError: as `compile_pattern`, or it is one string.
    """
    if isinstance(skip, str):
        raise TypeError(f"skip must be a sequence of patterns, got the string {skip!r}")
    return {pattern: compile_pattern(pattern) for pattern in skip}


def compile_pattern(pattern: str) -> re.Pattern[str]:
    """The expression that finds the modules a pattern means, by `search`.

    Raises:
        TypeError: the pattern is not a string.
        ValueError: it is not a regular expression, or one that can take longer than any name is
            worth: repeated within a repetition, `(a+)+`, or with too many choices in a row.
    """
    if not isinstance(pattern, str):
        raise TypeError(f"a pattern must be a string, got {pattern!r}")
    try:
        ways = _ways(_sre.parse(pattern))
        if ways <= _MOST_WAYS:
            return re.compile(rf"(?:^|(?<=\.))(?:{pattern})(?=\.|$)")
    except (re.error, OverflowError, RecursionError) as e:
        raise ValueError(f"pattern {pattern!r:.200} is not a regular expression: {e}") from None
    what = "one within another" if ways == math.inf else "too many in a row"
    raise ValueError(
        f"pattern {pattern!r:.200} could take very long: it has repetitions or choices, {what}"
    )


def _ways(parsed: Any) -> float:
    """At most in how many ways a pattern can match one text, which bounds the time of a search.

    A repetition of what matches in one way alone has one way for each number of times.
    """
    ways = 1.0
    for operator, argument in parsed:
        name = str(operator)
        if name == "BRANCH":
            ways *= sum(_ways(branch) for branch in argument[1])
        elif name == "SUBPATTERN":
            ways *= _ways(argument[-1])
        elif name in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"):
            least, most, body = argument
            inner = _ways(body)
            if most > 1 and inner > 1:
                return math.inf
            ways *= 1 + inner * min(int(most) - least, _LENGTH) if inner == 1 else 1 + inner
        elif name in ("ASSERT", "ASSERT_NOT"):
            ways *= _ways(argument[1])
        elif name == "ATOMIC_GROUP":
            ways *= _ways(argument)
        elif name == "GROUPREF_EXISTS":
            ways *= sum(_ways(branch) for branch in argument[1:] if branch is not None)
    return ways


def warn_unmatched(
    where: str, patterns: Mapping[str, re.Pattern[str]], names: Iterable[str], stacklevel: int = 2
) -> None:
    """Warns of patterns that match none of the names, but for those of the default `skip`."""
    rest = {text: p for text, p in patterns.items() if text not in {*DEFAULT_SKIP, *FILE_SKIP}}
    for name in names:
        for text in [text for text, p in rest.items() if p.search(name)]:
            del rest[text]
        if not rest:
            return
    if rest:
        warnings.warn(
            f"{where} has patterns that match nothing in the model: {listed(map(repr, rest))}",
            stacklevel=stacklevel + 1,
        )


def listed(texts: Iterable[str]) -> str:
    """The first few of some texts, and how many more there are."""
    every = [printable(text) for text in texts]
    more = f" and {len(every) - _SHOWN} more" if len(every) > _SHOWN else ""
    return ", ".join(every[:_SHOWN]) + more
