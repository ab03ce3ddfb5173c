"""Schedule a run of `bench gpu`: order work from processes, limit its time, blame failures."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from gdn_ops.bench.child import StoppedError, TimeUpError, Worker
from gdn_ops.bench.gpu import report
from gdn_ops.bench.gpu.result import Conformance, GpuResult, Outcome
from gdn_ops.bench.gpu.rows import ROWS, GpuRow
from gdn_ops.bench.gpu.worker import COMMAND
from gdn_ops.bench.report import Log

SECONDS = 450.0
"""Time for everything; with the plot and the imports this stays within eight minutes."""

PREPARE_SHARE = 0.35
"""The most of the time that checks and warm-ups may take."""

ROW_SECONDS = (6.0, 45.0)
"""Least and most for a row. With less than the least left, no row is begun."""

FIRST_SECONDS = 90.0
"""The most for the first row of a direction, in which peers choose their configurations."""

MOST_STOPS = 2
"""A contender that had to be stopped so often in one direction is left out of it from then on."""


@dataclass(frozen=True)
class Plan:
    """Hold the plan of a run: names, time for everything, and (name, why) of what was left out."""

    backends: tuple[str, ...]
    peers: tuple[str, ...]
    seconds: float = SECONDS
    left_out: tuple[tuple[str, str], ...] = ()
    rows: tuple[GpuRow, ...] = ROWS


def run(
    plan: Plan,
    circumstances: dict[str, Any],
    folder: Path,
    log: Log = lambda text: None,
    *,
    start: Callable[[], Worker] = lambda: Worker(COMMAND),
    clock: Callable[[], float] = time.monotonic,
) -> GpuResult:
    """Check our backends, warm contenders up, then measure rows until rows or time run out.

    The result is written into the folder after every row; its circumstances tell the "device".
    """
    result = GpuResult(circumstances, left_out=list(plan.left_out))
    return _Bench(plan, result, folder, log, start, clock).run()


@dataclass
class _Bench:
    """Run one plan and collect its result."""

    plan: Plan
    result: GpuResult
    folder: Path
    log: Log
    start: Callable[[], Worker]
    clock: Callable[[], float]
    stops: dict[tuple[str, str], list[str]] = field(default_factory=dict)
    wrong: dict[str, str] = field(default_factory=dict)
    worker: Worker | None = None

    def run(self) -> GpuResult:
        self.end = self.clock() + self.plan.seconds
        self._prepare()
        self.wrong = {
            c.backend: "not timed, its check failed: " + c.text.partition("\n")[0]
            for c in self.result.conformance
            if not c.passed
        }
        self.result.failed = bool(self.wrong)
        self.result.write_json(self.folder)
        try:
            for i, row in enumerate(self.plan.rows):
                self._row(row, len(self.plan.rows) - i)
        finally:
            self._end_worker()
        ours = (o for _, outcomes in self.result.rows for o in outcomes if not o.is_peer)
        self.result.failed |= any(o.status in ("wrong", "failed") for o in ours)
        self.result.write_json(self.folder)
        return self.result

    def _names(self) -> tuple[str, ...]:
        return (*self.plan.backends, *self.plan.peers)

    def _prepare(self) -> None:
        """Check our backends and warm all contenders up, side by side."""
        ready = self.clock() + PREPARE_SHARE * self.plan.seconds
        self.log(f"checking {', '.join(self.plan.backends)}; compiling for everybody")
        directions = dict.fromkeys(row.what for row in self.plan.rows)
        # Compile the rest when its row comes: few cores do not get to all.
        with ThreadPoolExecutor(max(4, os.cpu_count() or 1)) as pool:
            checks = [pool.submit(self._check, name, ready) for name in self.plan.backends]
            warm = [
                pool.submit(self._warm, name, what, ready)
                for what in directions
                for name in self._names()
            ]
            self.result.conformance = [check.result() for check in checks]
            for done in warm:
                self.log(done.result())
        for conformance in self.result.conformance:
            self.log(f"conformance of {conformance}")

    def _check(self, name: str, ready: float) -> Conformance:
        """Run the short check of a backend in a process of its own."""
        conformance = Conformance(name, True, 0, 0)
        seconds = ready - self.clock()
        # It stops by itself, between two calls, before it is stopped.
        order = {"do": "check", "backend": name, "seconds": 0.8 * seconds}
        try:
            with closing(self.start()) as worker:
                for event in worker.ask(order, seconds):
                    if "conformance" in event:
                        conformance = Conformance(**event["conformance"])
        except StoppedError as error:
            # Too slow is not wrong, but a process that dies is.
            passed = conformance.passed and isinstance(error, TimeUpError)
            text = f"{error}\n{conformance.text}".strip()
            return replace(conformance, passed=passed, text=text)
        return conformance

    def _warm(self, name: str, what: str, ready: float) -> str:
        """Let a contender compile for the rows of one direction; return a line that reports it."""
        before = self.clock()
        if ready - before < ROW_SECONDS[0]:
            return f"warm-up of {name}, {what}: no time"
        rows = [row.name for row in self.plan.rows if row.what == what]
        order = {"do": "warm", "contender": name, "rows": rows}
        done = 0
        try:
            with closing(self.start()) as worker:
                for event in worker.ask(order, ready - before):
                    done += "warm" in event
        except StoppedError as error:
            return f"warm-up of {name}, {what}: {done} of {len(rows)} rows, {error}"
        return f"warm-up of {name}, {what}: {done} rows in {self.clock() - before:.0f} s"

    def _row(self, row: GpuRow, rows_left: int) -> None:
        """Measure one row, then write the result so far."""
        by_name: dict[str, Outcome] = {}
        names = []
        for name in self._names():
            stopped = self.stops.get((name, row.what), [])
            if name in self.wrong:
                by_name[name] = self._left_out(name, self.wrong[name])
            elif len(stopped) >= MOST_STOPS:
                reason = f"left out after it was stopped {len(stopped)} times: {stopped[-1]}"
                by_name[name] = self._left_out(name, reason)
            else:
                names.append(name)
        # A row that had to be stopped is tried again without the one who was at work.
        while names and self._measure(row, names, rows_left, by_name):
            names = [name for name in names if name not in by_name]
        for name in self._names():
            by_name.setdefault(name, self._left_out(name, "not measured: time"))
        outcomes = [by_name[name] for name in self._names()]
        self.result.rows.append((row, outcomes))
        self.result.write_json(self.folder)
        self.log(report.line(row, outcomes))

    def _measure(
        self, row: GpuRow, names: list[str], rows_left: int, by_name: dict[str, Outcome]
    ) -> bool:
        """Order one row; return whether to order it again without the contenders in `by_name`."""
        left = self.end - self.clock()
        least, most = ROW_SECONDS
        if left < least:
            return False
        is_first = all(row.what != known.what for known, _ in self.result.rows)
        # Give the others what one row does not use.
        share = FIRST_SECONDS if is_first else min(most, max(least, 3 * left / rows_left))
        seconds = min(left, share)
        order = {"do": "row", "row": row.name, "contenders": names, "seconds": 0.7 * seconds}
        at = ""
        if self.worker is None:
            self.worker = self.start()
        try:
            for event in self.worker.ask(order, seconds):
                at = event.get("at", at)
                if "broken" in event:
                    at = event["broken"].partition(":")[0]
                if "outcome" in event:
                    outcome = Outcome(**event["outcome"])
                    by_name[outcome.contender] = outcome
        except StoppedError as error:
            self._end_worker()
            return self._blame(row, at, error, names, by_name)
        return False

    def _end_worker(self) -> None:
        if self.worker is not None:
            self.worker.close()
        self.worker = None

    def _blame(
        self, row: GpuRow, at: str, why: StoppedError, names: list[str], by_name: dict[str, Outcome]
    ) -> bool:
        """Blame the contender at work when the worker ended; return whether to go on without it."""
        if at not in names:
            for name in names:
                by_name.setdefault(name, self._left_out(name, f"not measured: {why}, at {at}"))
            return False
        # Too slow is no failure: others may have used up the time of the row.
        status = "left out" if isinstance(why, TimeUpError) else "failed"
        by_name[at] = self._left_out(at, f"not measured: {why}", status)
        self.stops.setdefault((at, row.what), []).append(str(why))
        return True

    def _left_out(self, name: str, reason: str, status: str = "left out") -> Outcome:
        return Outcome(name, "", name in self.plan.peers, status, reason)
