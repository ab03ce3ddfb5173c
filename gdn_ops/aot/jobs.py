"""Find the distinct kernels that a backend launches for samples, and compile many at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from gdn_ops.aot.results import CompiledKernel, Sample
from gdn_ops.aot.sampling import reasons_against, run
from gdn_ops.dispatch.backend import Backend
from gdn_ops.kernel_support.launches import Launch, recording


class Job(NamedTuple):
    """Describe one kernel to compile.

    Attributes:
        sample: label of the first sample that launches it.
        is_reference: whether a reference launches it.
        launch: the launch.
        source: what is compiled, in the backend's terms.
        options: of the compiler, in the backend's terms.
    """

    sample: str
    is_reference: bool
    launch: Launch
    source: Any = None
    options: Any = None


def find_jobs(
    backend: Backend,
    target: str,
    samples: Iterable[Sample],
    specialise: Callable[[Launch, Sample], tuple[Any, Job]],
) -> list[Job]:
    """Return the kernels that a backend launches for samples, each distinct one once.

    Args:
        backend: one whose kernels are launched by its `launcher.launch`.
        target: the GPU that launches are meant for.
        samples: calls on meta tensors; those that its limits exclude are left out.
        specialise: returns the key of a launch, the same for the same code, and its job.

    Returns:
        The jobs, in the order of their launches.
    """
    found: dict[Any, Job] = {}
    for sample in samples:
        if reasons_against(backend, sample):
            continue
        with recording(target) as launches:
            run(backend, sample)
        for launch in launches:
            key, job = specialise(launch, sample)
            known = found.setdefault(key, job)
            if sample.is_reference and not known.is_reference:
                found[key] = known._replace(is_reference=True)
    return list(found.values())


def compile_many(
    jobs: Iterable[Job], work: Callable[[Job], CompiledKernel]
) -> Iterator[CompiledKernel]:
    """Yield the results of the work on jobs, in their order, as many at a time as there are cores.

    The compilers need no GIL.
    """
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield from pool.map(work, jobs)
