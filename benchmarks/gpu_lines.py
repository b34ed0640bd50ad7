"""What gpu.py writes: a line of JSON as soon as something is known, since the time on a GPU may end at any moment, and
results/gpu.json from these lines alone.
"""

from __future__ import annotations

import json
import os
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TextIO

Line = dict[str, Any]


class Part(NamedTuple):
    """A part of a run: its name, the seconds that it may take, and what gives its lines one by one."""

    name: str
    seconds: float
    run: Callable[[], Iterable[Line]]


def write(file: TextIO, line: Line) -> None:
    """Writes a line so that it is on disk when this returns."""
    file.write(json.dumps(line, sort_keys=True) + "\n")
    file.flush()
    os.fsync(file.fileno())


def run(
    parts: Iterable[Part], file: TextIO, clock: Callable[[], float] = time.monotonic
) -> list[str]:
    """Runs the parts in order and writes their lines, with the part and the second; names those that failed.

    A part that has taken its time is cut after the line at hand, and one that raises ends with a line that says what;
    the next part follows.
    """
    begin, failed = clock(), []
    for part in parts:
        end = clock() + part.seconds
        about: Line = {}
        try:
            lines: Iterator[Line] = iter(part.run())
            for line in lines:
                write(file, {"part": part.name, "at": round(clock() - begin, 2), **line})
                if clock() > end:
                    about = {"cut": True}
                    break
        except Exception as error:
            failed.append(part.name)
            about = {"failed": str(error)[:300], "traceback": traceback.format_exc()[-1500:]}
        write(file, {"part": part.name, "at": round(clock() - begin, 2), "ended": True, **about})
    return failed


def read(path: Path) -> list[Line]:
    """The lines of a run; the last one may have been cut off in the middle."""
    found = []
    texts = path.read_text().splitlines()
    for i, text in enumerate(texts):
        try:
            found.append(json.loads(text))
        except json.JSONDecodeError:
            if i + 1 < len(texts):
                raise ValueError(
                    f"line {i + 1} of {path} must be JSON, got {text[:80]!r}"
                ) from None
    return found


def of_part(lines: list[Line], part: str) -> list[Line]:
    """What a part said, without the part and the time."""
    own = [line for line in lines if line["part"] == part and "ended" not in line]
    return [{k: v for k, v in line.items() if k not in ("part", "at")} for line in own]


def collect(lines: list[Line]) -> dict[str, Any]:
    """results/gpu.json of the lines of a run.

    Raises:
        ValueError: the run did not come as far as to say which machine it is.
    """
    about = of_part(lines, "machine")
    if not about:
        raise ValueError("the lines must begin with those of the part machine, got none")
    ended = {line["part"]: line for line in lines if "ended" in line}
    cut = [name for name, line in ended.items() if "cut" in line or "failed" in line]
    sweep = of_part(lines, "sweep")
    return {
        **{k: v for line in about for k, v in line.items()},
        "checks": of_part(lines, "checks"),
        "sanitizer": of_part(lines, "sanitizer"),
        "results": [line for line in sweep if "config" not in line],
        "candidates": [line for line in sweep if "config" in line],
        "fp8": of_part(lines, "fp8"),
        "decode": of_part(lines, "decode"),
        "eager": of_part(lines, "eager"),
        "incomplete": cut,
    }


def best(timed: list[Line], count: int = 3) -> list[Line]:
    """The fastest of what was right."""
    return sorted((t for t in timed if "us" in t), key=lambda t: t["us"])[:count]
