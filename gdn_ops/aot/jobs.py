"""Find the distinct kernels that a backend launches for samples, and compile many at a time."""

from __future__ import annotations

import functools
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, NamedTuple

from gdn_ops.aot.gpu_limits import AllowedSpills, Product, with_failures
from gdn_ops.aot.results import CompiledKernel, Sample
from gdn_ops.aot.sampling import reasons_against, run
from gdn_ops.aot.sass import Usage
from gdn_ops.dispatch.backend import Backend
from gdn_ops.kernel_support.launches import Launch, recording

front_end = threading.Lock()
"""Held while a kernel's source is read: compilers do that for one kernel at a time."""


class Built(NamedTuple):
    """Hold what a compiler says of a kernel.

    Attributes:
        shared: bytes of shared memory of one program.
        usage: what else its code uses of the GPU.
        products: the matrix products in its source.
        failures: what is wrong with it.
        remarks: what costs it time, and is wrong in a reference.
    """

    shared: int
    usage: Usage
    products: Sequence[Product]
    failures: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()


class Job(NamedTuple):
    """Describe one kernel to compile.

    Attributes:
        kernel: the function that is launched.
        options: of the launch, as a result shows them.
        build: compiles it.
        sample: label of the first sample that launches it.
        is_reference: whether a reference launches it.
    """

    kernel: Any
    options: Mapping[str, Any]
    build: Callable[[], Built]
    sample: str = ""
    is_reference: bool = False


def compile_ahead(
    backend: Backend,
    target: str,
    samples: Iterable[Sample],
    allowed: AllowedSpills | None,
    specialise: Callable[[Launch, str], tuple[Any, Job]],
    reason: Callable[[Exception, Any], str],
) -> Iterator[CompiledKernel]:
    """Compile the kernels as `CompilesAhead.compile_ahead` says, in the order of their launches.

    Args:
        backend: one whose kernels are launched by its `launcher.launch`.
        target: the GPU that launches are meant for.
        samples: calls on meta tensors.
        allowed: the spills that a reference may have.
        specialise: returns the key of a launch, the same for the same code, and its job.
        reason: returns in short why a kernel does not compile, given the error and the kernel.
    """
    unique: dict[Any, Job] = {}
    for sample in samples:
        with recording(target) as launches:
            # Asked in here, because some reasons depend on the target.
            if reasons_against(backend, sample):
                continue
            run(backend, sample)
        for launch in launches:
            key, job = specialise(launch, target)
            known = unique.setdefault(key, job._replace(sample=sample.label))
            unique[key] = known._replace(is_reference=known.is_reference or sample.is_reference)
    work = functools.partial(_compiled, target=target, allowed=allowed or {}, reason=reason)
    # The compilers need no GIL.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield from pool.map(work, unique.values())


def _compiled(
    job: Job, target: str, allowed: AllowedSpills, reason: Callable[[Exception, Any], str]
) -> CompiledKernel:
    """Compile one kernel and check its code; a failure to compile is a result too."""
    start = time.perf_counter()
    row = CompiledKernel(job.kernel.__name__, job.sample, target, job.options)
    try:
        built = job.build()
    except Exception as error:
        why = f"{type(error).__name__}: {reason(error, job.kernel)}"
        return replace(row, failures=(f"does not compile: {why}",))
    seconds = time.perf_counter() - start
    row = replace(row, shared=built.shared, **built.usage._asdict(), seconds=seconds)
    row = with_failures(row, built.products, job.is_reference, allowed)
    more = (*built.failures, *(built.remarks if job.is_reference else ()))
    return replace(row, failures=(*row.failures, *more))
