"""Profile the longest launches of a row of `bench gpu` with ncu: `python profile_launches.py ROW`.

ncu is the program that KIT_TOOL names. The clocks are left as they are.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter

import torch

from gdn_ops.bench.gpu.device import Cuda
from gdn_ops.bench.gpu.measuring import warm_row
from gdn_ops.bench.gpu.rows import find_row
from gdn_ops.bench.peers import find_contender

LONGEST = 3
SECTIONS = ("SpeedOfLight", "LaunchStats", "Occupancy", "WarpStateStats", "MemoryWorkloadAnalysis")
ONCE = "--once"


def call(row: str, backend: str) -> None:
    """Run a row twice: the second time everything is compiled."""
    contender = find_contender(backend)
    if isinstance(contender, str):
        raise SystemExit(f"{backend}: {contender}")
    device = Cuda()
    for _ in range(2):
        warm_row(find_row(row), contender, device)
    torch.cuda.synchronize()


def longest(row: str, backend: str) -> list[str]:
    """Return the names of the kernels with the most time, and print a line for each."""
    call(row, backend)
    times: Counter[str] = Counter()
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        call(row, backend)
    for event in profile.key_averages():
        times[event.key] += event.self_device_time_total
    ours = [(name, t) for name, t in times.most_common() if re.fullmatch(r"_?[a-z_0-9]+", name)]
    for name, microseconds in ours[:LONGEST]:
        print(f"{name}: {microseconds / 2:.1f} us a call", flush=True)
    return [name for name, _ in ours[:LONGEST]]


def main(row: str, backend: str = "triton", once: str = "") -> int:
    """Profile the longest kernels of a row; return the exit code of ncu."""
    if once:
        call(row, backend)
        return 0
    names = longest(row, backend)
    command = [os.environ["KIT_TOOL"], "--clock-control", "none", "--launch-count", str(LONGEST)]
    command += ["--kernel-name", f"regex:^({'|'.join(names)})$", "--launch-skip", str(len(names))]
    command += [word for section in SECTIONS for word in ("--section", section)]
    again = [sys.executable, __file__, row, backend, ONCE]
    return subprocess.run([*command, *again]).returncode


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
