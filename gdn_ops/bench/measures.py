"""Measure time, memory, scaling, overhead and import, one function each.

Memory and scaling are measured in processes of their own: a high-water mark cannot be lowered
everywhere, and how cheap fresh memory pages are depends on what a process did before.
"""

from __future__ import annotations

import functools
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace

import torch

from gdn_ops import ops
from gdn_ops.bench.child import call, child_environment
from gdn_ops.bench.contender import Contender
from gdn_ops.bench.device import Peak, Run, find_device
from gdn_ops.bench.floors import Rates
from gdn_ops.bench.inputs import (
    Inputs,
    Setting,
    inputs_of,
    make_inputs,
    make_output_gradient,
)
from gdn_ops.bench.peers import find_contender
from gdn_ops.bench.rows import Result, Row, timed_rows
from gdn_ops.bench.turns import REST, Timing, interleave
from gdn_ops.bench.verify import RefusedError
from gdn_ops.call.bind import arguments_of, bind
from gdn_ops.dispatch import registry
from gdn_ops.spec.language import Case, Sizes
from gdn_ops.spec.ops import GATED_DELTA

IMPORT_REPEATS = 5
OVERHEAD_REPEATS = 2000
OVERHEAD_TOKENS = 8
WARMUP_TOKENS = 512

_IMPORTS = (
    "import time; a = time.perf_counter(); import torch; b = time.perf_counter(); "
    "import gdn_ops; print(time.perf_counter() - b)"
)


def sequence_rows(
    what: str, case: Case, x: Inputs, contenders: Sequence[Contender], s: Setting, rates: Rates
) -> list[Row]:
    """Time the forward, or forward and backward, of all contenders in turns."""
    d_o = make_output_gradient(case.sizes, s.torch_dtype, s.device)
    with torch.set_grad_enabled(what != "forward"), ExitStack() as contexts:
        for c in contenders:
            contexts.enter_context(c.context())
        actions = {c.name: c.run(what, x, d_o) for c in contenders}
        rest = REST if s.device == "cpu" else 0.0
        timing = interleave(actions, s.repeats, device=find_device(s.device), rest=rest)
    peers = [c.name for c in contenders if c.is_peer]
    floor = None
    if what == "forward":
        element, channels = s.torch_dtype.itemsize, case.channels
        floor = rates.floor(GATED_DELTA, case.sizes, element, channels=channels)
    ours = [c.name for c in contenders if not c.is_peer]
    return timed_rows(what, case.name, "ms", timing, peers, ours=ours, floor=floor)


def memory_rows(
    case: str,
    names: Sequence[str],
    peer: str | None,
    measure: Callable[[str], Peak | str],
    result: Result,
) -> None:
    """Add rows of the peak memory that `measure` finds, with ratios to a peer, to a result.

    Where `measure` returns a text, why a process failed, it is noted among what was left out.
    """
    peaks: dict[str, float] = {}
    for name in names:
        peak = measure(name)
        if isinstance(peak, str):
            result.skipped.append(("memory", name, peak))
            continue
        peaks[name] = peak.bytes / 2**20
        if not peak.exact:
            reason = "the high-water mark was not reset: a lower bound"
            result.skipped.append(("memory", name, reason))
    own = peaks.get(peer) if peer is not None else None
    for name, mib in peaks.items():
        ratio, against = (mib / own, peer) if own else (None, None)
        result.rows.append(Row("memory", case, name, "MiB", mib, mib, 1, ratio, against))


def _available(name: str) -> Contender:
    """Return a contender in a process of its own, which ends with the reason if there is none."""
    contender = find_contender(name)
    if isinstance(contender, str):
        raise SystemExit(contender)
    return contender


