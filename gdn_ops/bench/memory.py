"""Measure the peak memory of one forward and backward, in a process of its own.

The child builds the operands, runs once on a short prefix so that libraries are loaded and
code is compiled, gives free memory back and notes its resident size: the baseline. Then it
runs once at full size. The result is the highest resident size since, minus the baseline.
On Linux the high-water mark is reset at the baseline through /proc/self/clear_refs; where
that is not possible, an earlier peak may hide part of the later one, and the child says so.
On CUDA devices the allocator's own peak is used.

Run as `python -m gdn_ops.bench.memory JSON`; prints JSON.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from gdn_ops.bench.child import ask
from gdn_ops.bench.inputs import make_inputs, make_output_gradient, with_grad
from gdn_ops.bench.peers import Comparator, comparator
from gdn_ops.spec.language import Sizes

WARMUP_TOKENS = 512


@dataclass(frozen=True)
class Peak:
    """Hold the peak memory that a child process measured.

    Attributes:
        bytes: highest resident size above the baseline.
        baseline: resident size before the run, in bytes.
        exact: whether the high-water mark could be reset.
    """

    bytes: int
    baseline: int
    exact: bool


def measure_peak(
    name: str, sizes: Sizes, dtype: str, threads: int, device: str = "cpu"
) -> Peak | str:
    """Return the peak memory of a comparator, or why its process failed.

    Args:
        name: of a backend or a peer.
        sizes: the axes.
        dtype: name of the dtype of q, k and v.
        threads: number that torch computes with.
        device: torch device.
    """
    order = {
        "name": name,
        "sizes": asdict(sizes),
        "dtype": dtype,
        "threads": threads,
        "device": device,
    }
    answer = ask("gdn_ops.bench.memory", order)
    return answer if isinstance(answer, str) else Peak(**answer)


def _status_bytes(field: str) -> int | None:
    """Return a size of /proc/self/status in bytes; None where there is no such file."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return None
    for line in status.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    return None


def _high_water() -> int:
    """Return the highest resident size so far, in bytes.

    Not ru_maxrss where there is a choice: on Linux it starts at the parent's size.
    """
    mark = _status_bytes("VmHWM")
    if mark is not None:
        return mark
    import resource  # not on every platform

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _reset_high_water() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _return_free_memory() -> None:
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _run_once(c: Comparator, sizes: Sizes, dtype: torch.dtype, device: str) -> Peak:
    x = with_grad(make_inputs(sizes, dtype, device))
    d_o = make_output_gradient(sizes, dtype, device)
    on_cuda = device.startswith("cuda")
    if on_cuda:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        baseline, exact = torch.cuda.memory_allocated(device), True
    else:
        _return_free_memory()
        exact = _reset_high_water()
        baseline = _status_bytes("VmRSS") or _high_water()
    torch.autograd.grad(c.run(x), x, d_o)
    peak = torch.cuda.max_memory_allocated(device) if on_cuda else _high_water()
    return Peak(max(0, peak - baseline), baseline, exact)


def _main(order: dict[str, Any]) -> None:
    torch.set_num_threads(order["threads"])
    sizes, dtype, device = Sizes(**order["sizes"]), getattr(torch, order["dtype"]), order["device"]
    c = comparator(order["name"])
    if isinstance(c, str):
        raise SystemExit(c)
    short = asdict(sizes) | {"T": min(sizes.T, WARMUP_TOKENS)}
    _run_once(c, Sizes(**short), dtype, device)
    print(json.dumps(asdict(_run_once(c, sizes, dtype, device))))


if __name__ == "__main__":
    _main(json.loads(sys.argv[1]))
