"""Check a backend of kernels on a GPU by several processes, so that all cores compile.

Each process has a group of subjects and goes round and round in it. A call that breaks the device,
or ends its process, fails its subject and is shown as code; another process goes on with the rest.

Run as `python -m gdn_ops.cli.check_worker`, this is the worker.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from gdn_ops.bench.child import Emit, StoppedError, Worker, carry_out_orders
from gdn_ops.bench.device import find_device
from gdn_ops.testing.conformance import CheckReport, CheckRow, Subject, run_rounds, subjects
from gdn_ops.testing.example import Example
from gdn_ops.testing.oracle import Verdict
from gdn_ops.testing.runs import installed

COMMAND = (sys.executable, "-m", "gdn_ops.cli.check_worker")

GRACE = 120.0
"""Seconds beyond its time after which a process is ended: its last call may have to compile."""


def check_side_by_side(
    backend: str,
    seconds: float,
    on_progress: Callable[[float, str], None],
    seed: int | None = None,
    device: str = "cuda",
    *,
    only: str = "",
    start: Callable[[], Worker] = lambda: Worker(COMMAND),
    workers: int | None = None,
) -> CheckReport:
    """Check a backend as `gdn_ops.testing.conformance.check` does, by several processes at once.

    Args:
        backend: its name.
        seconds: how long; every subject is tried at least once.
        on_progress: called with the fraction done and a subject that has been judged.
        seed: of the first round; random if None.
        device: torch device of every tensor.
        only: what the names of the subjects have in them.
        start: starts a worker.
        workers: how many processes; one per core by default.
    """
    names = [subject.name for subject in subjects(installed(backend)) if only in subject.name]
    count = min(workers or os.cpu_count() or 1, len(names))
    first = int(torch.seed() % 2**31) if seed is None else seed
    before = time.perf_counter()
    order = {"backend": backend, "seed": first, "device": device}

    def tell(name: str) -> None:
        on_progress(min(1.0, (time.perf_counter() - before) / seconds), name)

    groups = [_Group(order, names[i::count], before + seconds, tell) for i in range(count)]
    with ThreadPoolExecutor(count) as pool:
        list(pool.map(lambda group: group.run(start), groups))
    rows = {name: row for group in groups for name, row in group.rows.items()}
    spent = time.perf_counter() - before
    return CheckReport(backend, tuple(rows[name] for name in names), spent, device, first)


@dataclass
class _Group:
    """Run the subjects of one process at a time until a time has come, and keep their rows."""

    order: dict[str, Any]
    names: Sequence[str]
    end: float
    tell: Callable[[str], None]
    rows: dict[str, CheckRow] = field(default_factory=dict)

    def run(self, start: Callable[[], Worker]) -> None:
        """Judge every subject; one whose call ends the process has failed."""
        while left := [name for name in self.names if name not in self.rows]:
            at, code, seconds = left[0], "", max(0.0, self.end - time.perf_counter())
            order = {**self.order, "subjects": left, "seconds": seconds}
            try:
                with closing(start()) as worker:
                    for event in worker.ask(order, seconds + GRACE):
                        if "at" in event:
                            at, code = event["at"], event["code"]
                        else:
                            row = CheckRow(**event["row"])
                            self.rows[row.subject] = row
                            self.tell(row.subject)
            except StoppedError as error:
                failed = CheckRow(at, 1, float("inf"), f"{error}\n{code}".strip())
                self.rows[at] = self.rows.get(at, CheckRow(at)).plus(failed)


def carry_out(order: dict[str, Any], emit: Emit) -> None:
    """Judge subjects in the worker process; emit each call before it is run, and rows so far."""
    backend, device = order["backend"], order["device"]
    known = {subject.name: subject for subject in subjects(installed(backend))}
    chosen = [_watched(known[name], device, emit) for name in order["subjects"]]
    for row in run_rounds(backend, chosen, order["seconds"], order["seed"], device):
        emit({"row": asdict(row)})


def _watched(subject: Subject, device: str, emit: Emit) -> Subject:
    """Return a subject that tells its calls, and ends the process that has a broken device."""

    def judge(backend: str, example: Example) -> Verdict:
        emit({"at": subject.name, "code": subject.code(backend, example)})
        try:
            return subject.judge(backend, example)
        except Exception as error:
            try:
                find_device(device).synchronize()
            except Exception:
                # Whatever would be tried to find a smaller call fails from now on.
                print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
                os._exit(3)
            raise

    return replace(subject, judge=judge)


if __name__ == "__main__":
    carry_out_orders(lambda emit: lambda order: carry_out(order, emit))
