"""Measure how a forward shares the machine: with one thread and two, alone and beside others.

Both are ratios of times that take turns in one process.
"""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from gdn_ops.bench.contender import Contender
from gdn_ops.bench.device import Run, find_device
from gdn_ops.bench.inputs import Inputs, Setting
from gdn_ops.bench.rows import Row
from gdn_ops.bench.turns import REST, Timing, rested, take_turns, time_calls
from gdn_ops.spec.language import Case

THREADS = 2

_BUSY = """
import hashlib, os, threading

def keep_busy():
    while True:
        hashlib.sha256(block)

# A hash of so many bytes lets the other threads run.
block = bytes(1 << 22)
for _ in range(os.cpu_count() or 1):
    threading.Thread(target=keep_busy).start()
print("busy", flush=True)
"""
"""Keep every core of the machine busy, with a thread for each, which wait for nobody."""

_Between = tuple[Run, Callable[[], None], Callable[[], None]]
"""Hold what is timed, and what is done before and after it."""

SETTLE = 0.05
"""Seconds that the busy process runs before a time is taken beside it."""


def threads_row(case: Case, c: Contender, x: Inputs, s: Setting) -> Row | str:
    """Return the time of a forward with one thread over its time with two, or why there is none."""
    if (os.cpu_count() or 1) < THREADS:
        return f"the machine has fewer than {THREADS} cores"
    forward, before = c.sequence(x).run, torch.get_num_threads()
    runs: dict[str, _Between] = {
        name: (forward, functools.partial(torch.set_num_threads, count), _nothing)
        for name, count in (("one", 1), ("two", THREADS))
    }
    try:
        timing = _in_turns(runs, s)
    finally:
        torch.set_num_threads(before)
    return _row("threads", case, c, timing["one"], timing["two"], f"{THREADS} threads")


def load_row(case: Case, c: Contender, x: Inputs, s: Setting) -> Row | str:
    """Return the time of a forward beside a busy process over its time alone, or why not."""
    if not hasattr(signal, "SIGSTOP"):
        return "processes cannot be halted here"
    forward = c.sequence(x).run
    with _busy_process() as process:

        def halt() -> None:
            process.send_signal(signal.SIGSTOP)
            os.waitpid(process.pid, os.WUNTRACED)

        def go() -> None:
            process.send_signal(signal.SIGCONT)
            time.sleep(SETTLE)

        runs: dict[str, _Between] = {
            "alone": (forward, _nothing, _nothing),
            "beside": (forward, go, halt),
        }
        halt()
        timing = _in_turns(runs, s)
    return _row("load", case, c, timing["beside"], timing["alone"], "alone")


def _nothing() -> None:
    """Do nothing before or after a time is taken."""


def _in_turns(runs: dict[str, _Between], s: Setting) -> dict[str, Timing]:
    """Time forwards in turns, after a round that does not count."""
    device = find_device(s.device)

    def sampler(
        run: Run, before: Callable[[], None], after: Callable[[], None]
    ) -> Callable[[], float]:
        timed = time_calls([run], device)

        def sample() -> float:
            before()
            try:
                return timed()[0]
            finally:
                after()

        return rested(sample, REST if s.device == "cpu" else 0.0)

    samplers = {name: sampler(*parts) for name, parts in runs.items()}
    with torch.no_grad():
        samples = take_turns(samplers, range(1 + s.repeats))
    return {name: Timing(tuple(times[1:])) for name, times in samples.items()}


@contextmanager
def _busy_process() -> Iterator[subprocess.Popen[str]]:
    """Start a process that keeps every core busy; it ends with the block."""
    command = (sys.executable, "-c", _BUSY)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        process.stdout.readline()
        yield process
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def _row(what: str, case: Case, c: Contender, long: Timing, short: Timing, against: str) -> Row:
    """Return the row of a ratio of times."""
    median, best = long.median / short.median, long.best / short.best
    return Row(what, case.name, c.name, "x", median, best, len(long.samples), against=against)
