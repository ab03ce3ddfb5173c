"""Launch a kernel: on a GPU by Triton, on CPU tensors by emulation.

    launch(kernel, grid, *arguments, CONSTEXPR=..., num_warps=4, ...)

is `kernel[grid](...)` where the tensors are on a GPU, on that GPU whichever is the current one.
Where they are on the CPU, every program of the grid runs in Python, one after the other, on the
memory of the tensors: the same source, the same rounding of bfloat16 and of TF32, no environment
variable, nothing patched. It is for checking: a line of a kernel costs some twenty microseconds in
every program.

Where they are on the meta device, nothing runs: inside `recording` of
`gdn_ops.kernel_support.launches` a launch is recorded.

An access outside of the tensors of a launch is an error. What an emulation does not show: races
between programs, the order of additions, and a compiler that is wrong.
"""

from __future__ import annotations

from typing import Any

import torch
import triton

from gdn_ops.backends.triton.kernels import settle_keys
from gdn_ops.kernel_support.launches import Launch, note


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **kwargs: Any) -> None:
    """Launch a kernel over a grid.

    Args:
        kernel: a function decorated with `triton.jit`.
        grid: one to three sizes; no program runs where one of them is 0.
        args: the arguments of the kernel: tensors, numbers, None for what is absent. The first
            is a tensor, whose device is that of the launch.
        kwargs: arguments by name, and options of the launch, like `num_warps`, which an
            emulation ignores. With TMA=True the kernel makes tensor descriptors.

    Raises:
        TypeError: in an emulation, an argument that the kernel does not have or take.
        ValueError: tensors on several devices, or a grid larger than a GPU's, in an emulation;
            tensors on the meta device outside of `recording`.
        IndexError: in an emulation, an access outside of the tensors of the launch.
    """
    where = args[0]
    if where.is_meta:
        note(Launch(kernel, grid, args, kwargs))
    elif where.is_cpu:
        # A GPU does not need the emulation.
        from gdn_ops.backends.triton.emulation.programs import emulate

        emulate(kernel, grid, args, kwargs)
    elif where.device.index == torch.cuda.current_device():
        _launch(kernel, grid, args, kwargs)
    else:
        with torch.cuda.device(where.device):
            _launch(kernel, grid, args, kwargs)


def _launch(kernel: Any, grid: tuple[int, ...], args: Any, kwargs: dict[str, Any]) -> None:
    """Launch a kernel on the current GPU."""
    settle_keys()
    if kwargs.get("TMA"):
        # It is of this thread and context: autograd runs backwards on threads of its own.
        triton.set_allocator(_allocate)
    kernel[grid](*args, **kwargs)


def _allocate(size: int, alignment: int, stream: int | None) -> torch.Tensor:
    """Return memory of the current GPU for descriptors; torch aligns it to 512 bytes."""
    return torch.empty(size, dtype=torch.int8, device="cuda")
