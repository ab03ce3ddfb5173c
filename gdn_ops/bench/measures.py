"""Measure time, memory, overhead and import, one function each; every function returns rows."""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gdn_ops import ops
from gdn_ops.bench.child import child_environment
from gdn_ops.bench.floors import Rates
from gdn_ops.bench.inputs import Inputs, Setting, make_inputs, make_output_gradient, with_grad
from gdn_ops.bench.memory import measure_peak
from gdn_ops.bench.peers import Comparator
from gdn_ops.bench.rows import Row, make_row, timed_row
from gdn_ops.bench.runner import interleave
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
    what: str, case: Case, x: Inputs, comparators: Sequence[Comparator], s: Setting, rates: Rates
) -> list[Row]:
    """Time the forward, or forward and backward, of all comparators in turns."""
    d_o = make_output_gradient(case.sizes, s.torch_dtype, s.device)

    def action(c: Comparator) -> Callable[[], object]:
        if what == "forward":
            return lambda: c.run(x)
        leaves = with_grad(x)
        return lambda: torch.autograd.grad(c.run(leaves), leaves, d_o)

    with torch.set_grad_enabled(what != "forward"):
        timing = interleave({c.name: action(c) for c in comparators}, s.repeats, device=s.device)
    peer = next((c.name for c in comparators if c.is_peer), None)
    floor = rates.floor(GATED_DELTA, case.sizes, s.torch_dtype.itemsize) * 1e3
    rows = []
    for name, t in timing.items():
        ratio = timing[peer].median / t.median if peer is not None else None
        rows.append(
            timed_row(
                what,
                case.name,
                name,
                "ms",
                t,
                ratio=ratio,
                against=peer,
                floor=floor if what == "forward" else None,
                judged=s.judged,
            )
        )
    return rows


def memory_rows(
    case: Case, comparators: Sequence[Comparator], s: Setting
) -> tuple[list[Row], list[tuple[str, str, str]]]:
    """Measure the peak memory of forward and backward, each comparator in its own process."""
    peaks: dict[str, float] = {}
    skipped = []
    for c in comparators:
        peak = measure_peak(c.name, case.sizes, s.dtype, torch.get_num_threads(), s.device)
        if isinstance(peak, str):
            skipped.append(("memory", c.name, peak))
            continue
        peaks[c.name] = peak.bytes / 2**20
        if not peak.exact:
            skipped.append(("memory", c.name, "the high-water mark was not reset: a lower bound"))
    peer = next((c.name for c in comparators if c.is_peer and peaks.get(c.name)), None)
    rows = []
    for name, mib in peaks.items():
        ratio = mib / peaks[peer] if peer is not None else None
        rows.append(
            make_row(
                "memory",
                case.name,
                name,
                "MiB",
                mib,
                mib,
                1,
                ratio=ratio,
                against=peer,
                judged=s.judged,
            )
        )
    return rows, skipped


def overhead_row(name: str, s: Setting) -> Row:
    """Measure the microseconds per call that `gated_delta` adds to the backend's own function."""
    sizes = Sizes(B=1, T=OVERHEAD_TOKENS, H=1, HV=1, K=16, V=16, N=1)
    x = make_inputs(sizes, s.torch_dtype, s.device)

    def public() -> Tensor:
        return ops.gated_delta(x.q, x.k, x.v, log_alpha=x.log_alpha, beta=x.beta, backend=name)

    call = bind(GATED_DELTA, arguments_of(GATED_DELTA, x._asdict()))
    backend = registry.select(call, name)
    with torch.no_grad():
        if not torch.equal(public(), backend.forward(call).o):
            raise RefusedError(f"gated_delta and backend {name!r} called directly differ")
        timing = interleave(
            {"public": public, "backend": lambda: backend.forward(call)},
            OVERHEAD_REPEATS,
            warmups=20,
            device=s.device,
            collect=False,
        )
    public_time, backend_time = timing["public"], timing["backend"]
    return make_row(
        "overhead",
        f"T={OVERHEAD_TOKENS}",
        name,
        "us",
        (public_time.median - backend_time.median) * 1e6,
        (public_time.best - backend_time.best) * 1e6,
        OVERHEAD_REPEATS,
        against="Backend.forward on a bound call",
        judged=s.judged,
    )


def import_row(s: Setting) -> Row:
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
    return make_row(
        "import",
        "-",
        "gdn_ops",
        "s",
        median,
        best,
        len(samples),
        against="import torch",
        judged=s.judged,
    )
