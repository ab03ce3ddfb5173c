"""Run a command with a time limit: read its lines as they come, end all that it started.

Whatever the command does, this returns: it may hang, crash, print without end, or leave children
that hold its output open or have left its process group. Its children are known by a variable of
their environment.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

HEAD_BYTES = 4 << 20
"""Bytes of an output that are written as they come; of later ones only the last are kept."""

TAIL_BYTES = 1 << 20
TAIL_LINES = 40
LONGEST_LINE = 1 << 16
MARK = "GDN_OPS_KIT_STAGE"


@dataclass(frozen=True)
class Ending:
    """Say how a command ended: "passed", "failed", "crashed" or "timed out", and its last lines."""

    status: str
    detail: str
    seconds: float
    tail: str


class Log:
    """Write an output to a file: its beginning as it comes, and at the end its last lines."""

    def __init__(self, path: Path) -> None:
        self.written, self.kept, self.left_out = 0, 0, 0
        self.later: deque[bytes] = deque()
        self.lines: deque[str] = deque(maxlen=TAIL_LINES)
        self.trouble = ""
        self.file: IO[bytes] | None = None
        with self.noting():
            self.file = path.open("wb", buffering=0)

    @contextlib.contextmanager
    def noting(self) -> Iterator[None]:
        """Note the error of a disk, which is no reason to stop."""
        try:
            yield
        except OSError as error:
            self.trouble = f"the file could not be written: {error.strerror or error}"

    def add(self, line: bytes) -> None:
        """Take one line, or a part of a long one."""
        self.lines.append(line.decode(errors="replace").rstrip("\n")[:1000])
        if self.written + len(line) <= HEAD_BYTES and not self.later:
            self.written += len(line)
            self.write(line)
            return
        self.later.append(line)
        self.kept += len(line)
        while self.kept > TAIL_BYTES:
            gone = len(self.later.popleft())
            self.kept -= gone
            self.left_out += gone

    def write(self, data: bytes) -> None:
        """Write to the file, if it could be opened."""
        with self.noting():
            if self.file is not None:
                self.file.write(data)

    def close(self) -> None:
        """Write what was kept of the end."""
        if self.left_out:
            self.write(f"\n... {self.left_out} bytes are left out here ...\n".encode())
        self.write(b"".join(self.later))
        if self.file is not None:
            with self.noting():
                self.file.close()


def run_command(
    command: Sequence[str],
    log: Path,
    seconds: float,
    environment: Mapping[str, str],
    cwd: Path,
    on_line: Callable[[str], None],
) -> Ending:
    """Run a command, write its output to a file and hand over its lines; end its children with it.

    Args:
        command: its words.
        log: the file of its output.
        seconds: its time limit.
        environment: its whole environment.
        cwd: its folder.
        on_line: called with each line, from another thread.
    """
    start, mark, output = time.monotonic(), uuid.uuid4().hex, Log(log)
    try:
        process = subprocess.Popen(
            command,
            cwd=cwd,
            env={**environment, MARK: mark},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    except OSError as error:
        output.close()
        return Ending("failed", f"cannot be started: {error}", time.monotonic() - start, "")
    reader = threading.Thread(target=_read, args=(process.stdout, output, on_line), daemon=True)
    reader.start()
    is_late = False
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        is_late = True
    finally:
        end_all(process.pid, mark)
        process.wait()
        # Nobody is left who could hold the pipe open.
        reader.join(5)
        output.close()
    status, detail = _judge(process.returncode, is_late, seconds)
    detail = "; ".join(filter(None, (detail, output.trouble)))
    return Ending(status, detail, time.monotonic() - start, "\n".join(output.lines))


def _read(pipe: IO[bytes], output: Log, on_line: Callable[[str], None]) -> None:
    for line in iter(lambda: pipe.readline(LONGEST_LINE), b""):
        output.add(line)
        on_line(line.decode(errors="replace").rstrip("\n"))


def _judge(code: int, is_late: bool, seconds: float) -> tuple[str, str]:
    """Return the status of a command and what to say of it."""
    if is_late:
        return "timed out", f"after {seconds:.0f} s"
    if code < 0:
        return "crashed", signal.Signals(-code).name
    return ("failed", f"exit code {code}") if code else ("passed", "")


def end_all(group: int, mark: str) -> None:
    """Kill a process group, and every process that has a mark in its environment."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)
    # One that forks meanwhile is found in the next round.
    for _ in range(20):
        found = marked(mark)
        if not found:
            return
        for pid in found:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def marked(mark: str) -> list[int]:
    """Return the processes, zombies not among them, that have a mark in their environment."""
    wanted, found = f"{MARK}={mark}".encode(), []
    for path in Path("/proc").glob("[0-9]*/environ"):
        # Other users' cannot be read, and a process may end meanwhile.
        with contextlib.suppress(OSError):
            if wanted in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
    return found
