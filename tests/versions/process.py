"""Run commands for cells: output to a log, a time limit, and no child that outlives this one."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
from pathlib import Path

from versions.cells import ROOT


class NotRunError(Exception):
    """Say why a cell cannot be installed, or has no interpreter here.

    `excused` where it is no failure: a newer Python that this machine does not have.
    """

    def __init__(self, reason: str, *, excused: bool = False) -> None:
        super().__init__(reason)
        self.excused = excused


class CellFailedError(Exception):
    """Say why a cell failed before its tests could say it."""


class Processes:
    """Start commands, each in a process group of its own, and end all of them on demand."""

    def __init__(self) -> None:
        self._running: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()
        self._ended = False

    def run(
        self, command: list[str], log: Path, environment: dict[str, str], seconds: float
    ) -> int:
        """Run a command in the repository, append what it prints to a log, return its exit code.

        Raises:
            CellFailedError: it took longer; it and its children are ended.
            NotRunError: everything was ended meanwhile.
        """
        with log.open("ab") as out:
            process = self._start(command, out.fileno(), {**os.environ, **environment})
            try:
                return process.wait(seconds)
            except subprocess.TimeoutExpired:
                raise CellFailedError(f"took longer than {seconds / 60:.0f} min") from None
            finally:
                # Also what the command left running, such as workers of a compiler.
                _kill(process)
                process.wait()
                with self._lock:
                    self._running.discard(process)

    def _start(
        self, command: list[str], out: int, environment: dict[str, str]
    ) -> subprocess.Popen[bytes]:
        with self._lock:
            if self._ended:
                raise NotRunError("interrupted")
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            self._running.add(process)
        return process

    def end(self) -> None:
        """End every command that runs, and start none any more."""
        with self._lock:
            self._ended = True
            for process in self._running:
                _kill(process)


def _kill(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
