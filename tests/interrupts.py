"""Interrupt a command of `gdn-ops` at every moment of it, each in a process of its own.

Run as a program: every how many moments, then the arguments of the command. It runs the command in
this process, and at such a moment forks a child, which raises SIGINT there and goes on. Moments are
imports, and instructions of the code that answers Ctrl-C. What became of every child is printed.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import sys
from types import FrameType
from typing import Any

IMPORTS_BETWEEN = 25
"""An import in so many is a moment: there are thousands."""

told: list[dict[str, Any]] = []
imports = 0
moments = 0


def interrupt(where: str) -> bool:
    """Fork a child at some of the moments; return whether this is the child, where it goes on."""
    global moments
    moments += 1
    if moments % EVERY:
        return False
    reading, writing = os.pipe()
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        os.dup2(writing, 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.close(writing)
        return True
    os.close(writing)
    ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    with os.fdopen(reading, encoding="utf-8", errors="replace") as pipe:
        text = pipe.read()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    told.append({"where": where, "ignored": ignored, "code": code, "stderr": text})
    return False


def at_import(event: str, arguments: tuple[Any, ...]) -> None:
    """Interrupt at some of the imports."""
    global imports
    is_ours = signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    if event == "import" and is_ours and os.getpid() == PARENT:
        imports += 1
        if imports % IMPORTS_BETWEEN == 0 and interrupt(f"import {arguments[0]}"):
            sys.settrace(None)
            signal.raise_signal(signal.SIGINT)


def at_instruction(frame: FrameType, event: str, _: object) -> Any:
    """Interrupt at every instruction of the code that answers Ctrl-C."""
    code = frame.f_code
    if not code.co_filename.endswith(("gdn_ops/_interrupt.py", "gdn_ops/cli/__init__.py")):
        return None
    frame.f_trace_opcodes = True
    is_moment = event == "opcode" and os.getpid() == PARENT
    if is_moment and interrupt(f"{code.co_name}, line {frame.f_lineno}"):
        sys.settrace(None)
        signal.raise_signal(signal.SIGINT)
    return at_instruction


def show() -> None:
    """Print what became of the children."""
    sys.settrace(None)
    if os.getpid() == PARENT:
        os.write(OUT, json.dumps(told).encode())


if __name__ == "__main__":
    PARENT, OUT, EVERY = os.getpid(), os.dup(1), int(sys.argv[1])
    sys.argv[:2] = ["gdn-ops"]
    # The first that is registered runs last.
    atexit.register(show)
    sys.addaudithook(at_import)
    from gdn_ops.cli import main

    # Python 3.12 sends instructions only where a frame asked for them before tracing began
    # (https://github.com/python/cpython/issues/103615); later is enough before and after it.
    sys._getframe().f_trace_opcodes = True
    sys.settrace(at_instruction)
    main()
