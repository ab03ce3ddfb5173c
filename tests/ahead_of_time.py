"""Sample calls, and compile what backends launch for them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from gdn_ops import GATED_DELTA, Backend
from gdn_ops.aot import sampling
from gdn_ops.aot.results import CompiledKernel, Sample
from gdn_ops.dispatch.registry import get_backend


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


def check_judgement(compile_ahead: Any, spilling: Backend, target: str) -> None:
    """Assert that a kernel of a reference is judged as one, whoever launches it first."""
    varied, reference = sequence(T=1024), sequence()
    assert reference.is_reference and not varied.is_reference
    (row,) = compile_ahead(spilling, target, [varied])
    assert row.spills > 0 and row.failures == ()
    (row,) = compile_ahead(spilling, target, [varied, reference])
    assert row.sample == varied.label
    assert row.failures == (f"spills are {row.spills}, should be none",)