def measure_peak(name: str, case: Case, s: Setting) -> Peak:
    """Return the peak memory of a contender's forward and backward, for a process of its own.

    It runs on a short prefix first, so that libraries are loaded and code is compiled.
    """
    c, sizes = _available(name), case.sizes
    for size in (replace(sizes, T=min(sizes.T, WARMUP_TOKENS)), sizes):
        x = inputs_of(replace(case, sizes=size), s)
        d_o = make_output_gradient(size, s.torch_dtype, s.device)
        peak = find_device(s.device).peak(c.run("forward+backward", x, d_o))
    return peak


def channels_row(case: Case, c: Contender, x: Inputs, s: Setting) -> Row:
    """Compare the time of a forward whose key channels decay with one whose heads do."""
    of_heads = replace(x, log_alpha=x.log_alpha.mean(-1))
    runs = {"channels": c.sequence(x).run, "heads": c.sequence(of_heads).run}
    rest = REST if s.device == "cpu" else 0.0
    with torch.no_grad(), c.context():
        timing = interleave(runs, s.repeats, device=find_device(s.device), rest=rest)
    long, short = timing["channels"], timing["heads"]
    median, best = long.median / short.median, long.best / short.best
    against = "a decay of every head"
    return Row("channels", case.name, c.name, "x", median, best, s.repeats, against=against)


def scaling_row(case: Case, times: int, name: str, s: Setting) -> Row | str:
    """Compare the time of a forward `times` as long with `times` the time of the short forward.

    Returns:
        The row, or why the process failed.
    """
    long = replace(case.sizes, T=case.sizes.T * times)
    timing = call(_time_forwards, name, {"short": case, "long": replace(case, sizes=long)}, s)
    if isinstance(timing, str):
        return timing
    longer, shorter = timing["long"], timing["short"]
    median = longer.median / shorter.median / times
    best = longer.best / shorter.best / times
    against = f"T={long.T} over {times} times T={case.sizes.T}"
    return Row("scaling", case.name, name, "x", median, best, s.repeats, against=against)


def _time_forwards(name: str, cases: dict[str, Case], s: Setting) -> dict[str, Timing]:
    c = _available(name)
    runs = {what: c.sequence(inputs_of(case, s)).run for what, case in cases.items()}
    with torch.no_grad():
        return interleave(runs, s.repeats, device=find_device(s.device))


def overhead_row(name: str, s: Setting) -> Row:
    """Measure the microseconds per call that `gated_delta` adds to the backend's own function."""
    sizes = Sizes(B=1, T=OVERHEAD_TOKENS, H=1, HV=1, K=16, V=16, N=1)
    x = make_inputs(sizes, s.torch_dtype, s.device)
    public = functools.partial(ops.gated_delta, **x.named(), backend=name)
    bound = bind(GATED_DELTA, arguments_of(GATED_DELTA, x.named()))
    backend = registry.select(bound, name)
    with torch.no_grad():
        if not torch.equal(public(), backend.forward(bound).o):
            raise RefusedError(f"gated_delta and backend {name!r} called directly differ")
        actions: dict[str, Run] = {"public": public, "backend": lambda: backend.forward(bound)}
        device = find_device(s.device)
        timing = interleave(actions, OVERHEAD_REPEATS, warmups=20, device=device, collect=False)
    through, direct = timing["public"], timing["backend"]
    median, best = (through.median - direct.median) * 1e6, (through.best - direct.best) * 1e6
    case, against = f"T={OVERHEAD_TOKENS}", "Backend.forward on a bound call"
    return Row("overhead", case, name, "us", median, best, OVERHEAD_REPEATS, against=against)


def import_row() -> Row:
    """Measure the time that `import gdn_ops` adds to `import torch`, in fresh processes."""
    command, env = [sys.executable, "-c", _IMPORTS], child_environment()
    samples = [
        float(subprocess.check_output(command, env=env, stderr=subprocess.PIPE))
        for _ in range(IMPORT_REPEATS)
    ]
    median, best = statistics.median(samples), min(samples)
    against = "import torch"
    return Row("import", "-", "gdn_ops", "s", median, best, len(samples), against=against)
