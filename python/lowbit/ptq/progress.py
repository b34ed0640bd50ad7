"""A progress bar on stderr by rich or tqdm, whichever is installed."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def bar(total: int, description: str, shown: bool) -> Iterator[Callable[[], object]]:
    """Gives a function to call once per item done; without rich and tqdm there is no bar."""
    if shown and importlib.util.find_spec("rich"):
        from rich.console import Console
        from rich.progress import Progress

        console = Console(stderr=True)
        # Elsewhere it would be an empty line.
        with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
            task = progress.add_task(description, total=total)
            yield lambda: progress.advance(task)
    elif shown and importlib.util.find_spec("tqdm"):
        from tqdm import tqdm

        with tqdm(total=total, desc=description, leave=False) as progress:
            yield progress.update
    else:
        yield lambda: None
