"""Compile every launch of a call ahead of time for a GPU, and check the code against its limits.

Calls are made on meta tensors inside `recording`, so the launches are those of the backend itself:
its configurations, its grids, its constants. Each is specialised by Triton as a launch would be
(what is divisible by 16, what is 1, which pointers stay below 2 GiB) and compiled without a driver.
A launch that is specialised like an earlier one is compiled once. What a target forbids is in
`gdn_ops.aot.gpu_limits`.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from gdn_ops.aot.gpu_limits import AllowedSpills, with_failures
from gdn_ops.aot.jobs import Job, compile_many, find_jobs
from gdn_ops.aot.results import CompiledKernel, Sample
from gdn_ops.backends.triton.aot.usage import products, usage
from gdn_ops.dispatch.backend import Backend
from gdn_ops.kernel_support.launches import Launch

TARGETS: dict[str, GPUTarget] = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
"""A100, H100 and H200, B200, MI300: backend, architecture, threads of a warp."""


_front_end = threading.Lock()


class _Source(ASTSource):  # type: ignore[misc]
    """Describe a kernel whose source is translated by one thread at a time.

    Before 3.11.8 Python's ast.parse raises a SystemError where two threads parse at once. The
    translation holds the GIL anyway; what takes time comes after it.
    """

    def make_ir(self, *args: Any, **kwargs: Any) -> Any:
        with _front_end:
            return super().make_ir(*args, **kwargs)


def compile_ahead(
    backend: Backend, target: str, samples: Iterable[Sample], allowed: AllowedSpills | None = None
) -> Iterator[CompiledKernel]:
    """Compile the kernels as `CompilesAhead.compile_ahead` says, in the order of their launches.

    `allowed` are the spills that a reference may have.
    """
    jobs = find_jobs(backend, target, samples, lambda x, sample: specialised(x, target, sample))
    work = functools.partial(compile_job, target=target, allowed=allowed or {})
    yield from compile_many(jobs, work)


def specialised(launch: Launch, target: str, sample: Sample) -> tuple[Any, Job]:
    """Return the key of a launch, the same for the same code, and the job that compiles it."""
    kernel, compiler = launch.kernel, _compiler(target)
    bound, specialisation, _ = _binder(kernel, target)(*launch.args, **launch.kwargs)
    options, signature, constexprs, attrs = kernel._pack_args(
        compiler, launch.kwargs, bound, specialisation, {}
    )
    key = (kernel.cache_key, repr(specialisation), repr(options))
    source = _Source(kernel, signature, constexprs, attrs)
    return key, Job(sample.label, sample.is_reference, launch, source, options)


@functools.cache
def _compiler(target: str) -> Any:
    return make_backend(TARGETS[target])


@functools.cache
def _binder(kernel: Any, target: str) -> Any:
    """Return Triton's function that maps the arguments of a launch to their specialisation."""
    return create_function_from_signature(kernel.signature, kernel.params, _compiler(target))


def compile_job(job: Job, target: str, allowed: AllowedSpills) -> CompiledKernel:
    """Compile one kernel and check its code; a failure to compile is a result too."""
    start = time.perf_counter()
    name = job.launch.kernel.__name__
    options = {k: v for k, v in job.launch.kwargs.items() if k not in job.source.signature}
    result = functools.partial(CompiledKernel, name, job.sample, target, options)
    try:
        compiled = triton.compile(job.source, target=TARGETS[target], options=job.options.__dict__)
    except Exception as error:
        return result(failures=(f"does not compile: {type(error).__name__}: {_reason(error)}",))
    row = result(
        shared=int(compiled.metadata.shared),
        **usage(compiled)._asdict(),
        seconds=time.perf_counter() - start,
    )
    return with_failures(row, products(compiled.asm["ttir"]), job.is_reference, allowed)


def _reason(error: Exception) -> str:
    """Return the last line of a compiler's error, and the line of source that it marks with a ^."""
    lines = [line.strip() for line in str(error).strip().splitlines()] or [""]
    marks = [i for i, line in enumerate(lines) if line == "^" and i > 0]
    return f"{lines[-1]}, in: {lines[marks[-1] - 1]}" if marks else lines[-1]
