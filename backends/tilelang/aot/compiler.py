"""Compile every launch of a call ahead of time for a GPU, and check the code against its limits.

Calls are made on meta tensors inside `recording`, so the launches are those of the backend itself:
its configurations, its constants. A kernel is compiled once for every choice of constants: the
sizes of tensors shape no code, and offsets take 64 bits.

Beside what `gdn_ops.aot.gpu_limits` forbids on a target, code fails

    with a product of float32 tiles: TileLang multiplies them in TF32
    with a performance warning of ptxas, like products that wait for each other, in a reference
"""

from __future__ import annotations

import functools
import inspect
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from gdn_ops.aot import jobs
from gdn_ops.aot.budgets import Budgets
from gdn_ops.aot.gpu_limits import AllowedSpills, Product
from gdn_ops.aot.jobs import Built, Job
from gdn_ops.aot.results import CompiledKernel, Sample
from gdn_ops.backends.tilelang.aot import accesses, cubin
from gdn_ops.backends.tilelang.aot.loops import loops_of
from gdn_ops.backends.tilelang.host.launcher import trace
from gdn_ops.dispatch.backend import Backend
from gdn_ops.kernel_support.launches import Launch

LANES = 32
"""Threads of a warp."""


def compile_ahead(
    backend: Backend,
    target: str,
    samples: Iterable[Sample],
    allowed: AllowedSpills | None = None,
    budgets: Budgets | None = None,
) -> Iterator[CompiledKernel]:
    """Compile the kernels that a backend launches, and judge them.

    Args:
        backend: one whose kernels are TileLang's.
        target: one of `config.TARGETS`.
        samples: calls on meta tensors.
        allowed: the spills that a reference may have.
        budgets: what the launches of the reference case may cost.

    Raises:
        ValueError: the target is not one of them.
        FileNotFoundError: there is no nvcc, or no cuobjdump.
    """
    cubin.check(target)
    compiler = jobs.Compiler(_specialise, _reason)
    yield from jobs.compile_ahead(backend, target, samples, allowed, budgets, compiler)


def _specialise(launch: Launch, target: str) -> tuple[Any, Job]:
    key = (launch.kernel, *sorted(launch.kwargs.items()))
    return key, Job(launch.kernel, launch.kwargs, functools.partial(_build, launch, target))


def _build(launch: Launch, target: str) -> Built:
    with jobs.front_end:
        traced = trace(launch.kernel, launch.kwargs)
    facts, products = cubin.compiled(traced, target), cubin.products(traced)
    copiers = facts.threads // LANES - launch.kwargs["threads"] // LANES
    return Built(
        shared=facts.shared,
        warps=facts.threads // LANES,
        copiers=copiers,
        usage=facts.usage,
        products=products,
        failures=tuple(_rounded(products)),
        remarks=facts.remarks,
        grid=functools.partial(accesses.grid, function=traced),
        moved=functools.partial(accesses.moved, function=traced),
        loops=functools.partial(loops_of, function=traced, has_copiers=copiers > 0),
        turned=functools.partial(
            loops_of, function=traced, has_copiers=copiers > 0, copiers_first=True
        ),
    )


def _rounded(products: Iterable[Product]) -> Iterator[str]:
    for m, n, k, dtype in products:
        if dtype == "float32":
            yield f"a float32 product of {m} x {k} by {k} x {n} is one in TF32"
            return


def _reason(error: Exception, kernel: Any) -> str:
    """Return the first line of a compiler's error, and the line of the kernel that it points at.

    The passes mark a line with a ^ below it. An error of the trace has it in its traceback.
    """
    lines = [line.strip() for line in str(error).strip().splitlines()] or [""]
    marks = [i for i, line in enumerate(lines) if line.strip("| ") == "^" and i > 0]
    where = [lines[i - 1].partition("|")[2].strip() for i in marks]
    folder = Path(inspect.getfile(kernel)).parent
    frames = traceback.extract_tb(error.__traceback__)
    where += [f.line for f in frames[::-1] if Path(f.filename).parent == folder and f.line]
    return f"{lines[0]}, in: {where[0]}" if where else lines[0]
