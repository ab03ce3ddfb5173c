"""Make the first call of many candidates side by side, so that timing finds them compiled.

Each call runs in one of several worker processes. Compilers keep their results on disk, from where
the process that times takes them. What breaks the device, or hangs, ends such a process and costs a
single candidate.

Run as `python -m gdn_ops.bench.first_calls`, this is the worker.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

from gdn_ops.bench.candidates import Direction, directions
from gdn_ops.bench.child import Emit, StoppedError, Worker, carry_out_orders, spread
from gdn_ops.bench.contender import error_line
from gdn_ops.bench.device import find_device
from gdn_ops.bench.gpu.device import is_out_of_memory
from gdn_ops.bench.inputs import Setting, find_case
from gdn_ops.dispatch import registry
from gdn_ops.dispatch.backend import Backend
from gdn_ops.spec.language import Case

COMMAND = (sys.executable, "-m", "gdn_ops.bench.first_calls")

SECONDS = 180.0
"""The most for one call, its compilation included."""


class Trial(NamedTuple):
    """Name a candidate in a direction of a case."""

    case: str
    what: str
    candidate: str


def make_first_calls(
    backend: Backend,
    cases: Sequence[Case],
    setting: Setting,
    *,
    start: Callable[[], Worker] = lambda: Worker(COMMAND),
) -> Iterator[tuple[Trial, str]]:
    """Call every candidate of cases once, on all cores; yield each with its error, or ""."""
    trials = [
        Trial(case.name, direction.what, c.name)
        for case in cases
        for direction in directions(backend, case, setting)
        for c in direction.space
    ]
    given = {"backend": backend.name, "setting": asdict(setting)}
    orders = [{**given, **trial._asdict()} for trial in trials]
    for order, events in spread(orders, start, SECONDS, os.cpu_count() or 1):
        trial = Trial(*(order[name] for name in Trial._fields))
        if isinstance(events, StoppedError):
            yield trial, str(events)
        else:
            yield trial, next((event["failed"] for event in events if "failed" in event), "")


class Desk:
    """Carry out orders; keep the directions of the last case."""

    def __init__(self, emit: Emit) -> None:
        self.emit = emit
        self.case = ""
        self.known: dict[str, Direction] = {}

    def carry_out(self, order: dict[str, Any]) -> None:
        """Call a candidate; emit its error if it has one.

        Raises:
            RuntimeError: the device no longer answers, which ends the process.
        """
        device = find_device(order["setting"]["device"])
        try:
            direction = self._direction(order)
            (c,) = (c for c in direction.space if c.name == order["candidate"])
            direction.first_call(c)
            device.synchronize()
        except Exception as error:
            device.synchronize()
            # The others use the same memory: whether it is enough is told by the timing.
            if not is_out_of_memory(error):
                self.emit({"failed": error_line(error)})
        device.forget()

    def _direction(self, order: dict[str, Any]) -> Direction:
        if order["case"] != self.case:
            self.case, self.known = "", {}
            backend = registry.get_backend(order["backend"])
            assert not isinstance(backend, str), backend
            found = directions(backend, find_case(order["case"]), Setting(**order["setting"]))
            self.case, self.known = order["case"], {d.what: d for d in found}
        return self.known[order["what"]]


if __name__ == "__main__":
    carry_out_orders(lambda emit: Desk(emit).carry_out)
