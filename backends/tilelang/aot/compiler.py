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
import time
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from gdn_ops.aot.gpu_limits import AllowedSpills, Product, with_failures
from gdn_ops.aot.jobs import Job, compile_many, find_jobs
from gdn_ops.aot.results import CompiledKernel, Sample
from gdn_ops.backends.tilelang.aot import cubin
from gdn_ops.backends.tilelang.host.launcher import trace
from gdn_ops.dispatch.backend import Backend
from gdn_ops.kernel_support.launches import Launch


def compile_ahead(
    backend: Backend, target: str, samples: Iterable[Sample], allowed: AllowedSpills | None = None
) -> Iterator[CompiledKernel]:
    """Compile the kernels as `CompilesAhead.compile_ahead` says, in the order of their launches.

    `allowed` are the spills that a reference may have.

    Raises:
        ValueError: the target is not one of them.
        FileNotFoundError: there is no nvcc, or no cuobjdump.
    """
    cubin.check(target)
    yield from compile_jobs(find_jobs(backend, target, samples, _specialised), target, allowed)


def _specialised(launch: Launch, sample: Sample) -> tuple[Any, Job]:
    """Return the key of a launch, the same for the same code, and the job that compiles it."""
    key = (launch.kernel, *sorted(launch.kwargs.items()))
    return key, Job(sample.label, sample.is_reference, launch)


def compile_jobs(
    jobs: Iterable[Job], target: str, allowed: AllowedSpills | None = None
) -> Iterator[CompiledKernel]:
    """Compile kernels. They are traced one after the other: only what follows needs no GIL."""
    traced = [job._replace(source=_traced(job.launch)) for job in jobs]
    work = functools.partial(compile_job, target=target, allowed=allowed or {})
    yield from compile_many(traced, work)


def _traced(launch: Launch) -> Any:
    """Return the traced function of a launch, or the error that tracing raised."""
    try:
        return trace(launch.kernel, launch.kwargs)
    except Exception as error:
        return error


def compile_job(job: Job, target: str, allowed: AllowedSpills) -> CompiledKernel:
    """Compile one kernel and check its code; a failure to compile is a result too."""
    start = time.perf_counter()
    kernel, traced = job.launch.kernel, job.source
    result = functools.partial(
        CompiledKernel, kernel.__name__, job.sample, target, job.launch.kwargs
    )
    try:
        if isinstance(traced, Exception):
            raise traced
        found = cubin.compiled(traced, target)
    except Exception as error:
        return result(
            failures=(f"does not compile: {type(error).__name__}: {_reason(error, kernel)}",)
        )
    row = result(
        shared=found.shared,
        **found.usage._asdict(),
        seconds=time.perf_counter() - start,
    )
    products = cubin.products(traced)
    row = with_failures(row, products, job.is_reference, allowed)
    more = (*_rounded(products), *(found.remarks if job.is_reference else ()))
    return replace(row, failures=(*row.failures, *more))


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
