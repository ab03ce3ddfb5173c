"""Measure time, memory, overhead and import, one function each; every function returns rows."""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence

import torch

from gdn_ops.bench.child import child_environment
from gdn_ops.bench.device import Peak, Run, find_device
from gdn_ops.bench.floors import Rates
from gdn_ops.bench.inputs import Inputs, Setting, make_inputs, make_output_gradient
from gdn_ops.bench.peers import Contender, our_contender
from gdn_ops.bench.rows import Result, Row, timed_row
from gdn_ops.bench.turns import interleave
from gdn_ops.bench.verify import RefusedError
from gdn_ops.call.bind import arguments_of, bind
from gdn_ops.dispatch import registry
from gdn_ops.spec.language import Case, Sizes
from gdn_ops.spec.ops import GATED_DELTA

IMPORT_REPEATS = 5
OVERHEAD_REPEATS = 2000
OVERHEAD_TOKENS = 8

_IMPORTS = (
    "import time; a = time.perf_counter(); import torch; b = time.perf_counter(); "
    "import gdn_ops; print(time.perf_counter() - b)"
)


def sequence_rows(
    what: str, case: Case, x: Inputs, contenders: Sequence[Contender], s: Setting, rates: Rates
) -> list[Row]:
    """Time the forward, or forward and backward, of all contenders in turns."""
    d_o = make_output_gradient(case.sizes, s.torch_dtype, s.device)

    def action(c: Contender) -> Run:
        if what == "forward":
            return c.sequence(x).run
        leaves = x.with_grad()
        call, operands = c.sequence(leaves), leaves.operands()
        return lambda: torch.autograd.grad(call.results()[0], operands, d_o)

    with torch.set_grad_enabled(what != "forward"):
        actions = {c.name: action(c) for c in contenders}
        timing = interleave(actions, s.repeats, device=find_device(s.device))
    peer = next((c.name for c in contenders if c.is_peer), None)
    floor = None
    if what == "forward":
        floor = rates.floor(GATED_DELTA, case.sizes, s.torch_dtype.itemsize) * 1e3
    rows = []
    for name, t in timing.items():
        ratio = timing[peer].median / t.median if peer is not None else None
        row = timed_row(what, case.name, name, "ms", t, ratio=ratio, against=peer, floor=floor)
        rows.append(row)
    return rows


def memory_rows(
    case: str,
    names: Sequence[str],
    peer: str | None,
    measure: Callable[[str], Peak | str],
    result: Result,
) -> None:
    """Measure peak memory, each contender in its own process; add rows, or why there is none.

    Args:
        case: its name.
        names: of the contenders.
        peer: the contender that the ratios are to; there are none without it.
        measure: returns the peak of the contender of a name, or why its process failed.
        result: gets a row for each peak.
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


def overhead_row(name: str, s: Setting) -> Row:
    """Measure the microseconds per call that `gated_delta` adds to the backend's own function."""
    sizes = Sizes(B=1, T=OVERHEAD_TOKENS, H=1, HV=1, K=16, V=16, N=1)
    x = make_inputs(sizes, s.torch_dtype, s.device)
    ours = our_contender(name)
    if isinstance(ours, str):
        raise RefusedError(f"backend {name!r} is not available: {ours}")
    public = ours.sequence(x).run
    call = bind(GATED_DELTA, arguments_of(GATED_DELTA, x.named()))
    backend = registry.select(call, name)
    with torch.no_grad():
        if not torch.equal(public(), backend.forward(call).o):
            raise RefusedError(f"gated_delta and backend {name!r} called directly differ")
        actions: dict[str, Callable[[], object]] = {
            "public": public,
            "backend": lambda: backend.forward(call),
        }
        timing = interleave(
            actions, OVERHEAD_REPEATS, warmups=20, device=find_device(s.device), collect=False
        )
    through, direct = timing["public"], timing["backend"]
    return Row(
        "overhead",
        f"T={OVERHEAD_TOKENS}",
        name,
        "us",
        (through.median - direct.median) * 1e6,
        (through.best - direct.best) * 1e6,
        OVERHEAD_REPEATS,
        against="Backend.forward on a bound call",
    )


def import_row() -> Row:
    """Measure the time that `import gdn_ops` adds to `import torch`, in fresh processes."""
    samples = []
    for _ in range(IMPORT_REPEATS):
        done = subprocess.run(
            [sys.executable, "-c", _IMPORTS],
            env=child_environment(),
            capture_output=True,
            text=True,
            check=True,
        )
        samples.append(float(done.stdout))
    median, best = statistics.median(samples), min(samples)
    against = "import torch"
    return Row("import", "-", "gdn_ops", "s", median, best, len(samples), against=against)
