"""Measure one row of `bench gpu`: check every contender, then time the right ones in turns.

Kernel time is that of replaying a captured graph, so neither Python nor launches are in it; wall
time is that of a call and a wait, as a user meets it; host time is until the call returns. Calls
work on several sets of operands in turn, together twice the last-level cache, because between two
calls of a layer the other layers' operands and states pass through it.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from gdn_ops.bench.child import Emit
from gdn_ops.bench.contender import Contender, error_line
from gdn_ops.bench.device import Run
from gdn_ops.bench.gpu.device import WARMUPS, BrokenDeviceError, Card, Cuda, capture
from gdn_ops.bench.gpu.errors import exact_backward, exact_forward, exact_step, worst_error
from gdn_ops.bench.gpu.launches import time_launches
from gdn_ops.bench.gpu.result import Outcome, roofline_seconds
from gdn_ops.bench.gpu.rows import GpuRow
from gdn_ops.bench.inputs import Inputs, make_cotangents
from gdn_ops.bench.turns import sample_in_turns, time_calls
from gdn_ops.bench.verify import Part

WRONG_ABOVE = {"bfloat16": 0.05, "float16": 0.05, "float32": 0.01}
"""A larger relative error means another function: such a time is not shown. Smaller errors are
shown beside the time."""

GRAPH_SECONDS = 1e-3
"""Short runs are captured several times into one graph, until it takes this long."""

MOST_SETS = 64
MOST_REPEATS = 20
SHARE = {"reference": 0.2, "kernel": 0.15, "wall": 0.1}
"""Share of a row's time that each phase may take."""


Grad = Callable[[], tuple[Tensor, ...]]


@dataclass
class _Entry:
    """Hold a contender that is ready to be timed."""

    outcome: Outcome
    runs: list[Run]
    replay: Callable[[], float]
    per_replay: int


def measure_row(
    row: GpuRow, contenders: Sequence[Contender], device: Cuda, seconds: float, emit: Emit
) -> list[Outcome]:
    """Measure one row: check its contenders, then time those that are right.

    No contender is begun, and no round added, after `seconds`. `emit` is told which contender is
    at work ({"at": name}), and every outcome ({"outcome": ...}).

    Raises:
        BrokenDeviceError: a contender left the device unusable.
    """
    measuring = _Measuring(row, device, seconds, emit)
    with device.working(), torch.no_grad():
        return measuring.run(contenders)


def warm_row(row: GpuRow, c: Contender, device: Cuda) -> None:
    """Call a contender once, so that its kernels are in its compiler's cache."""
    measuring = _Measuring(row, device, 0.0, lambda event: None)
    with device.working(), torch.no_grad():
        measuring.draw(1)
        if not c.reasons(measuring.sets[0].inputs, row.what):
            measuring.first_call(c)


class _Set(NamedTuple):
    """Hold the operands of a call and, for a backward, the gradients of its results."""

    inputs: Inputs
    cotangents: tuple[Tensor, Tensor] | None

    def copy(self) -> _Set:
        pair = self.cotangents
        copied = None if pair is None else (pair[0].clone(), pair[1].clone())
        return _Set(self.inputs.map(Tensor.clone), copied)


