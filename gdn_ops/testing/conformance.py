"""Check a backend on every subject that it must pass, for pytest and `gdn-ops check` alike.

A new backend needs no test code: `subjects(backend)` follows from its limits.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import hypothesis
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import FlakyFailure

from gdn_ops.dispatch.registry import Backend
from gdn_ops.spec.errors import BackendUnsupportedError
from gdn_ops.testing.compiled import few_calls
from gdn_ops.testing.derivatives import (
    second_derivatives,
    second_derivatives_at_the_ends,
    tangents,
    vmap_equals_a_loop,
)
from gdn_ops.testing.example import Example
from gdn_ops.testing.laws import LAWS
from gdn_ops.testing.oracle import Verdict, judge
from gdn_ops.testing.runs import Check, Law, installed
from gdn_ops.testing.strategies import calls

__all__ = [
    "CheckReport",
    "CheckRow",
    "ConformanceError",
    "Subject",
    "check",
    "run_subject",
    "subjects",
]

EXAMPLES_PER_ROUND = 10


class ConformanceError(AssertionError):
    """Report that a backend failed a subject. The text holds the call that failed, as code."""


@dataclass(frozen=True)
class Subject:
    """Describe one thing that is checked of a backend.

    Attributes:
        name: as printed, a sentence.
        judge: a function from a backend's name and an example to a verdict.
        options: passed to `strategies.calls`.
        law: the law that is checked, if the subject is a law.
    """

    name: str
    judge: Check
    options: tuple[tuple[str, Any], ...] = ()
    law: Law | None = None

    def code(self, backend: str, example: Example) -> str:
        """Return the code that judges a backend on an example again."""
        if self.law is None:
            return example.code(backend)
        return (
            "from gdn_ops.testing import Example\n"
            f"from gdn_ops.testing.laws import {self.law.name}\n"
            f"print({self.law.name}({backend!r}, {example!r}))"
        )

    def verify(self, backend: str, example: Example) -> Verdict | None:
        """Return the verdict on an example, or None where the backend refuses to run it.

        Raises:
            ConformanceError: the example does not pass, or raises.
        """
        try:
            verdict = self.judge(backend, example)
        except BackendUnsupportedError:
            return None
        except Exception as error:
            text = "".join(traceback.format_exception_only(error)).strip()
            code = self.code(backend, example)
            raise ConformanceError(f"raised {text}\n{code}") from error
        if not verdict.passed:
            raise ConformanceError(f"{verdict}\n{self.code(backend, example)}")
        return verdict


@dataclass(frozen=True)
class CheckRow:
    """Hold the result of one subject.

    Attributes:
        subject: its name.
        examples: how many calls were judged.
        worst: largest error / allowance seen; <= 1 passes.
        failure: the minimal failing call as code, or None.
    """

    subject: str
    examples: int = 0
    worst: float = 0.0
    failure: str | None = None

    @property
    def passed(self) -> bool:
        """Return whether no call failed."""
        return self.failure is None

    def plus(self, other: CheckRow) -> CheckRow:
        """Return the result of this row and of a later one of the same subject."""
        examples, largest = self.examples + other.examples, max(self.worst, other.worst)
        return CheckRow(self.subject, examples, largest, self.failure or other.failure)


@dataclass(frozen=True)
class CheckReport:
    """Hold the result of `check`.

    Attributes:
        backend: its name.
        rows: a row per subject.
        seconds: how long it took.
        device: torch device that the calls ran on.
        seed: of the first round.
    """

    backend: str
    rows: tuple[CheckRow, ...]
    seconds: float
    device: str = "cpu"
    seed: int = 0

    @property
    def passed(self) -> bool:
        """Return whether every subject passed and was judged on at least one example."""
        return all(row.passed and row.examples > 0 for row in self.rows)

    @property
    def examples(self) -> int:
        """Return how many calls were judged in all."""
        return sum(row.examples for row in self.rows)


def forward_and_gradients(backend: str, example: Example) -> Verdict:
    """Judge outputs, final state and every gradient against the definition in float64."""
    return judge(example, backend, gradients=installed(backend).limits.grad)


def subjects(backend: Backend) -> tuple[Subject, ...]:
    """Return the subjects that a backend has to pass, given its limits."""
    limits = backend.limits
    rows = [
        Subject(name, forward_and_gradients, (("varlen", varlen),))
        for name, varlen in (
            ("outputs, states and gradients equal the definition", False),
            ("packed sequences equal the definition", True),
        )
        if limits.varlen or not varlen
    ]
    for law in LAWS:
        if law.concerns(limits):
            options = (("decode", True),) if law.draws_decode else ()
            rows.append(Subject(law.name.replace("_", " "), law.check, options, law))
    rows.append(Subject("vmap equals a loop", vmap_equals_a_loop))
    small = (("dtypes", ("float64",)), ("max_tokens", 3), ("shape_classes", _TINY))
    if limits.second_grad and "float64" in limits.dtypes:
        rows.append(Subject("second derivatives exist and are right", second_derivatives, small))
        rows.append(
            Subject(
                "second derivatives are right at gates of 0", second_derivatives_at_the_ends, small
            )
        )
    if limits.grad and limits.forward_mode and "float64" in limits.dtypes:
        wide = (("dtypes", ("float64",)),)
        rows.append(Subject("tangents are the adjoint of gradients", tangents, wide))
    return tuple(rows)


_ORDINARY = {"magnitude": "unit"}
"""Finite differences take steps of one size."""

_TINY = (
    {"B": 1, "H": 1, "R": 2, "K": 2, "V": 3, "scale": None, "chunk_size": None, **_ORDINARY},
    {"B": 2, "H": 1, "R": 1, "K": 3, "V": 2, "scale": 1.0, "chunk_size": None, **_ORDINARY},
)


def run_subject(
    backend: str,
    subject: Subject,
    *,
    examples: int,
    seed: int | None = None,
    deadline: float = float("inf"),
    profile: settings | None = None,
    shrink: bool = True,
    device: str = "cpu",
) -> CheckRow:
    """Judge one subject on drawn examples; shrink to the minimal failing call.

    Args:
        backend: its name.
        subject: what to judge.
        examples: how many calls to draw.
        seed: of the draw; None leaves it to hypothesis' profile.
        deadline: `time.perf_counter()` after which no further example is judged.
        profile: hypothesis settings to start from.
        shrink: whether to look for the smallest failing call.
        device: torch device of every tensor.
    """
    instance, row = installed(backend), CheckRow(subject.name)
    options = few_calls(instance, device) | dict(subject.options)
    failed: set[Example] = set()

    @settings(
        profile,
        max_examples=examples,
        deadline=None,
        phases=(Phase.reuse, Phase.generate, *((Phase.shrink,) if shrink else ())),
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
        print_blob=False,
    )
    @given(calls(limits=instance.limits, device=device, **options))
    def property_holds(example: Example) -> None:
        nonlocal row
        if time.perf_counter() > deadline and row.examples and example not in failed:
            return
        try:
            verdict = subject.verify(backend, example)
        except ConformanceError:
            failed.add(example)
            raise
        if verdict is not None:
            row = row.plus(CheckRow(subject.name, 1, verdict.worst))

    test = property_holds if seed is None else hypothesis.seed(seed)(property_holds)
    try:
        test()
    except ConformanceError as failure:
        return row.plus(CheckRow(subject.name, 1, float("inf"), str(failure)))
    except FlakyFailure as failure:
        return row.plus(CheckRow(subject.name, 1, float("inf"), f"not repeatable: {failure}"))
    return row


def _chosen(backend: str, only: str, dtypes: Sequence[str] | None) -> tuple[Subject, ...]:
    """Return the subjects with a text in their names, narrowed to dtypes if they are given."""
    chosen = tuple(subject for subject in subjects(installed(backend)) if only in subject.name)
    if not chosen:
        raise ValueError(f"no subject of backend {backend!r} has {only!r} in its name")
    if dtypes is None:
        return chosen
    # An option of a subject's own comes last.
    narrowed = (("dtypes", tuple(dtypes)),)
    return tuple(replace(subject, options=(*narrowed, *subject.options)) for subject in chosen)


def check(
    backend: str,
    seconds: float,
    on_progress: Callable[[float, str], None] | None = None,
    seed: int | None = None,
    device: str = "cpu",
    *,
    only: str = "",
    dtypes: Sequence[str] | None = None,
) -> CheckReport:
    """Check a backend for a given time: every subject at least once, then round and round.

    Args:
        backend: its name.
        seconds: how long; the first round is finished whatever it takes.
        on_progress: called with the fraction done and the subject under test.
        seed: of the first round; random if None.
        device: torch device of every tensor.
        only: what the names of the subjects have in them that are judged; all have "".
        dtypes: dtypes of q, k and v to draw from; those of the limits by default.

    Raises:
        SpecError: no backend has that name, or it is not installed.
        ValueError: no subject has a name with `only` in it.
    """
    everything = _chosen(backend, only, dtypes)
    first = int(torch.seed() % 2**31) if seed is None else seed
    start = time.perf_counter()
    rows = {subject.name: CheckRow(subject.name) for subject in everything}
    for row in run_rounds(backend, everything, seconds, first, device, on_progress):
        rows[row.subject] = row
    return CheckReport(backend, tuple(rows.values()), time.perf_counter() - start, device, first)


def run_rounds(
    backend: str,
    everything: Sequence[Subject],
    seconds: float,
    first: int,
    device: str,
    on_progress: Callable[[float, str], None] | None = None,
) -> Iterator[CheckRow]:
    """Run subjects round and round, each at least once; yield a row so far when it has grown.

    Args:
        backend: its name.
        everything: the subjects.
        seconds: how long; the first round is finished whatever it takes.
        first: seed of the first round.
        device: torch device of every tensor.
        on_progress: called with the fraction done and the subject under test.
    """
    tell = on_progress or (lambda share, text: None)
    start, turn = time.perf_counter(), 0
    rows = {subject.name: CheckRow(subject.name) for subject in everything}
    while turn == 0 or time.perf_counter() - start < seconds:
        for i, subject in enumerate(everything):
            elapsed = time.perf_counter() - start
            if turn and elapsed >= seconds:
                break
            share = max(elapsed / seconds if seconds else 1.0, i / len(everything) * (not turn))
            tell(min(share, 1.0), subject.name)
            if rows[subject.name].passed:
                new = run_subject(
                    backend,
                    subject,
                    examples=EXAMPLES_PER_ROUND if turn else 3,
                    seed=first + turn,
                    deadline=start + seconds,
                    profile=settings(database=None),
                    device=device,
                )
                rows[subject.name] = rows[subject.name].plus(new)
                yield rows[subject.name]
        turn += 1
        if not any(row.passed for row in rows.values()):
            break
    tell(1.0, "done")
