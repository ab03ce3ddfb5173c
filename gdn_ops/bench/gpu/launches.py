"""Time each launch of a call of one of our backends, by events around it.

Backends of kernels launch by `launch` of their `host.launcher`. While a call is observed, those of
its modules that have it call one that records an event before and after.
"""

from __future__ import annotations

import contextlib
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any
from unittest import mock

from gdn_ops.bench.device import Run
from gdn_ops.bench.gpu.device import Cuda

CALLS = 5
"""Calls of which the median counts; one before them does not."""


def time_launches(backend: str, run: Run, device: Cuda) -> list[dict[str, Any]]:
    """Return "name" and the median time, "ms", of each launch of a run, in their order.

    Empty for a backend without launches, and where calls differ in what they launch.
    """
    root = f"gdn_ops.backends.{backend}."
    launcher = sys.modules.get(f"{root}host.launcher")
    if launcher is None:
        return []
    users = [module for name, module in sys.modules.items() if name.startswith(root)]
    calls: list[list[tuple[str, float]]] = []
    for _ in range(1 + CALLS):
        marks: list[tuple[str, Any, Any]] = []
        with _observed(launcher.launch, users, device, marks):
            # While the device is busy the host launches ahead, so that no gap is timed.
            device.keep_busy()
            run()
        device.synchronize()
        calls.append([(name, 1e3 * device.between(start, stop)) for name, start, stop in marks])
    _, *timed = calls
    if len({tuple(name for name, _ in call) for call in timed}) != 1:
        return []
    launches = zip(*timed, strict=True)
    return [
        {"name": same[0][0], "ms": statistics.median(ms for _, ms in same)} for same in launches
    ]


@contextlib.contextmanager
def _observed(
    real: Callable[..., None],
    users: Sequence[ModuleType],
    device: Cuda,
    marks: list[tuple[str, Any, Any]],
) -> Iterator[None]:
    """Mark each launch of modules before and after, on whichever thread it is made."""

    def launch(kernel: Any, *args: Any, **kwargs: Any) -> None:
        start = device.mark()
        real(kernel, *args, **kwargs)
        marks.append((kernel.__name__, start, device.mark()))

    with contextlib.ExitStack() as replaced:
        for module in users:
            if vars(module).get("launch") is real:
                replaced.enter_context(mock.patch.object(module, "launch", launch))
        yield
