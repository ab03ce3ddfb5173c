"""Show a progress bar on stderr, where that is a terminal; elsewhere nothing is shown."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator

Advance = Callable[[str], None]
"""Say in a few words what starts now."""


def is_shown() -> bool:
    """Return whether a bar can be drawn: stderr is a terminal that can move its cursor."""
    return bool(sys.stderr and sys.stderr.isatty()) and os.environ.get("TERM") != "dumb"


@contextlib.contextmanager
def progress(total: int | None, text: str = "", *, is_quiet: bool = False) -> Iterator[Advance]:
    """Yield a function that advances a bar by one and changes its text.

    Args:
        total: how often it is called; None where nobody knows.
        text: shown at first.
        is_quiet: whether the bar is drawn only when it advances: a thread that draws it would
            disturb what is timed.
    """
    try:
        if not is_shown():
            raise ModuleNotFoundError
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
    except ModuleNotFoundError:
        yield lambda now: None
        return
    columns = (BarColumn(20), TimeElapsedColumn(), TextColumn("{task.description}", markup=False))
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, auto_refresh=not is_quiet) as bar:
        # Leave the bar where it is at the first call: what starts has not ended.
        task = bar.add_task(text, total=total, completed=-1)

        def advance(now: str) -> None:
            bar.update(task, description=now, advance=1, refresh=True)

        yield advance
