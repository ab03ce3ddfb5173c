"""Note the kernel launches of a call instead of running them.

A call on meta tensors inside `recording` runs nothing. Each launch that it makes is noted, with its
kernel, its arguments and its constants, so that all of them are found, counted and compiled ahead
of time, without a GPU and without memory.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any, NamedTuple


class Launch(NamedTuple):
    """Describe one launch that was noted instead of run.

    Attributes:
        kernel: the function that was launched: for Triton it is jitted, for TileLang it makes
            the kernel.
        grid: one to three sizes; nothing where the kernel itself says how large its grid is.
        args: the positional arguments, tensors on the meta device among them.
        kwargs: the named arguments, and the options of the launch.
    """

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Recording(NamedTuple):
    """Hold the launches that a `recording` has noted, and the GPU they are meant for."""

    target: str
    launches: list[Launch]


_recording: contextvars.ContextVar[Recording | None] = contextvars.ContextVar(
    "recording", default=None
)


def note(launch: Launch) -> None:
    """Note a launch whose first tensor is on the meta device.

    Raises:
        ValueError: outside of `recording`, where nothing could run it.
    """
    current = _recording.get()
    if current is None:
        raise ValueError(
            f"{launch.kernel.__name__}: the first tensor is on the meta device, should be on cuda "
            f"or cpu"
        )
    current.launches.append(launch)


@contextlib.contextmanager
def recording(target: str) -> Iterator[list[Launch]]:
    """Note the launches of this thread on meta tensors, as they would be made for a target.

    Args:
        target: name of a GPU, like "sm_90"; `recorded_target` returns it.

    Yields:
        The launches, in their order.
    """
    noted: list[Launch] = []
    token = _recording.set(Recording(target, noted))
    try:
        yield noted
    finally:
        _recording.reset(token)


def recorded_target() -> str | None:
    """Return the GPU that launches are noted for, or None outside of `recording`.

    Code that chooses by the device of a tensor asks this first: the meta device is no GPU.
    """
    current = _recording.get()
    return None if current is None else current.target
