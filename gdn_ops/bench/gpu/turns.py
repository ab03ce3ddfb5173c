"""Sample several contenders in turns, and time whole calls by the wall clock."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from gdn_ops.bench.gpu.device import Device, Run

ROUNDS = (5, 50)
"""Fewest and most interleaved rounds."""

Sampler = Callable[[], tuple[float, ...]]


def sample_in_turns(
    samplers: Mapping[str, Callable[[], tuple[float, ...]]],
    seconds: float,
    clock: Callable[[], float],
) -> dict[str, list[tuple[float, ...]]]:
    """Call samplers in turns; each round starts with the next one.

    Args:
        samplers: functions that measure once, by name.
        seconds: no round is added after this time, once there are ROUNDS[0].
        clock: seconds; monotonic.
    """
    names, (fewest, most) = list(samplers), ROUNDS
    found: dict[str, list[tuple[float, ...]]] = {name: [] for name in names}
    end = clock() + seconds
    for i in range(most if names else 0):
        if i >= fewest and clock() > end:
            break
        first = i % len(names)
        for name in names[first:] + names[:first]:
            found[name].append(samplers[name]())
    return found


def time_calls(runs: Sequence[Run], device: Device) -> Callable[[], tuple[float, ...]]:
    """Return a function that times a call: (until the device is done, until the call returns)."""
    turn = 0

    def sample() -> tuple[float, ...]:
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
