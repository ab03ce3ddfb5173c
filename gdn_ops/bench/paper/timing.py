"""Time actions in turns until a time is up, with the energy that they take where it is counted."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch

from gdn_ops.bench.device import Device, Run
from gdn_ops.bench.paper.energy import Counter
from gdn_ops.bench.turns import take_turns, time_calls

MOST = 9
"""Timed rounds at most."""


@dataclass(frozen=True)
class Sample:
    """Hold what one run took: seconds, and joules where they are counted."""

    seconds: float
    joules: float | None = None


@dataclass(frozen=True)
class Spread:
    """Hold the samples of one action."""

    samples: tuple[Sample, ...]

    @property
    def median(self) -> float:
        """Return the median time, in seconds."""
        return statistics.median(x.seconds for x in self.samples)

    @property
    def least(self) -> float:
        """Return the shortest time, in seconds."""
        return min(x.seconds for x in self.samples)

    @property
    def most(self) -> float:
        """Return the longest time, in seconds."""
        return max(x.seconds for x in self.samples)

    @property
    def joules(self) -> float | None:
        """Return the median energy, in J; None where it is not counted."""
        counted = [x.joules for x in self.samples if x.joules is not None]
        return statistics.median(counted) if counted else None


def rounds_within(seconds: float, clock: Callable[[], float] = time.monotonic) -> Iterator[int]:
    """Count rounds: one in any case, then further ones, up to MOST, while they fit.

    A round fits where one as long as the longest so far ends before `seconds` have passed.
    """
    start = clock()
    longest, before = 0.0, start
    for i in range(MOST):
        now = clock()
        longest, before = max(longest, now - before), now
        if i and now + longest > start + seconds:
            return
        gc.collect()
        yield i


def measure(
    actions: Mapping[str, Run],
    seconds: float,
    device: Device,
    counter: Counter | None = None,
    *,
    warm: Iterable[str] | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> tuple[dict[str, Spread], dict[str, str]]:
    """Time actions in turns, after calls that do not count.

    Args:
        actions: what is timed, by name.
        seconds: after which no round is begun, but for the first one.
        device: that they run on.
        counter: of energy.
        warm: names of those that are called once before; all if None.
        clock: says when the time is up.

    Returns:
        What they took, and of those that had no memory, why they are left out.
    """
    left_out: dict[str, str] = {}
    samplers = {
        name: _sampler(name, action, device, counter, left_out) for name, action in actions.items()
    }
    start = clock()
    for name in actions if warm is None else warm:
        samplers[name]()
    taken = take_turns(samplers, rounds_within(seconds - (clock() - start), clock))
    spreads = {
        name: Spread(tuple(x for x in samples if x is not None))
        for name, samples in taken.items()
        if name not in left_out
    }
    return spreads, left_out


def _sampler(
    name: str, action: Run, device: Device, counter: Counter | None, left_out: dict[str, str]
) -> Callable[[], Sample | None]:
    """Return a function that runs an action and says what it took; None for lack of memory."""
    timed = time_calls([action], device)

    def sample() -> Sample | None:
        if name in left_out:
            return None
        try:
            before = None if counter is None else counter.joules()
            seconds, _ = timed()
        except torch.OutOfMemoryError as error:
            left_out[name] = f"out of memory: {str(error).splitlines()[0]}"
            device.forget()
            return None
        if counter is None or before is None:
            return Sample(seconds)
        return Sample(seconds, counter.joules() - before)

    return sample
