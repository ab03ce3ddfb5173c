"""Run a worker process: send it orders, yield its events, and stop it when its time is up."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from gdn_ops.bench.child import child_environment
from gdn_ops.bench.gpu.worker import ENVIRONMENT

COMMAND = (sys.executable, "-m", "gdn_ops.bench.gpu.worker")


class StoppedError(RuntimeError):
    """Report that a worker ended, or was ended, before its order was done; the text says why."""


class TimeUpError(StoppedError):
    """Report that a worker was ended because its time was up."""


class Asked(Protocol):
    """Describe a worker that carries out orders."""

    def ask(self, order: dict[str, Any], seconds: float) -> Iterator[dict[str, Any]]:
        """Yield the events of an order; raise StoppedError if the order is not completed."""

    def close(self) -> None:
        """End the worker."""


class Worker:
    """Run a worker process; after a StoppedError it takes no more orders."""

    def __init__(self, command: Sequence[str] = COMMAND) -> None:
        # Open until the process ends, however that is.
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env={**child_environment(), **ENVIRONMENT},
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
                raise StoppedError(self._last_words())
            try:
                event = json.loads(line)
            except ValueError:
                # Printed by something that was imported before the worker could prevent it.
                continue
            if "done" in event:
                return
            yield event

    def _last_words(self) -> str:
        """Return how the process ended and the last line that it wrote to stderr."""
        code = self._process.wait()
        self._errors.seek(0)
        lines = [line.strip() for line in self._errors if line.strip()]
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return f"the process ended with {how}" + (f": {lines[-1][:300]}" if lines else "")

    def close(self) -> None:
        if self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._reader.join(timeout=5)
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()
