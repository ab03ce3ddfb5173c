"""Compile every launch of a call ahead of time for a GPU, and check the code against its limits.

Calls are made on meta tensors inside `recording`, so the launches are those of the backend itself:
its configurations, its grids, its constants. Each is specialised by Triton as a launch would be
(what is divisible by 16, what is 1, which pointers stay below 2 GiB) and compiled without a driver.
A launch that is specialised like an earlier one is compiled once. What a target forbids is in
`gdn_ops.aot.gpu_limits`.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Iterator
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from gdn_ops.aot import jobs
from gdn_ops.aot.budgets import Budgets
from gdn_ops.aot.gpu_limits import AllowedSpills
from gdn_ops.aot.jobs import Built, Job
from gdn_ops.aot.results import CompiledKernel, Sample
from gdn_ops.backends.triton.aot.accesses import accesses, moved
from gdn_ops.backends.triton.aot.loops import grid_of, loops_of
from gdn_ops.backends.triton.aot.usage import products, usage
from gdn_ops.backends.triton.kernels import settle_keys
from gdn_ops.dispatch.backend import Backend
from gdn_ops.kernel_support.launches import Launch

TARGETS: dict[str, GPUTarget] = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
"""A100, H100 and H200, B200, MI300: backend, architecture, threads of a warp."""


class Source(ASTSource):  # type: ignore[misc]
    """Describe a kernel whose source is translated by one thread at a time.

    Before 3.11.8 Python's ast.parse raises a SystemError where two threads parse at once. The
    translation holds the GIL anyway; what takes time comes after it.
    """

    def make_ir(self, *args: Any, **kwargs: Any) -> Any:
        with jobs.front_end:
            return super().make_ir(*args, **kwargs)


def compile_ahead(
    backend: Backend,
    target: str,
    samples: Iterable[Sample],
    allowed: AllowedSpills | None = None,
    budgets: Budgets | None = None,
) -> Iterator[CompiledKernel]:
    """Compile the kernels that a backend launches, and judge them.

    Args:
        backend: one whose kernels are Triton's.
        target: one of TARGETS.
        samples: calls on meta tensors.
        allowed: the spills that a reference may have.
        budgets: what the launches of the reference case may cost.
    """
    compiler = jobs.Compiler(_specialise, _reason)
    return jobs.compile_ahead(backend, target, samples, allowed, budgets, compiler)


def _specialise(launch: Launch, target: str) -> tuple[Any, Job]:
    source, options, specialisation = specialised(launch, target)
    key = (launch.kernel.cache_key, repr(specialisation), repr(options))
    shown = {k: v for k, v in launch.kwargs.items() if k not in source.signature}
    return key, Job(launch.kernel, shown, functools.partial(_build, source, options, target))


def specialised(launch: Launch, target: str) -> tuple[Source, Any, Any]:
    """Return what Triton compiles for a launch, the options of its compiler, and what for."""
    settle_keys()
    kernel, compiler = launch.kernel, _compiler(target)
    bound, specialisation, _ = _binder(kernel, target)(*launch.args, **launch.kwargs)
    options, signature, constexprs, attrs = kernel._pack_args(
        compiler, launch.kwargs, bound, specialisation, {}
    )
    return Source(kernel, signature, constexprs, attrs), options, specialisation


@functools.cache
def _compiler(target: str) -> Any:
    return make_backend(TARGETS[target])


@functools.cache
def _binder(kernel: Any, target: str) -> Any:
    """Return Triton's function that maps the arguments of a launch to their specialisation."""
    return create_function_from_signature(kernel.signature, kernel.params, _compiler(target))


def _build(source: Source, options: Any, target: str) -> Built:
    compiled = triton.compile(source, target=TARGETS[target], options=options.__dict__)
    facts, ttir = compiled.metadata, compiled.asm["ttir"]
    return Built(
        shared=int(facts.shared),
        warps=int(facts.num_warps),
        copiers=0,
        usage=usage(compiled),
        products=products(ttir),
        moved=functools.partial(moved, found=accesses(ttir)),
        grid=grid_of,
        loops=loops_of,
    )


def _reason(error: Exception, kernel: Any) -> str:
    """Return the last line of a compiler's error, and the line of source that it marks with a ^."""
    cache = os.environ.get("TRITON_CACHE_DIR")
    if isinstance(error, OSError) and cache and str(error.filename).startswith(cache):
        return f"{error}; set TRITON_CACHE_DIR to a folder that can be written"
    lines = [line.strip() for line in str(error).strip().splitlines()] or [""]
    marks = [i for i, line in enumerate(lines) if line == "^" and i > 0]
    return f"{lines[-1]}, in: {lines[marks[-1] - 1]}" if marks else lines[-1]
