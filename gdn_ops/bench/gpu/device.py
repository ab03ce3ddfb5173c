"""Wrap the GPU that `bench gpu` measures: its datasheet rates, its clocks, graphs and events.

Everything that touches a GPU is here, so that the rest is tested without one.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from gdn_ops.bench.contender import error_line
from gdn_ops.bench.device import Run, TorchCuda

WARMUPS = 3
"""Runs before a run is captured or timed."""

LEAD_CYCLES = 200_000
"""Cycles that the device is kept busy before a timed run: about a tenth of a millisecond."""

BUSY_CYCLES = 4_000_000
"""Cycles that the device is kept busy while a whole call is launched: about two milliseconds."""


class BrokenDeviceError(RuntimeError):
    """Report that the device no longer answers, and which contender ran last."""


@dataclass(frozen=True)
class Peaks:
    """Hold the datasheet rates of a device.

    Attributes:
        matrix: flops per second of dense 16-bit matrix products.
        float32: flops per second of float32 arithmetic outside the matrix units.
        bytes: per second, of device memory.
    """

    matrix: float
    float32: float
    bytes: float


PEAKS: tuple[tuple[str, Peaks], ...] = (
    ("H200", Peaks(989e12, 67e12, 4.8e12)),
    ("H100 PCIe", Peaks(756e12, 51e12, 2.0e12)),
    ("H100 NVL", Peaks(835e12, 60e12, 3.9e12)),
    ("H100", Peaks(989e12, 67e12, 3.35e12)),
    ("A100-SXM4-80GB", Peaks(312e12, 19.5e12, 2.039e12)),
    ("A100 80GB PCIe", Peaks(312e12, 19.5e12, 1.935e12)),
    ("A100", Peaks(312e12, 19.5e12, 1.555e12)),
    ("MI300X", Peaks(1307e12, 163.4e12, 5.3e12)),
)
"""By a part of the device's name, the more special first. A device that is not here has no roofline
fraction, rather than a wrong one."""


def find_peaks(name: str) -> Peaks | None:
    """Return the datasheet rates of a device, or None if they are not in the table."""
    return next((peaks for part, peaks in PEAKS if part in name), None)


@dataclass(frozen=True)
class Card:
    """Hold how fast a card may run now; None for what its driver does not tell.

    Attributes:
        sm_mhz, memory_mhz: clocks at the moment of asking; those of an idle card are low.
        most_sm_mhz, most_memory_mhz: the highest clocks.
        power_limit_w: watts.
    """

    sm_mhz: float | None = None
    memory_mhz: float | None = None
    most_sm_mhz: float | None = None
    most_memory_mhz: float | None = None
    power_limit_w: float | None = None


_ASKED = ("clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "power.limit")
"""List the queries of nvidia-smi for the fields of `Card`, in their order."""


def read_card(which: str) -> Card:
    """Ask nvidia-smi for the clocks and the limit of a card, by its index or UUID."""
    query = f"--query-gpu={','.join(_ASKED)}"
    command = ["nvidia-smi", f"--id={which}", query, "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return Card()
    values = [value.strip() for value in done.stdout.partition("\n")[0].split(",")]
    if len(values) != len(_ASKED):
        return Card()
    # Read "[N/A]" as what a card does not tell.
    return Card(*(float(v) if re.fullmatch(r"\d+(\.\d+)?", v) else None for v in values))


def card_of(index: int = 0) -> Card:
    """Return the clocks of a torch device; its index is not the driver's where some are hidden."""
    uuid = getattr(torch.cuda.get_device_properties(index), "uuid", None)
    return read_card(str(index) if uuid is None else f"GPU-{uuid}")


class Cuda(TorchCuda):
    """Capture and time the work of a CUDA or ROCm device.

    Attributes:
        name: as the driver tells it.
        l2: bytes of its last-level cache.
    """

    def __init__(self, index: int = 0) -> None:
        super().__init__(f"cuda:{index}")
        torch.cuda.set_device(index)
        p = torch.cuda.get_device_properties(index)
        self.name, self.l2 = str(p.name), int(getattr(p, "L2_cache_size", 0))
        # Neither kernels nor backward nodes of the default stream can be captured.
        self._stream = torch.cuda.Stream(index)

    def working(self) -> AbstractContextManager[object]:
        return torch.cuda.stream(self._stream)

    def graph(self, runs: Sequence[Run]) -> Callable[[], float]:
        """Capture runs in order into one graph; return a function that replays and times it."""
        self._look_for_waits(runs[0])
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream):
            for run in runs:
                run()
        return self._timed(graph.replay)

    def _look_for_waits(self, run: Run) -> None:
        """Raise an error if a run waits for the device, before a capture of it can fail."""
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode(before)

    def events(self, runs: Sequence[Run]) -> Callable[[], float]:
        """Return a function that runs all runs back to back and times the device's work."""

        def all_runs() -> None:
            for run in runs:
                run()

        return self._timed(all_runs)

    def _timed(self, work: Callable[[], object]) -> Callable[[], float]:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))

        def timed() -> float:
            # The device is kept busy while the host launches, so that launching is not timed.
            torch.cuda._sleep(LEAD_CYCLES)
            start.record()
            work()
            stop.record()
            stop.synchronize()
            return float(start.elapsed_time(stop)) / 1e3

        return timed

    def keep_busy(self) -> None:
        """Give the device nothing to do for as long as a call takes to launch."""
        torch.cuda._sleep(BUSY_CYCLES)

    def mark(self) -> torch.cuda.Event:
        """Record the moment at which the device comes here."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, start: torch.cuda.Event, stop: torch.cuda.Event) -> float:
        """Return the seconds between two marks that the device has passed."""
        return float(start.elapsed_time(stop)) / 1e3

    def card(self) -> Card:
        """Return the clocks of the card as they are now."""
        return card_of(torch.device(self.torch_device).index or 0)

    def sampler(self, run: Run) -> tuple[Callable[[], float], str]:
        for _ in range(WARMUPS):
            run()
        return capture(self, [run])


def capture(device: Cuda, runs: Sequence[Run]) -> tuple[Callable[[], float], str]:
    """Return a function that times the device's work of runs, and "" or why launches are in it.

    Raises:
        RuntimeError: there is no memory for a graph, or the device no longer answers.
    """
    try:
        replay = device.graph(runs)
        replay()
    except RuntimeError as error:
        device.synchronize()
        if is_out_of_memory(error):
            raise
        return device.events(runs), f"not captured: {error_line(error)}"
    return replay, ""


def is_out_of_memory(error: BaseException | None) -> bool:
    """Return whether an error, or one during whose handling it was raised, is for want of memory.

    What ends a capture hides why it failed behind an error of its own.
    """
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False
