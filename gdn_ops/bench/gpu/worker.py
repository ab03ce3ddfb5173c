"""Run the worker process of `bench gpu`: one order a line on stdin, JSON events on stdout.

A kernel that hangs, a compiler that takes minutes or an illegal access ends this process and not
the benchmark. What peers print goes to stderr.

Run as `python -m gdn_ops.bench.gpu.worker`.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

from gdn_ops.bench.gpu.conformance import short_check
from gdn_ops.bench.gpu.device import Cuda, Device
from gdn_ops.bench.gpu.measuring import BrokenDeviceError, measure_row, warm_row
from gdn_ops.bench.gpu.peers import PEERS, Contender, contender
from gdn_ops.bench.gpu.result import Outcome
from gdn_ops.bench.gpu.rows import GpuRow, find_row

ENVIRONMENT = {"FLA_FLASH_QLA": "0", "FLA_CACHE_RESULTS": "0"}
"""Set for workers. fla would hand its calls to flash_qla, which is measured by itself; and it would
keep on disk which configurations were fastest while others were compiling beside it."""

WARM_TOKENS = 256

Emit = Callable[[dict[str, Any]], None]


class Desk:
    """Carry out orders; keep contenders from one order to the next."""

    def __init__(self, device: Device, emit: Emit) -> None:
        self.device, self.emit = device, emit
        self.known: dict[str, Contender | str] = {}

    def obey(self, order: dict[str, Any]) -> None:
        """Carry out one order; emit its events, the last one being {"done": True}."""
        kind = order["do"]
        if kind == "row":
            row, found = find_row(order["row"]), self._contenders(order["contenders"])
            measure_row(row, found, self.device, order["seconds"], self.emit)
        elif kind == "check":
            where, seconds = self.device.torch_device, order["seconds"]
            for state in short_check(order["backend"], where, seconds):
                self.emit({"conformance": asdict(state)})
        elif kind == "warm":
            for name in order["rows"]:
                self._warm(find_row(name), order["contender"])
        else:
            raise ValueError(f"unknown order {kind!r}")
        self.emit({"done": True})

    def _contenders(self, names: list[str]) -> list[Contender]:
        """Return the contenders that are available; emit the outcome of the others at once."""
        found = []
        for name in names:
            self.emit({"at": name})
            if name not in self.known:
                self.known[name] = contender(name)
            c = self.known[name]
            if isinstance(c, str):
                self.emit({"outcome": asdict(Outcome(name, "", name in PEERS, "unsupported", c))})
            else:
                found.append(c)
        return found

    def _warm(self, row: GpuRow, name: str) -> None:
        """Run a short version of a row, so that its kernels are in the compiler's cache."""
        if row.what != "step":
            lengths = tuple(min(n, WARM_TOKENS) for n in row.lengths)
            row = replace(row, lengths=lengths)
        for c in self._contenders([name]):
            try:
                warm_row(row, c, self.device)
            except Exception as error:
                # The row itself will say so; here the next one may do better.
                print(f"{row.name}: {error}", file=sys.stderr)
        self.emit({"warm": row.name})


def main() -> None:
    """Carry out the orders on stdin until it ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)

    def emit(event: dict[str, Any]) -> None:
        answers.write(json.dumps(event) + "\n")

    desk = Desk(Cuda(), emit)
    for line in sys.stdin:
        try:
            desk.obey(json.loads(line))
        except BrokenDeviceError as error:
            emit({"broken": str(error)})
            raise SystemExit(3) from None


if __name__ == "__main__":
    main()
