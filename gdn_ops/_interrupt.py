"""End `gdn-ops` in one line whenever Ctrl-C comes, while it is still importing too.

This module is imported before everything else, torch included, and does nothing in processes that
are not a command of ours. In a command, Ctrl-C is never answered by Python itself from here on: it
raises KeyboardInterrupt only within `run`, where that is caught; before and after it ends the
process, and once all that was registered for the end has run, it is ignored.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
from collections.abc import Callable
from types import FrameType

CODE = 130
"""The exit code after Ctrl-C, as shells have it."""

PATIENCE = 5.0
"""Seconds that a command has to leave after Ctrl-C, before the process is ended."""

_came = False


def is_command() -> bool:
    """Return whether this process was started as `gdn-ops` or as a module that is the same."""
    program = os.path.basename(sys.argv[0] if sys.argv else "")
    if program.removesuffix(".exe") in ("gdn-ops", "gdn-ops-script.py"):
        return True
    given = sys.orig_argv
    modules = (given[i + 1] for i, word in enumerate(given[:-1]) if word == "-m")
    return next(modules, "") in ("gdn_ops", "gdn_ops.bench.gpu")


def run(command: Callable[[], int]) -> int:
    """Run a command, and return its exit code, or after Ctrl-C say so and return another.

    There is no line here at which a KeyboardInterrupt leaves this function: its handler is taken
    away by itself and by `finally`, both within the outer `try`.
    """
    try:
        try:
            _listen(_interrupt_then_end)
            code = command()
        finally:
            _listen(end)
    except KeyboardInterrupt:
        pass
    else:
        if not _came:
            return code
    # Python waits for its threads: one that compiles would take a minute.
    _set_alarm(PATIENCE, _leave)
    _say()
    return CODE


def came() -> bool:
    """Return whether Ctrl-C came: another error may be what became of its KeyboardInterrupt."""
    return _came


def end(*_: object) -> None:
    """End the process at once: what is being imported may swallow a KeyboardInterrupt."""
    _say()
    os._exit(CODE)


def _leave(*_: object) -> None:
    """End the process at once, which has said why."""
    os._exit(CODE)


def _interrupt_then_end(number: int, frame: FrameType | None) -> None:
    """Raise a KeyboardInterrupt, and end the process where that was not enough."""
    global _came
    _listen(end)
    _came = True
    _set_alarm(PATIENCE, end)
    raise KeyboardInterrupt


def _say() -> None:
    # By no stream of Python's: it may be in the middle of printing, or have lost it.
    with contextlib.suppress(OSError):
        os.write(2, b"\ngdn-ops: interrupted\n")


def _set_alarm(seconds: float, handler: Callable[..., None]) -> None:
    """Let a handler end the process in some seconds, where there are timers; never for 0."""
    if hasattr(signal, "setitimer") and _IS_COMMAND:
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, seconds)


def _end_if_interrupted(unraisable: sys.UnraisableHookArgs) -> None:
    """End the process if a KeyboardInterrupt is lost, as in a callback or a finaliser."""
    if issubclass(unraisable.exc_type, KeyboardInterrupt):
        end()
    sys.__unraisablehook__(unraisable)


def _listen(handler: Callable[..., None] | signal.Handlers) -> None:
    """Let a handler answer Ctrl-C in a command, where it is not ignored and can be handled."""
    if _IS_COMMAND and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        # Only the main thread may say it.
        with contextlib.suppress(ValueError):
            signal.signal(signal.SIGINT, handler)


_IS_COMMAND = is_command()
if _IS_COMMAND:
    _listen(end)
    sys.unraisablehook = _end_if_interrupted
    # Ignore Ctrl-C and the alarm at the very end: the first to be registered runs last. Python then
    # lets go of its modules, the handlers with them, and a signal itself would end the process.
    atexit.register(_listen, signal.SIG_IGN)
    atexit.register(_set_alarm, 0, _leave)
