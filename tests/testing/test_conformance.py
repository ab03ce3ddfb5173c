"""Every backend passes the kit: the definition in float64, gradients, laws of docs/math.md §8."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import gdn_ops
from gdn_ops.backends import compile as compile_backend
from gdn_ops.dispatch.registry import Backend, get_backend, known_backends
from gdn_ops.testing import Example
from gdn_ops.testing.conformance import Subject, check, run_subject, subjects
from gdn_ops.testing.oracle import judge

pytestmark = pytest.mark.filterwarnings("ignore:backend '.*' emulates its kernels")

EXAMPLES = {"naive": 15, "torch": 60, "compile": 8}
"""Drawn calls per subject; a backend that is not named gets the default."""

DEFAULT_EXAMPLES = 15


def _installed() -> list[tuple[str, Subject]]:
    rows = []
    for name in known_backends():
        backend = get_backend(name)
        if isinstance(backend, Backend):
            rows += [(name, subject) for subject in subjects(backend)]
    return rows


@pytest.fixture
def eager_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trace with torch.compile, but skip its C++ compiler, which takes seconds per shape."""
    monkeypatch.setattr(compile_backend.Compile, "compiler", "aot_eager")


@pytest.mark.usefixtures("eager_compiler")
@pytest.mark.parametrize(
    ("backend", "subject"),
    [pytest.param(n, s, id=f"{n}-{s.name.replace(' ', '_')}") for n, s in _installed()],
)
def test_the_backend_conforms(backend: str, subject: Subject) -> None:
    row = run_subject(backend, subject, examples=EXAMPLES.get(backend, DEFAULT_EXAMPLES))
    assert row.passed, row.failure
    assert row.examples > 0


COMPILED_EXAMPLE = Example(T=70, H=2, R=2, K=8, V=16, gate="extreme", initial_state=True)


def test_the_compile_backend_conforms_through_inductor() -> None:
    verdict = judge(COMPILED_EXAMPLE, "compile")
    assert verdict.passed, verdict


def test_a_new_length_does_not_compile_again() -> None:
    judge(COMPILED_EXAMPLE, "compile")
    before = len(compile_backend._functions)
    for tokens in (1, 33, 200):
        verdict = judge(replace(COMPILED_EXAMPLE, T=tokens), "compile")
        assert verdict.passed, verdict
    assert len(compile_backend._functions) == before


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
def test_a_very_long_strong_decay_keeps_its_precision(dtype: str) -> None:
    # After strong decays the cumulative log sum is large and its differences are small.
    example = Example(T=700, H=1, R=2, K=8, V=8, gate="extreme", dtype=dtype, seed=5)
    verdict = judge(example, "torch")
    assert verdict.passed, verdict


@pytest.mark.parametrize(("tokens", "chunk_size"), [(2100, 8), (2500, 4)])
def test_a_long_sequence_recomputes_what_it_did_not_keep(tokens: int, chunk_size: int) -> None:
    # More segments than checkpoints: the backward walks several segments per kept state.
    example = Example(T=tokens, K=4, V=4, gate="slow", chunk_size=chunk_size, seed=3)
    verdict = judge(example, "torch")
    assert verdict.passed, verdict


def test_results_are_never_views_of_the_arguments() -> None:
    arguments = Example(B=2, T=0, K=4, V=4, initial_state=True).arguments()
    for backend in ("naive", "torch"):
        _, state = gdn_ops.gated_delta(**arguments, return_state=True, backend=backend)
        assert torch.equal(state, arguments["initial_state"])
        state.zero_()
        assert bool(arguments["initial_state"].any())


def test_check_reports_every_subject_and_reproduces_with_a_seed() -> None:
    seen: list[tuple[float, str]] = []
    report = check("naive", 0.0, lambda share, text: seen.append((share, text)), seed=3)
    assert report.passed, [row.failure for row in report.rows if not row.passed]
    backend = get_backend("naive")
    assert not isinstance(backend, str)
    assert [row.subject for row in report.rows] == [s.name for s in subjects(backend)]
    assert report.examples >= len(report.rows)
    assert seen[-1] == (1.0, "done")
    again = check("naive", 0.0, seed=3)
    assert [row.worst for row in again.rows] == [row.worst for row in report.rows]
