"""Print the versions, and the rates that the GPU reaches: a matrix product and a copy."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable

import torch

SIDE = 8192
COPY_BYTES = 4 << 30
ROUNDS, WARMUPS = 10, 3


def seconds(run: Callable[[], object], rounds: int = ROUNDS) -> float:
    """Return the median time of a run on the GPU, by events."""
    for _ in range(WARMUPS):
        run()
    times = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def main() -> int:
    """Print a line per fact; without a GPU only the versions."""
    print(f"python {sys.version.split()[0]}, torch {torch.__version__}, cuda {torch.version.cuda}")
    for name in ("triton", "tilelang", "fla", "flash_qla", "gdn_ops"):
        try:
            print(f"{name} {__import__(name).__version__}", flush=True)
        except Exception as error:
            print(f"{name} cannot be imported: {type(error).__name__}: {error}", flush=True)
    if not torch.cuda.is_available():
        print("no GPU: no rates are measured")
        return 0
    facts = torch.cuda.get_device_properties(0)
    print(
        f"{facts.name}, {facts.multi_processor_count} processors, "
        f"{facts.total_memory / 2**30:.0f} GiB, L2 {facts.L2_cache_size / 2**20:.0f} MiB"
    )
    a, b = (torch.randn(SIDE, SIDE, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    rate = 2 * SIDE**3 / seconds(lambda: torch.mm(a, b)) / 1e12
    print(f"matrix product of {SIDE}, bfloat16, random: {rate:.0f} TFLOP/s", flush=True)
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    rate = 2 * COPY_BYTES / seconds(lambda: target.copy_(source)) / 1e12
    print(f"copy of 4 GiB, read and written: {rate:.2f} TB/s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
