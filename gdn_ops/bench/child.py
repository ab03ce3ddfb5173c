"""Run measurements in processes of their own: orders in as JSON lines, events out as JSON lines.

A kernel that hangs, a compiler that takes minutes or an illegal access ends such a process and not
the benchmark. What is printed in it goes to stderr.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import gdn_ops

ENVIRONMENT = {"FLA_FLASH_QLA": "0", "FLA_CACHE_RESULTS": "0"}
"""Set for children. fla would hand its calls to flash_qla, which is measured by itself; and it
would keep on disk which configurations were fastest while others were compiling beside it."""

Emit = Callable[[dict[str, Any]], None]


def child_environment() -> dict[str, str]:
    """Return environment variables with which a child process imports this same gdn_ops."""
    root = str(Path(gdn_ops.__file__).resolve().parents[1])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, **ENVIRONMENT, "PYTHONPATH": os.pathsep.join(paths)}


class StoppedError(RuntimeError):
    """Report that a worker ended, or was ended, before its order was done; the text says why.

    Attributes:
        code: exit code; minus the number of the signal that ended it.
        last_line: the last line that it wrote to stderr.
    """

    def __init__(self, text: str, code: int = 0, last_line: str = "") -> None:
        super().__init__(text)
        self.code, self.last_line = code, last_line


class TimeUpError(StoppedError):
    """Report that a worker was ended because its time was up."""


class Worker:
    """Run a worker process; after a StoppedError it takes no more orders."""

    def __init__(self, command: Sequence[str]) -> None:
        # Open until the process ends, however that is.
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=child_environment(),
            # Compilers that it starts end with it.
            start_new_session=True,
        )
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def ask(self, order: dict[str, Any], seconds: float | None = None) -> Iterator[dict[str, Any]]:
        """Yield the events of an order, plain data; after `seconds` the process is ended.

        Raises:
            StoppedError: the process ended before the order was done.
        """
        assert self._process.stdin is not None
        end = None if seconds is None else time.monotonic() + seconds
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()
        while True:
            left = None if end is None else max(0.0, end - time.monotonic())
            try:
                line = self._lines.get(timeout=left)
            except queue.Empty:
                self.close()
                raise TimeUpError(f"stopped after {seconds:.0f} s") from None
            if line is None:
                raise self._ended()
            try:
                event = json.loads(line)
            except ValueError:
                # Printed by something that was imported before the worker could prevent it.
                continue
            if "done" in event:
                return
            yield event

    def _ended(self) -> StoppedError:
        """Return an error that says how the process ended and what it wrote last to stderr."""
        code = self._process.wait()
        self._errors.seek(0)
        lines = [line.strip() for line in self._errors if line.strip()]
        last = lines[-1] if lines else ""
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        text = f"the process ended with {how}" + (f": {last[:300]}" if last else "")
        return StoppedError(text, code, last)

    def close(self) -> None:
        """End the process."""
        if self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._reader.join(timeout=5)
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()


def call(function: Callable[..., Any], *arguments: object) -> Any:
    """Call a function of a module in a process of its own, with as many threads as this one.

    Returns:
        The value, or a text that says why there is none; a value is never a text.
    """
    worker = Worker((sys.executable, "-m", "gdn_ops.bench.child"))
    order = pickle.dumps((function, arguments, torch.get_num_threads())).hex()
    try:
        (event,) = worker.ask({"call": order})
        return pickle.loads(bytes.fromhex(event["value"]))
    except StoppedError as error:
        return f"the measuring process ended with {error.code}: {error.last_line}"
    finally:
        worker.close()


def _answer(emit: Emit) -> Callable[[dict[str, Any]], None]:
    """Return what carries out the order of `call` in the child process."""

    def carry_out(order: dict[str, Any]) -> None:
        function, arguments, threads = pickle.loads(bytes.fromhex(order["call"]))
        torch.set_num_threads(threads)
        emit({"value": pickle.dumps(function(*arguments)).hex()})

    return carry_out


def carry_out_orders(start: Callable[[Emit], Callable[[dict[str, Any]], None]]) -> None:
    """Carry out the orders on stdin, in the child process, until it ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    # Keep what is printed here apart from events.
    os.dup2(2, 1)

    def emit(event: dict[str, Any]) -> None:
        answers.write(json.dumps(event) + "\n")

    carry_out = start(emit)
    for line in sys.stdin:
        carry_out(json.loads(line))
        emit({"done": True})


if __name__ == "__main__":
    carry_out_orders(_answer)
