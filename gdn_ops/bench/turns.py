"""Time actions in turns: those that are compared share a process and every round.

Noise that lasts longer than a round, a warmer processor or a busier machine, meets all of them
alike. Every round starts with the next action, so none always follows the same one.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from gdn_ops.bench.device import Device, Run, find_device

Sample = TypeVar("Sample")

ROUNDS = (5, 50)
"""Fewest and most rounds where a time is given."""

REST = 0.1
"""Seconds before a sample in which the threads of whoever ran before stop waiting for work.

Those of onnxruntime spin for 50 ms, and take a processor each from a contender with threads of its
own: on two cores 94 ms became 163 ms.
"""


@dataclass(frozen=True)
class Timing:
    """Hold the samples of one action, in seconds."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        """Return the median of the samples, in seconds."""
        return statistics.median(self.samples)

    @property
    def best(self) -> float:
        """Return the shortest sample, in seconds."""
        return min(self.samples)


def take_turns(
    samplers: Mapping[str, Callable[[], Sample]], rounds: Iterable[int]
) -> dict[str, list[Sample]]:
    """Call samplers in turns, a round for each number when it is drawn; return all samples."""
    names = list(samplers)
    samples: dict[str, list[Sample]] = {name: [] for name in names}
    for i in rounds if names else ():
        first = i % len(names)
        for name in names[first:] + names[:first]:
            samples[name].append(samplers[name]())
    return samples


def rounds(count: int, *, collect: bool = True) -> Iterator[int]:
    """Count rounds; garbage is collected before each, unless `collect` is false."""
    for i in range(count):
        if collect:
            gc.collect()
        yield i


def interleave(
    actions: Mapping[str, Run],
    repeats: int,
    *,
    warmups: int = 1,
    device: Device | None = None,
    collect: bool = True,
    rest: float = 0.0,
) -> dict[str, Timing]:
    """Time whole actions in turns by the wall clock, after rounds that do not count.

    Their device is the CPU if it is None. Garbage is collected before each round unless `collect`
    is false, for microseconds. Before each sample nothing runs for `rest` seconds: REST where
    contenders have threads of their own.
    """
    on = find_device("cpu") if device is None else device
    calls = {name: rested(time_calls([action], on), rest) for name, action in actions.items()}
    samples = take_turns(calls, rounds(warmups + repeats, collect=collect))
    return {name: Timing(tuple(t for t, _ in values[warmups:])) for name, values in samples.items()}


def rested(sampler: Callable[[], Sample], seconds: float) -> Callable[[], Sample]:
    """Return a sampler that waits before each sample, if there are seconds to wait."""

    def sample() -> Sample:
        time.sleep(seconds)
        return sampler()

    return sample if seconds else sampler


def sample_in_turns(
    samplers: Mapping[str, Callable[[], Sample]], seconds: float, clock: Callable[[], float]
) -> dict[str, list[Sample]]:
    """Call samplers in turns; no round is added after `seconds`, once there are ROUNDS[0]."""
    fewest, most = ROUNDS
    end = clock() + seconds

    def rounds() -> Iterator[int]:
        for i in range(most):
            if i >= fewest and clock() > end:
                return
            yield i

    return take_turns(samplers, rounds())


def time_calls(runs: Sequence[Run], device: Device) -> Callable[[], tuple[float, float]]:
    """Return a function that times a call: (until the device is done, until the call returns)."""
    turn = 0

    def sample() -> tuple[float, float]:
        nonlocal turn
        run = runs[turn % len(runs)]
        turn += 1
        device.synchronize()
        start = device.clock()
        result = run()
        returned = device.clock()
        device.synchronize()
        done = device.clock()
        del result
        return done - start, returned - start

    return sample
