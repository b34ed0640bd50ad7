"""Recipes: patterns of module names with the format, method and options of each, and their files.

A file is TOML, or JSON with the same content; order counts. "dense" leaves modules as they are.

    version = 1
    [rules]
    'layers\\.0' = "int8"
    self_attn = { format = "kmeans3_g64", method = "gptq", options = { act_order = true } }
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lowbit.files import write_atomically
from lowbit.formats import Format
from lowbit.methods.registry import check_options
from lowbit.nn.names import Rule, as_rule, compile_pattern

VERSION = 1
_DENSE = "dense"
_KEYS = {"format", "method", "options"}


class Recipe(Mapping[str, Rule]):
    """Patterns with their rules, in the order in which they are tried: `lowbit.ptq.Selection`.

    Args:
        rules: pattern: a Format or its name, None to leave modules as they are, or a `Rule`.

    Raises:
        TypeError, ValueError: a pattern is not a string or not a regular expression, a format or a
            method is unknown, a method has no such option; the message names the pattern.
    """

    def __init__(self, rules: Mapping[str, Rule | Format | str | None]) -> None:
        self._rules: dict[str, Rule] = {}
        for pattern, given in rules.items():
            compile_pattern(pattern)
            try:
                rule = as_rule(given)
                if rule.format is None and (rule.method is not None or rule.options):
                    raise ValueError("modules that are left dense take no method and no options")
                if rule.method is not None:
                    check_options(rule.method, rule.options)
            except (TypeError, ValueError) as e:
                raise type(e)(f"pattern {pattern!r}: {e}") from e
            self._rules[pattern] = rule

    def __getitem__(self, pattern: str) -> Rule:
        return self._rules[pattern]

    def __iter__(self) -> Iterator[str]:
        return iter(self._rules)

    def __len__(self) -> int:
        return len(self._rules)

    def __repr__(self) -> str:
        return f"Recipe({self._rules!r})"

    def __eq__(self, other: object) -> bool:
        # Unlike that of dicts: the first pattern that matches counts.
        return isinstance(other, Recipe) and list(self.items()) == list(other.items())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Recipe:
        """Reads a file that ends in ".toml" or ".json".

        Raises:
            FileNotFoundError: it is not there.
            ImportError: it is TOML, Python is 3.10 and tomli is not installed.
            ValueError: it is not what the module says; the message names the file, and the line or
                the pattern.
        """
        file = Path(path)
        parse = _parser(file)
        try:
            content = parse(file.read_text(encoding="utf-8"))
            return cls(_rules(content))
        except (TypeError, ValueError, RecursionError) as e:
            raise ValueError(f"{file}: {e}") from e

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a file that `load` reads, as TOML if it ends in ".toml", as JSON if in ".json". An
        old file stays until the new one is complete.

        Raises:
            ValueError: the path ends in something else, or an option is no bool, string or finite
                number.
        """
        file = Path(path)
        _parser(file)
        for pattern, rule in self.items():
            for key, value in rule.options.items():
                if not isinstance(value, (bool, int, float, str)) or not _finite(value):
                    raise ValueError(
                        f"pattern {pattern!r}: option {key} must be a bool, a string or a finite "
                        f"number to be written, got {value!r}"
                    )
        rules = {pattern: _entry(rule) for pattern, rule in self.items()}
        if file.suffix == ".json":
            text = json.dumps({"version": VERSION, "rules": rules}, indent=2) + "\n"
        else:
            lines = (f"{_toml(pattern)} = {_toml(entry)}\n" for pattern, entry in rules.items())
            text = f"version = {VERSION}\n\n[rules]\n" + "".join(lines)
        write_atomically(file, lambda f: f.write(text.encode()))


def _parser(file: Path) -> Any:
    if file.suffix == ".json":
        return _parse_json
    if file.suffix == ".toml":
        return _parse_toml
    raise ValueError(f"a recipe must end in .toml or .json, got {str(file)!r}")


def _parse_toml(text: str) -> object:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        try:
            import tomli as tomllib
        except ModuleNotFoundError:
            raise ImportError(
                "tomli is not installed; before Python 3.11 recipes in TOML need: "
                "pip install 'lowbit[recipes]'"
            ) from None
    return tomllib.loads(text)


def _parse_json(text: str) -> object:
    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        found: dict[str, object] = {}
        for key, value in pairs:
            if key in found:
                raise ValueError(f"{key!r} comes twice")
            found[key] = value
        return found

    return json.loads(text, object_pairs_hook=unique)


def _rules(content: object) -> dict[str, Rule]:
    if not isinstance(content, dict) or content.keys() != {"version", "rules"}:
        got = sorted(content) if isinstance(content, dict) else content
        raise ValueError(f"a recipe must hold 'version' and 'rules', got {got!r:.100}")
    if content["version"] != VERSION:
        raise ValueError(f"version must be {VERSION}, got {content['version']!r:.100}")
    if not isinstance(content["rules"], dict):
        raise ValueError(f"'rules' must be patterns with values, got {content['rules']!r:.100}")
    return {pattern: _rule(pattern, entry) for pattern, entry in content["rules"].items()}


def _rule(pattern: str, entry: object) -> Rule:
    given = {"format": entry} if isinstance(entry, str) else entry
    if not isinstance(given, dict) or not isinstance(given.get("format"), str):
        raise ValueError(
            f"pattern {pattern!r} must have a format, a string or {{format = ...}}, got {entry!r:.100}"
        )
    if unknown := sorted(given.keys() - _KEYS):
        raise ValueError(f"pattern {pattern!r} has the unknown keys {unknown}, not {sorted(_KEYS)}")
    method, options = given.get("method"), given.get("options", {})
    if not isinstance(method, (str, type(None))) or not isinstance(options, dict):
        raise ValueError(
            f"pattern {pattern!r}: method must be a string and options keywords with values, "
            f"got {method!r:.50} and {options!r:.100}"
        )
    try:
        format: Any = None if given["format"] == _DENSE else given["format"]
        return Rule(format, method, options)
    except (TypeError, ValueError) as e:
        raise ValueError(f"pattern {pattern!r}: {e}") from e


def _entry(rule: Rule) -> str | dict[str, Any]:
    """What stands for a rule in a file."""
    format = _DENSE if rule.format is None else rule.format.spec
    entry: dict[str, Any] = {"format": format}
    if rule.method is not None:
        entry["method"] = rule.method
    if rule.options:
        entry["options"] = dict(rule.options)
    return format if len(entry) == 1 else entry


def _finite(value: bool | int | float | str) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{_toml(k)} = {_toml(v)}" for k, v in value.items()) + " }"
    if isinstance(value, str) and "\\" in value and "'" not in value and value.isprintable():
        return f"'{value}'"  # no escapes inside: patterns stay as they are
    # Strings, numbers and booleans are those of JSON, but that TOML escapes DEL and no surrogates.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
