"""Find the distinct kernels that a backend launches for samples, and compile many at a time."""

from __future__ import annotations

import operator
import os
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from gdn_ops.aot.budgets import Budgets, over_budget
from gdn_ops.aot.gpu_limits import AllowedSpills, Product, with_failures
from gdn_ops.aot.machine_code import Code
from gdn_ops.aot.model import predict
from gdn_ops.aot.processors import GPUS, programs_per_processor
from gdn_ops.aot.results import CompiledKernel, Sample, TimedLaunch
from gdn_ops.aot.sampling import directions, reasons_against
from gdn_ops.aot.sass import Usage
from gdn_ops.aot.source_loops import SourceLoop, trips_of
from gdn_ops.dispatch.backend import Backend
from gdn_ops.kernel_support.launches import Launch, recording

front_end = threading.Lock()
"""Held while a kernel's source is read: compilers do that for one kernel at a time."""


class Built(NamedTuple):
    """Hold what a compiler says of a kernel.

    Attributes:
        shared: bytes of shared memory of one program.
        warps: of one program.
        copiers: of these, warps that only copy.
        usage: what else its code uses of the GPU.
        products: the matrix products in its source.
        failures: what is wrong with it.
        remarks: what costs it time, and is wrong in a reference.
        grid: returns the grid of the programs that run the loops of a launch; its own by default.
        moved: returns the bytes of the tensors that a launch reads, and of those that it writes;
            None where that is not known.
        loops: returns the loops that a launch has in the source of its kernel; None where that is
            not known.
        turned: returns the same in another order in which the compiler may leave them.
    """

    shared: int
    warps: int
    copiers: int
    usage: Usage
    products: Sequence[Product]
    failures: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()
    grid: Callable[[Launch], tuple[int, ...]] = operator.attrgetter("grid")
    moved: Callable[[Launch], tuple[int, int] | None] = lambda launch: None
    loops: Callable[[Launch], Sequence[SourceLoop] | None] = lambda launch: None
    turned: Callable[[Launch], Sequence[SourceLoop] | None] = lambda launch: None


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


class Made(NamedTuple):
    """Hold a launch, with the sample, the direction and the place at which it is made.

    Attributes:
        launch: the launch.
        sample: label of the sample that makes it.
        direction: "forward", "backward" or "decode".
        order: its place among the launches of the sample in that direction.
        is_packed: whether the sample has sequences of lengths that only a tensor knows.
    """

    launch: Launch
    sample: str
    direction: str
    order: int
    is_packed: bool


class Compiler(NamedTuple):
    """Hold what the compiler of a backend tells of its launches.

    Attributes:
        specialise: returns the key of a launch, the same for the same code, and its job.
        reason: returns in short why a kernel does not compile, given the error and the kernel.
    """

    specialise: Callable[[Launch, str], tuple[Any, Job]]
    reason: Callable[[Exception, Any], str]


def compile_ahead(
    backend: Backend,
    target: str,
    samples: Iterable[Sample],
    allowed: AllowedSpills | None,
    budgets: Budgets | None,
    compiler: Compiler,
) -> Iterator[CompiledKernel]:
    """Compile the kernels as `CompilesAhead.compile_ahead` says, in the order of their launches.

    Args:
        backend: one whose kernels are launched by its `launcher.launch`.
        target: the GPU that launches are meant for.
        samples: calls on meta tensors.
        allowed: the spills that a reference may have.
        budgets: what the launches of the reference case may cost.
        compiler: of the backend.
    """
    unique: dict[Any, Job] = {}
    made: dict[Any, list[Made]] = defaultdict(list)
    for sample in samples:
        for one in launches_of(backend, sample, target):
            key, job = compiler.specialise(one.launch, target)
            known = unique.setdefault(key, job._replace(sample=sample.label))
            unique[key] = known._replace(is_reference=known.is_reference or sample.is_reference)
            made[key].append(one)

    def compiled(key: Any) -> CompiledKernel:
        row = _compiled(unique[key], made[key], target, allowed or {}, compiler)
        over = over_budget(row, budgets or {}) if row.warps else ()
        return replace(row, failures=(*row.failures, *over))

    # The compilers need no GIL.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield from pool.map(compiled, unique)


def launches_of(backend: Backend, sample: Sample, target: str) -> list[Made]:
    """Return the launches that a backend makes for a sample; none where it cannot run it."""
    made: list[Made] = []
    with recording(target) as launches:
        # Asked in here, because some reasons depend on the target.
        if reasons_against(backend, sample):
            return []
        packed = sample.call.cu_seqlens is not None
        for direction in directions(backend, sample):
            own = launches[len(made) :]
            made += [Made(x, sample.label, direction, i, packed) for i, x in enumerate(own)]
    return made


def _compiled(
    job: Job, made: Sequence[Made], target: str, allowed: AllowedSpills, compiler: Compiler
) -> CompiledKernel:
    """Compile one kernel and check its code; a failure to compile is a result too."""
    start = time.perf_counter()
    row = CompiledKernel(job.kernel.__name__, job.sample, target, job.options)
    try:
        built = job.build()
    except Exception as error:
        why = f"{type(error).__name__}: {compiler.reason(error, job.kernel)}"
        # They are there all the same, so that a call of them has no total.
        launches = tuple(_placed(one) for one in made)
        return replace(row, launches=launches, failures=(f"does not compile: {why}",))
    seconds = time.perf_counter() - start
    gpu, usage = GPUS[target], built.usage
    fits = programs_per_processor(gpu, usage.registers, built.warps, built.shared)
    timed = tuple(_timed(one, built, fits, target) for one in made)
    row = replace(
        row, shared=built.shared, warps=built.warps, copiers=built.copiers, programs=fits,
        launches=timed, seconds=seconds, **usage._asdict(),
    )  # fmt: skip
    row = with_failures(row, built.products, job.is_reference, allowed)
    more = (*built.failures, *(built.remarks if job.is_reference else ()))
    return replace(row, failures=(*row.failures, *more))


def _timed(one: Made, built: Built, fits: int, target: str) -> TimedLaunch:
    """Return a launch with its predicted time, where its trips are known and a program fits."""
    code: Code = built.usage.code
    grid, moved = built.grid(one.launch), built.moved(one.launch)
    timed = replace(_placed(one), grid=grid)
    if moved is not None:
        timed = replace(timed, bytes=sum(moved), read=moved[0], written=moved[1])
    loops, turned = built.loops(one.launch), built.turned(one.launch)
    trips = None if one.is_packed else trips_of(code, loops, turned)
    if trips is None:
        return timed
    if not fits:
        return replace(timed, trips=trips)
    work = code.trip(-1, trips)
    prediction = predict(GPUS[target], work, built.warps - built.copiers, fits, grid, timed.bytes)
    return replace(timed, trips=trips, work=work, prediction=prediction)


def _placed(one: Made) -> TimedLaunch:
    """Return a launch of which nothing is known but what it is given."""
    own = one.launch
    return TimedLaunch(one.sample, one.direction, one.order, own.grid, tensor_bytes(own))


def tensor_bytes(launch: Launch) -> int:
    """Return the bytes of all tensors that a launch is given, each time it is given one."""
    given = (*launch.args, *launch.kwargs.values())
    return sum(x.numel() * x.element_size() for x in given if isinstance(x, torch.Tensor))
