"""Run the worker process of `bench gpu`, which checks, warms up and measures.

Run as `python -m gdn_ops.bench.gpu.worker`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from gdn_ops.bench.child import Emit, carry_out_orders
from gdn_ops.bench.contender import Contender
from gdn_ops.bench.gpu.conformance import short_check
from gdn_ops.bench.gpu.device import BrokenDeviceError, Cuda
from gdn_ops.bench.gpu.measuring import measure_row, warm_row
from gdn_ops.bench.gpu.result import Outcome
from gdn_ops.bench.gpu.rows import GpuRow, find_row
from gdn_ops.bench.peers import PEERS, find_contender

COMMAND = (sys.executable, "-m", "gdn_ops.bench.gpu.worker")


class Desk:
    """Carry out orders; keep contenders from one order to the next."""

    def __init__(self, device: Cuda, emit: Emit) -> None:
        self.device, self.emit = device, emit
        self.known: dict[str, Contender | str] = {}

    def carry_out(self, order: dict[str, Any]) -> None:
        """Carry out one order and emit its events; end the process that has a broken device."""
        kind = order["do"]
        if kind == "row":
            row, contenders = find_row(order["row"]), self._contenders(order["contenders"])
            try:
                measure_row(row, contenders, self.device, order["seconds"], self.emit)
            except BrokenDeviceError as error:
                self.emit({"broken": str(error)})
                raise SystemExit(3) from None
        elif kind == "check":
            where, seconds = self.device.torch_device, order["seconds"]
            for state in short_check(order["backend"], where, seconds):
                self.emit({"conformance": asdict(state)})
        elif kind == "warm":
            for name in order["rows"]:
                self._warm(find_row(name), order["contender"])
        else:
            raise ValueError(f"unknown order {kind!r}")

    def _contenders(self, names: list[str]) -> list[Contender]:
        """Return the contenders that are available; emit the outcome of the others at once."""
        usable = []
        for name in names:
            self.emit({"at": name})
            if name not in self.known:
                self.known[name] = find_contender(name)
            c = self.known[name]
            if isinstance(c, str):
                self.emit({"outcome": asdict(Outcome(name, "", name in PEERS, "unsupported", c))})
            else:
                usable.append(c)
        return usable

    def _warm(self, row: GpuRow, name: str) -> None:
        """Call a contender once on a row as it is, so that its kernels are in the compiler's cache.

        A shorter row would not do: compilers make code for numbers that are 1, or that 16 divides,
        and backends choose by lengths.
        """
        for c in self._contenders([name]):
            try:
                warm_row(row, c, self.device)
            except Exception as error:
                # The row itself will say so; here the next one may do better.
                print(f"{row.name}: {error}", file=sys.stderr)
        # Others work beside it.
        self.device.forget()
        self.emit({"warm": row.name})


def start(emit: Emit) -> Callable[[dict[str, Any]], None]:
    """Return a function that carries out orders until a contender breaks the device."""
    return Desk(Cuda(), emit).carry_out


if __name__ == "__main__":
    carry_out_orders(start)
