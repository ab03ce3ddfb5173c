"""Time actions interleaved: those that are compared take turns in one process."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Timing:
    """Hold the wall-clock samples of one action, in seconds."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        """Return the median of the samples, in seconds."""
        return statistics.median(self.samples)

    @property
    def best(self) -> float:
        """Return the shortest sample, in seconds."""
        return min(self.samples)


def finish(device: str) -> None:
    """Wait for work queued on a device, so that a clock read after it counts it."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def interleave(
    actions: Mapping[str, Callable[[], object]],
    repeats: int,
    *,
    warmups: int = 1,
    device: str = "cpu",
    collect: bool = True,
    clock: Callable[[], float] = time.perf_counter,
    on_round: Callable[[int], None] | None = None,
) -> dict[str, Timing]:
    """Time actions in turns: each round runs every action once.

    Noise that lasts longer than a round, a warmer processor or a busier machine, meets all of
    them alike. Every round starts with the next action, so none always follows the same one.

    Args:
        actions: by name; results are dropped.
        repeats: rounds that count.
        warmups: rounds before them that do not.
        device: torch device that the actions compute on.
        collect: whether to collect garbage before each round; not for microseconds.
        clock: seconds; monotonic.
        on_round: told the number of each finished round, warm-ups included.

    Returns:
        Timing by name.
    """
    names = list(actions)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for i in range(warmups + repeats):
        first = i % len(names)
        if collect:
            gc.collect()
        for name in names[first:] + names[:first]:
            finish(device)
            start = clock()
            result = actions[name]()
            finish(device)
            stop = clock()
            del result
            if i >= warmups:
                samples[name].append(stop - start)
        if on_round is not None:
            on_round(i + 1)
    return {name: Timing(tuple(values)) for name, values in samples.items()}
