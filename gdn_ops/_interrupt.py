"""End `gdn-ops` in one line when Ctrl-C comes while it is still importing.

This module is imported before everything else, torch included, and does nothing in processes that
are not a command of ours.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType

CODE = 130
"""The exit code after Ctrl-C, as shells have it."""


def is_command() -> bool:
    """Return whether this process was started as `gdn-ops` or as a module that is the same."""
    program = os.path.basename(sys.argv[0] if sys.argv else "")
    if program.removesuffix(".exe") in ("gdn-ops", "gdn-ops-script.py"):
        return True
    given = sys.orig_argv
    modules = (given[i + 1] for i, word in enumerate(given[:-1]) if word == "-m")
    return next(modules, "") in ("gdn_ops", "gdn_ops.bench.gpu")


def end(*_: object) -> None:
    """End the process at once: what is being imported may swallow a KeyboardInterrupt."""
    os.write(2, b"\ngdn-ops: interrupted\n")
    os._exit(CODE)


def interrupt_then_end(number: int, frame: FrameType | None) -> None:
    """Raise a KeyboardInterrupt, and end the process at once where that was not enough."""
    signal.signal(signal.SIGINT, end)
    raise KeyboardInterrupt


def listen(handler: object) -> None:
    """Let a handler answer Ctrl-C, where it is not ignored and signals can be handled."""
    is_main = threading.current_thread() is threading.main_thread()
    if is_main and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, handler)  # type: ignore[arg-type]


if is_command():
    listen(end)
