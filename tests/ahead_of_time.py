"""Sample calls, and compile what backends launch for them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from gdn_ops import GATED_DELTA, Backend
from gdn_ops.aot import sampling
from gdn_ops.aot.gpu_limits import AllowedSpills
from gdn_ops.aot.results import CompiledKernel, Sample
from gdn_ops.call.bind import Call
from gdn_ops.dispatch.backend import Forward
from gdn_ops.dispatch.registry import get_backend
from gdn_ops.spec.rules import Limits
from kernel_backends import part


class Launching(Backend):
    """A backend whose forward makes launches and computes nothing."""

    name = "launching"

    def __init__(self, launches: Callable[[Call], object], **limits: Any) -> None:
        self.launches = launches
        self.limits = Limits(devices=("cuda",), **limits)  # type: ignore[misc]

    def forward(self, call: Call) -> Forward:
        self.launches(call)
        return Forward(call.tokens.v, call.tokens.v)


def compile_for(
    name: str,
    target: str,
    backend: Backend,
    samples: Iterable[Sample],
    allowed: AllowedSpills | None = None,
) -> list[CompiledKernel]:
    """Compile what a backend launches for samples, by the compiler of another one."""
    return list(part(name, "aot.compiler").compile_ahead(backend, target, samples, allowed))


def compiled(
    name: str,
    target: str,
    launches: Callable[[Call], object],
    allowed: AllowedSpills | None = None,
    *,
    is_reference: bool = True,
) -> CompiledKernel:
    """Compile one launch as if the reference made it, or another sample."""
    sample = sequence() if is_reference else sequence(T=1024)
    assert sample.is_reference == is_reference
    (row,) = compile_for(name, target, Launching(launches), [sample], allowed)
    assert row.sample == sample.label
    return row


def sequence(**choice: Any) -> Sample:
    """Return the reference case with something changed."""
    case = GATED_DELTA.case[sampling.REFERENCE]
    return next(sampling._of(GATED_DELTA, case, str(choice), choice))


def failures(rows: Iterable[CompiledKernel]) -> list[str]:
    """Return what is wrong with compiled kernels, and in which sample."""
    return [f"{row.kernel} ({row.sample}): {text}" for row in rows for text in row.failures]


def ahead(name: str, target: str, samples: Iterator[Sample]) -> Iterator[CompiledKernel]:
    """Compile what a backend launches for samples, for one of its targets."""
    backend = get_backend(name)
    assert isinstance(backend, Backend) and target in backend.targets
    return backend.compile_ahead(target, samples)