class _Measuring:
    """Measure one row and keep its outcomes."""

    def __init__(self, row: GpuRow, device: Cuda, seconds: float, emit: Emit) -> None:
        self.row, self.device, self.seconds, self.emit = row, device, seconds, emit
        self.start = device.clock()
        self.outcomes: dict[str, Outcome] = {}

    def run(self, contenders: Sequence[Contender]) -> list[Outcome]:
        self.emit({"at": "reference"})
        self.draw(MOST_SETS)
        self.parts, self.remark = self._reference()
        entries: dict[str, _Entry] = {}
        for c in contenders:
            self.emit({"at": c.name})
            entry = self._ready(c)
            if isinstance(entry, Outcome):
                self._done(entry)
            else:
                entries[c.name] = entry
        self.emit({"at": "timing"})
        self._time(entries)
        return list(self.outcomes.values())

    def draw(self, most: int) -> None:
        """Draw up to `most` sets of operands with the same values, in memory of their own."""
        x = self.row.draw(self.device.torch_device)
        first = _Set(x, make_cotangents(x) if self.row.what == "backward" else None)
        tensors = (*x.operands(), *(first.cotangents or ()))
        self.set_bytes = sum(y.numel() * y.element_size() for y in tensors)
        count = max(1, min(most, -(-2 * self.device.l2 // max(1, self.set_bytes))))
        self.sets = [first, *(first.copy() for _ in range(count - 1))]

    def _done(self, outcome: Outcome) -> None:
        self.outcomes[outcome.contender] = outcome
        self.emit({"outcome": asdict(outcome)})

    def _reference(self) -> tuple[list[Part], str]:
        """Return the definition's results and no remark, or no results and a remark why."""
        (x, cotangents), device = self.sets[0], self.device
        try:
            if self.row.what == "step":
                return exact_step(x), ""
            if cotangents is not None:
                return exact_backward(x, *cotangents), ""
            seconds = SHARE["reference"] * self.seconds
            return exact_forward(x, seconds, device.clock, device.synchronize), ""
        except torch.OutOfMemoryError as error:
            return [], f"error not measured: {error_line(error)}"

    def _ready(self, c: Contender) -> _Entry | Outcome:
        """Check one contender and capture its work; return its outcome if it cannot be timed."""
        who = Outcome(c.name, c.version, c.is_peer, "measured", self.remark)
        if self.device.clock() - self.start > self.seconds:
            return replace(who, status="left out", reason="not measured: time")
        try:
            reasons = c.reasons(self.sets[0].inputs, self.row.what)
            if reasons:
                return replace(who, status="unsupported", reason="; ".join(reasons))
            return self._capture(c, who)
        except Exception as error:
            self._still_alive(c, error)
            return replace(who, status="failed", reason=error_line(error))

    def _still_alive(self, c: Contender, error: Exception) -> None:
        try:
            self.device.synchronize()
            self.device.forget()
        except Exception:
            raise BrokenDeviceError(f"{c.name}: {error_line(error)}") from error

    def _capture(self, c: Contender, who: Outcome) -> _Entry | Outcome:
        before = self.device.clock()
        whole, runs, results = self.first_call(c)
        self.device.synchronize()
        who = replace(who, first_call=self.device.clock() - before)
        who = replace(who, sets=len(self.sets), set_mib=self.set_bytes / 2**20)
        if self.parts:
            error, what = worst_error(self.parts, results)
            who = replace(who, error=error, error_of=what)
            limit = WRONG_ABOVE[self.row.dtype]
            # NaN is not within a limit.
            if not error <= limit:
                text = f"{what} is off by {error:.2g}, more than {limit:g}: no time is shown"
                return replace(who, status="wrong", reason=text)
        del results
        who = replace(who, peak=self.device.peak(whole).bytes / 2**20)
        for _ in range(WARMUPS):
            for run in runs:
                run()
        events = self.device.events(runs)
        events()
        once = max(events(), 1e-9)
        many = runs * max(1, min(MOST_REPEATS, round(GRAPH_SECONDS / once)))
        if not c.is_peer:
            who = replace(who, launches=time_launches(c.name, runs[0], self.device))
        replay, remark = capture(self.device, many)
        reason = "; ".join(filter(None, (who.reason, remark)))
        who = replace(who, reason=reason, kernel_by="events" if remark else "graph")
        return _Entry(who, runs, replay, len(many))

    def first_call(self, c: Contender) -> tuple[Run, list[Run], tuple[Tensor, ...]]:
        """Return the run that shows peak memory, the runs to time, and a first call's results."""
        if self.row.what == "backward":
            return self._backward_runs(c)
        if self.row.what == "step":
            ready = [c.step(x.map(Tensor.clone)) for x, _ in self.sets]
        else:
            ready = [c.sequence(x) for x, _ in self.sets]
        runs = [r.run for r in ready]
        # Steps in place go on with their states.
        return runs[0], runs, tuple(x.clone() for x in ready[0].results())

    def _backward_runs(self, c: Contender) -> tuple[Run, list[Run], tuple[Tensor, ...]]:
        def prepared(one: _Set) -> tuple[Grad, Grad]:
            leaves = one.inputs.with_grad()
            ready, operands = c.sequence(leaves), leaves.operands()
            with torch.enable_grad():
                kept = ready.results()

            def both() -> tuple[Tensor, ...]:
                with torch.enable_grad():
                    results = ready.results()
                return tuple(torch.autograd.grad(results, operands, one.cotangents))

            grad = functools.partial(
                torch.autograd.grad, kept, operands, one.cotangents, retain_graph=True
            )
            return both, grad

        pairs = [prepared(one) for one in self.sets]
        runs: list[Run] = [grad for _, grad in pairs]
        return pairs[0][0], runs, pairs[0][1]()

    def _time(self, entries: dict[str, _Entry]) -> None:
        """Time the entries in turns: first the device's work, then whole calls."""
        for name, entry in list(entries.items()):
            try:
                entry.replay()
            except Exception as error:
                self._done(replace(entry.outcome, status="failed", reason=error_line(error)))
                del entries[name]
        clock, seconds = self.device.clock, self.seconds
        replays = {n: e.replay for n, e in entries.items()}
        kernel = sample_in_turns(replays, SHARE["kernel"] * seconds, clock)
        card = self.device.card() if entries else Card()
        calls = {n: time_calls(e.runs, self.device) for n, e in entries.items()}
        wall = sample_in_turns(calls, SHARE["wall"] * seconds, clock)
        floor = roofline_seconds(self.row, self.device.name)
        for name, entry in entries.items():
            times = [t / entry.per_replay for t in kernel[name]]
            median = statistics.median(times)
            self._done(
                replace(
                    entry.outcome,
                    kernel=median * 1e3,
                    kernel_best=min(times) * 1e3,
                    samples=len(times),
                    wall=statistics.median(w for w, _ in wall[name]) * 1e3,
                    host=statistics.median(h for _, h in wall[name]) * 1e3,
                    roofline=floor / median if floor and median else None,
                    sm_mhz=card.sm_mhz,
                    memory_mhz=card.memory_mhz,
                )
            )
