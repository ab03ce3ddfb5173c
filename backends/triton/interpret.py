"""How a kernel is launched: on a GPU by Triton, on CPU tensors by emulation.

    launch(kernel, grid, *arguments, CONSTEXPR=..., num_warps=4, ...)

is `kernel[grid](...)` where the tensors are on a GPU. Where they are on the CPU, every program of
the grid runs in Python, one after the other, on the memory of the tensors: the same source, the
same rounding of bfloat16 and of TF32, no environment variable, nothing patched. It is for checking:
a line of a kernel costs some twenty microseconds in every program.

Where they are on the meta device, nothing runs: inside `recording` a launch is noted, which is how
all launches of a call are found, and compiled ahead of time, without a GPU and without memory.

An access outside of the tensors of a launch is an error. What an emulation does not show: races
between programs, the order of additions, and a compiler that is wrong.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple


class Launch(NamedTuple):
    """One launch that was noted instead of run.

    Attributes:
        kernel: the jitted function.
        grid: one to three sizes.
        args: the positional arguments, tensors on the meta device among them.
        kwargs: the named arguments and the options of the launch.
    """

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Recording(NamedTuple):
    """The launches that a `recording` has noted, and the GPU they are meant for."""

    target: str
    launches: list[Launch]


_recording: contextvars.ContextVar[Recording | None] = contextvars.ContextVar(
    "recording", default=None
)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **kwargs: Any) -> None:
    """Launch a kernel over a grid.

    Args:
        kernel: a function decorated with `triton.jit`.
        grid: one to three sizes; no program runs where one of them is 0.
        args: the arguments of the kernel: tensors, numbers, None for what is absent. The first
            is a tensor, and where it is, the launch happens.
        kwargs: arguments by name, and options of the launch, like `num_warps`, which an
            emulation ignores.

    Raises:
        TypeError: in an emulation, an argument that the kernel does not have or take.
        ValueError: tensors on several devices, or a grid larger than a GPU's, in an emulation;
            tensors on the meta device outside of `recording`.
        IndexError: in an emulation, an access outside of the tensors of the launch.
    """
    where = args[0]
    if where.is_cuda:
        kernel[grid](*args, **kwargs)
    elif where.is_meta:
        _note(Launch(kernel, grid, args, kwargs))
    elif where.is_cpu:
        _emulate()(kernel, grid, args, kwargs)
    else:
        kernel[grid](*args, **kwargs)


def _emulate() -> Callable[..., None]:
    """Return the emulation, imported when it is first needed: a GPU does not need it."""
    from gdn_ops.backends.triton.interpret_launch import emulate

    return emulate


def _note(noted: Launch) -> None:
    recording = _recording.get()
    if recording is None:
        raise ValueError(
            f"{noted.kernel.__name__}: the first tensor is on the meta device, should be on cuda "
            f"or cpu"
        )
    recording.launches.append(noted)


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

    Whoever chooses by the device of a tensor asks this first: the meta device says nothing.
    """
    found = _recording.get()
    return None if found is None else found.target
