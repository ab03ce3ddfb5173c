"""Measure our backends and the peers on one GPU, unattended, within a time limit.

First, side by side in processes of their own: a short check of every backend of ours, and a warm-up
of every contender, so that compilers fill their caches on all cores. A backend of ours that is
wrong, or that ends its process, is left out, and the run has failed; the others are timed. One
process measures row after row, the most important first; all contenders of a row take turns. What
ends that process costs one contender one row: the next process goes on without it. The result is
written after every row, and what was left out is named in it.

`python -m gdn_ops.bench.gpu` does the same with nothing but torch installed.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from gdn_ops import _interrupt
from gdn_ops.bench.gpu import report
from gdn_ops.bench.gpu.device import card_of
from gdn_ops.bench.gpu.schedule import SECONDS as SECONDS
from gdn_ops.bench.gpu.schedule import Plan, run
from gdn_ops.bench.peers import check_peers, peers_on
from gdn_ops.bench.rows import describe_system
from gdn_ops.dispatch import registry
from gdn_ops.environment.provenance import driver_version
from gdn_ops.terminal.output import print_json

PEERS = peers_on("cuda")


def make_plan(backends: Sequence[str], peers: Sequence[str], seconds: float) -> Plan:
    """Turn names into a plan; without backends, all that "auto" tries on CUDA but the definition.

    Raises:
        ValueError: a name is unknown.
    """
    check_peers(peers, "cuda")
    known = registry.known_backends()
    wanted = tuple(backends) or tuple(n for n in registry.auto_order("cuda") if n != "naive")
    usable, left_out = [], []
    for name in wanted:
        if not backends and name not in known:
            left_out.append((name, "this version has no such backend"))
            continue
        backend = registry.get_backend(name)
        if isinstance(backend, str):
            left_out.append((name, backend))
        elif not {"*", "cuda"} & set(backend.limits.devices):
            left_out.append((name, f"device cuda (supported: {', '.join(backend.limits.devices)})"))
        else:
            usable.append(name)
    return Plan(tuple(usable), tuple(peers), seconds, tuple(left_out))


def system(seconds: float) -> dict[str, Any]:
    """Return the device, its clocks, driver, versions and date that identify a run.

    Raises:
        ValueError: torch sees no GPU.
    """
    if not torch.cuda.is_available():
        raise ValueError("no GPU: torch.cuda.is_available() is False")
    device = torch.cuda.get_device_name(0)
    driver, card = driver_version(), asdict(card_of())
    return describe_system(device=device, card=card, driver=driver, seconds=seconds)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark from command-line arguments; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m gdn_ops.bench.gpu", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--backend", default="", help="backends, with commas between")
    parser.add_argument("--peer", default=",".join(PEERS), help='peers, or "none"')
    parser.add_argument("--seconds", type=float, default=SECONDS, help="time for everything")
    parser.add_argument("--out", type=Path, default=None, help="folder of the result")
    options = parser.parse_args(arguments)
    backends = [n for n in options.backend.split(",") if n]
    peers = [n for n in options.peer.split(",") if n not in ("", "none")]

    def measure() -> int:
        try:
            if not (math.isfinite(options.seconds) and options.seconds >= 1):
                raise ValueError(f"--seconds is {options.seconds}, should be at least 1")
            return show_run(backends, peers, options.seconds, options.out)
        except (ValueError, OSError) as error:
            print(f"bench gpu: {error}", file=sys.stderr)
            return 2

    return _interrupt.run(measure)


def show_run(
    backends: Sequence[str],
    peers: Sequence[str],
    seconds: float,
    out: Path | None,
    *,
    plot: Path | None = None,
    as_json: bool = False,
) -> int:
    """Run the benchmark, show and write its result; return 1 if a backend of ours fails, else 0.

    What happens is told line by line on stdout; where that is for JSON, on stderr.

    Raises:
        ValueError: a name is unknown, or there is no GPU.
    """
    folder = report.default_folder() if out is None else out
    plan = make_plan(backends, peers, seconds)
    result = run(plan, system(seconds), folder, _tell_on_stderr if as_json else print)
    written = report.write(result, folder, plot)
    if as_json:
        print_json(result.to_json())
    else:
        print(report.text(result))
        for path in written:
            print(path)
    return 1 if result.failed else 0


def _tell_on_stderr(text: str) -> None:
    print(text, file=sys.stderr)
