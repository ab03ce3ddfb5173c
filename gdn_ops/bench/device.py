"""Probe the device that is measured: its clock, its queue of work, and the peak memory of a run.

Host memory is the resident size. On Linux its high-water mark is reset through
/proc/self/clear_refs before a run; where that is not possible, an earlier peak may hide part of a
later one, and the result says so.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import re
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch

Run = Callable[[], object]


@dataclass(frozen=True)
class Peak:
    """Hold the peak memory of a run.

    Attributes:
        bytes: the most that was in use above the baseline.
        baseline: bytes in use before the run.
        exact: whether no earlier peak can hide this one.
    """

    bytes: int
    baseline: int
    exact: bool


class Device:
    """Measure on the CPU, and on devices that queue nothing.

    Attributes:
        is_gpu: whether kernels are compiled for it and its work is timed apart from the host's.
    """

    is_gpu = False

    def __init__(self, torch_device: str = "cpu") -> None:
        self.torch_device = torch_device

    clock = staticmethod(time.perf_counter)

    def working(self) -> AbstractContextManager[object]:
        """Return a context in which all work that is timed is made ready and runs."""
        return contextlib.nullcontext()

    def synchronize(self) -> None:
        """Wait for all work queued on the device."""

    def forget(self) -> None:
        """Give free cached memory back to the device."""

    def sampler(self, run: Run) -> tuple[Callable[[], float], str]:
        """Return a function that times a run, and a remark on what is in its time, or ""."""

        def timed() -> float:
            self.synchronize()
            start = self.clock()
            run()
            self.synchronize()
            return self.clock() - start

        return timed, ""

    def peak(self, run: Run) -> Peak:
        """Return the peak memory of a run."""
        _return_free_memory()
        exact = _reset_high_water()
        baseline = _status_bytes("VmRSS") or _high_water()
        run()
        return Peak(max(0, _high_water() - baseline), baseline, exact)


class TorchCuda(Device):
    """Measure on a CUDA or ROCm device through torch."""

    is_gpu = True

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.torch_device)

    def forget(self) -> None:
        torch.cuda.empty_cache()

    def peak(self, run: Run) -> Peak:
        self.synchronize()
        torch.cuda.reset_peak_memory_stats(self.torch_device)
        baseline = torch.cuda.memory_allocated(self.torch_device)
        result = run()
        self.synchronize()
        del result
        highest = torch.cuda.max_memory_allocated(self.torch_device)
        return Peak(max(0, highest - baseline), baseline, True)


@functools.cache
def find_device(name: str) -> Device:
    """Return the probes of a torch device."""
    return TorchCuda(name) if name.startswith("cuda") else Device(name)


def _status_bytes(field: str) -> int | None:
    """Return a size of /proc/self/status in bytes; None where there is no such file."""
    status = Path("/proc/self/status")
    text = status.read_text() if status.is_file() else ""
    entry = re.search(rf"^{field}:\s*(\d+)", text, re.MULTILINE)
    return None if entry is None else int(entry[1]) * 1024


def _high_water() -> int:
    """Return the highest resident size so far, in bytes.

    Not ru_maxrss where there is a choice: on Linux it starts at the parent's size.
    """
    mark = _status_bytes("VmHWM")
    if mark is not None:
        return mark
    import resource  # not on every platform

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _reset_high_water() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _return_free_memory() -> None:
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
