"""Avoid page faults on CPUs: huge pages for large results, and a heap that keeps its memory.

A fresh result of 32 MiB takes 8192 page faults on 4 KiB pages: 9 ms on the machine of
benchmarks/results, a tenth of the whole forward. Linux hands out 2 MiB pages under
`transparent_hugepage/enabled = madvise` (a common default) to memory that asks for them.

The C library's malloc returns freed temporaries to the system, and faults them in again at the
next chunk, until the process has once freed a large block (glibc: its mmap threshold is
dynamic). `settle_allocator` frees one, untouched.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable

import torch
from torch import Tensor

HUGE_PAGE = 2 << 20
MADV_HUGEPAGE = 14
MADV_POPULATE_WRITE = 23
SMALLEST = 2 * HUGE_PAGE


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    if sys.platform != "linux":
        return None
    try:
        function = ctypes.CDLL(None).madvise
    except (OSError, AttributeError):
        return None
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function


@functools.cache
def settle_allocator() -> None:
    """Make glibc's malloc keep temporaries of up to 31 MiB on its heap; once per process."""
    if sys.platform == "linux":
        torch.empty(31 << 20, dtype=torch.uint8, device="cpu")


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return an uninitialised contiguous tensor, on huge pages if it is large and on a CPU."""
    x = torch.empty(shape, dtype=dtype, device=device)
    _advise(x, MADV_HUGEPAGE)
    return x


def populate(x: Tensor) -> None:
    """Take the page faults of an uninitialised contiguous tensor now, all at once, if it is large.

    That takes less time than one after another, and may be done while there is nothing else to do.
    """
    _advise(x, MADV_POPULATE_WRITE)


def _advise(x: Tensor, advice: int) -> None:
    """Tell the operating system about the whole huge pages of a large tensor on a CPU.

    A refusal is ignored: it only costs time.
    """
    size = x.numel() * x.element_size() if x.device.type == "cpu" and type(x) is Tensor else 0
    function = _madvise() if size >= SMALLEST else None
    if function is not None:
        start = -(-x.data_ptr() // HUGE_PAGE) * HUGE_PAGE
        stop = (x.data_ptr() + size) // HUGE_PAGE * HUGE_PAGE
        function(start, stop - start, advice)
