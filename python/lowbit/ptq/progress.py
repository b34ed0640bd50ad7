"""A progress bar on stderr by rich or tqdm, whichever is installed; in a notebook by tqdm, if it can."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def bar(total: int, description: str, shown: bool) -> Iterator[Callable[[], object]]:
    """Gives a function to call once per item done; without rich and tqdm there is no bar."""
    tqdm_there = importlib.util.find_spec("tqdm") is not None
    if shown and importlib.util.find_spec("rich") and not (tqdm_there and _in_notebook()):
        from rich.console import Console
        from rich.progress import Progress

        console = Console(stderr=True)
        # Elsewhere it would be an empty line.
        with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
            task = progress.add_task(description, total=total)
            yield lambda: progress.advance(task)
    elif shown and tqdm_there:
        from tqdm.auto import tqdm

        with tqdm(total=total, desc=description, leave=False) as progress:
            yield progress.update
    else:
        yield lambda: None


def _in_notebook() -> bool:
    """Whether this runs in the kernel of a notebook, which has IPython loaded."""
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return type(shell).__name__ == "ZMQInteractiveShell"
