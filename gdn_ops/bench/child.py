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
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch

import gdn_ops

ENVIRONMENT = {"FLA_FLASH_QLA": "0", "FLA_FLASH_KDA": "0", "FLA_CACHE_RESULTS": "0"}
"""Set for children. fla would hand its calls to flash_qla, which is measured by itself; and it
would keep on disk which configurations were fastest while others were compiling beside it."""

Emit = Callable[[dict[str, Any]], None]


def child_environment() -> dict[str, str]:
    """Return environment variables with which a child process imports this same gdn_ops."""
    root = str(Path(gdn_ops.__file__).resolve().parents[1])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, **ENVIRONMENT, "PYTHONPATH": os.pathsep.join(paths)}


class StoppedError(RuntimeError):
    """Report that a worker ended, or was ended, before its order was done; the text says why."""


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

    def ask(self, order: dict[str, Any], seconds: float) -> Iterator[dict[str, Any]]:
        """Yield the events of an order, plain data; after `seconds` the process is ended.

        Raises:
            StoppedError: the process ended before the order was done.
        """
        assert self._process.stdin is not None
        end = time.monotonic() + seconds
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()
        while True:
            try:
                line = self._lines.get(timeout=max(0.0, end - time.monotonic()))
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
        last = _last_line(self._errors.read())
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return StoppedError(f"the process ended with {how}" + (f": {last[:300]}" if last else ""))

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


def spread(
    orders: Iterable[dict[str, Any]], start: Callable[[], Worker], seconds: float, most: int
) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]] | StoppedError]]:
    """Carry out orders in up to `most` workers at once, each order within `seconds`.

    Returns:
        An iterator of the orders as they are done, each with its events, or with the error that
        says how its worker ended. Another worker takes that one's place.
    """
    idle: queue.SimpleQueue[Worker] = queue.SimpleQueue()

    def carry_out(order: dict[str, Any]) -> list[dict[str, Any]] | StoppedError:
        try:
            worker = idle.get_nowait()
        except queue.Empty:
            worker = start()
        try:
            events = list(worker.ask(order, seconds))
        except StoppedError as error:
            worker.close()
            return error
        idle.put(worker)
        return events

    with ThreadPoolExecutor(most) as pool:
        try:
            asked = {pool.submit(carry_out, order): order for order in orders}
            for done in as_completed(asked):
                yield asked[done], done.result()
        finally:
            pool.shutdown(cancel_futures=True)
            while not idle.empty():
                idle.get().close()


def call(function: Callable[..., Any], *arguments: object, **named: object) -> Any:
    """Call a function of a module in a process of its own, with as many threads as this one.

    Returns:
        The value, or a text that says why there is none; a value is never a text.
    """
    done = subprocess.run(
        (sys.executable, "-m", "gdn_ops.bench.child"),
        input=pickle.dumps((function, arguments, named, torch.get_num_threads())),
        capture_output=True,
        env=child_environment(),
    )
    if done.returncode:
        last = _last_line(done.stderr.decode(errors="replace"))
        return f"the measuring process ended with {done.returncode}: {last}"
    return pickle.loads(done.stdout)


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def _answer_call() -> None:
    """Carry out what `call` asks for on stdin, in the child process, and write its value."""
    answer = os.dup(1)
    os.dup2(2, 1)
    function, arguments, named, threads = pickle.load(sys.stdin.buffer)
    torch.set_num_threads(threads)
    with open(answer, "wb") as out:
        pickle.dump(function(*arguments, **named), out)


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
    _answer_call()
