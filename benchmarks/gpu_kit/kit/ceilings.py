"""Print the versions, the rates of a matrix product and of a copy, and whether caches are hit."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

SIDE = 8192
COPY_BYTES = 4 << 30
ROUNDS, WARMUPS = 10, 3
LAUNCHES, CACHE_SECONDS = 6, 12.0


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


def print_versions() -> None:
    """Print a line per package, the kit's own among them."""
    print(f"python {sys.version.split()[0]}, torch {torch.__version__}, cuda {torch.version.cuda}")
    for name in ("triton", "tilelang", "fla", "flash_qla", "gdn_ops"):
        try:
            print(f"{name} {__import__(name).__version__}", flush=True)
        except Exception as error:
            print(f"{name} cannot be imported: {type(error).__name__}: {error}", flush=True)


def print_rates() -> None:
    """Print what the GPU is, and the two rates."""
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


def look_into_cache() -> None:
    """Print how many launches find their code in the cache of Triton that came with the kit."""
    fill = Path(__file__).with_name("fill.py")
    command = [sys.executable, str(fill), "triton", "bench", "--most", str(LAUNCHES)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=CACHE_SECONDS)
        counts = json.loads(done.stdout.splitlines()[-1])
    except (subprocess.TimeoutExpired, ValueError, IndexError) as error:
        print(f"cache of triton: {type(error).__name__}: not known")
        return
    print(f"cache of triton: {counts['found']} kernels found, {counts['compiled']} compiled")


def main() -> int:
    """Print a line per fact."""
    print_versions()
    if torch.cuda.is_available():
        print_rates()
    else:
        print("no GPU: no rates are measured", flush=True)
    look_into_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
