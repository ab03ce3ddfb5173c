"""Memory for large results on CPUs is taken at once where asked for, and keeps its values."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path

import pytest
import torch

from gdn_ops.kernel_support.host_memory import SMALLEST, empty, populate

CPU = torch.device("cpu")


def resident() -> int:
    """Return the bytes of this process that are in memory."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux takes the advice")
def test_memory_is_there_once_it_is_populated() -> None:
    release = tuple(int(part) for part in platform.release().split(".")[:2])
    if release < (5, 14):
        pytest.skip(f"Linux {platform.release()} cannot populate memory")
    size = 64 << 20
    x = empty((size,), torch.uint8, CPU)
    before = resident()
    populate(x)
    # All whole huge pages are.
    assert resident() - before >= size - SMALLEST


def test_what_is_populated_keeps_its_values() -> None:
    for shape in ((3,), (2 * SMALLEST,), (0, 4)):
        x = empty(shape, torch.uint8, CPU).fill_(7)
        populate(x)
        assert bool((x == 7).all())
    populate(torch.empty(2 * SMALLEST, dtype=torch.uint8, device="meta"))
