"""Every backend passes the kit: the definition in float64, gradients, laws of docs/math.md §8."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings

from gdn_ops.backends import compile as compile_backend
from gdn_ops.dispatch.registry import Backend, get_backend, known_backends
from gdn_ops.spec.ops import GATED_DELTA
from gdn_ops.spec.rules import Limits, Width
from gdn_ops.testing import Example, conformance
from gdn_ops.testing.conformance import Subject, check, run_subject, subjects
from gdn_ops.testing.example import STRENGTHS, run
from gdn_ops.testing.laws import LAWS, orthogonal_keys_need_no_correction
from gdn_ops.testing.operands import operand_sizes
from gdn_ops.testing.oracle import Verdict, judge, judgement
from gdn_ops.testing.runs import installed
from gdn_ops.testing.strategies import calls

pytestmark = pytest.mark.filterwarnings("ignore:backend '.*' emulates its kernels")

EXAMPLES = {"naive": 15, "torch": 60, "compile": 8}
"""Drawn calls per subject; a backend that is not named gets the default."""

DEFAULT_EXAMPLES = 15

SUBJECTS = [
    pytest.param(name, subject, id=f"{name}-{subject.name.replace(' ', '_')}")
    for name in known_backends()
    if isinstance(backend := get_backend(name), Backend)
    for subject in subjects(backend)
]


@pytest.fixture
def eager_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trace with torch.compile, but skip its C++ compiler, which takes seconds per shape."""
    monkeypatch.setattr(compile_backend.Compile, "compiler", "aot_eager")


@pytest.mark.usefixtures("eager_compiler")
@pytest.mark.parametrize(("backend", "subject"), SUBJECTS)
def test_the_backend_conforms(backend: str, subject: Subject) -> None:
    row = run_subject(backend, subject, examples=EXAMPLES.get(backend, DEFAULT_EXAMPLES))
    assert row.passed, row.failure
    assert row.examples > 0


def test_the_compile_backend_conforms_through_inductor_and_compiles_no_new_length() -> None:
    example = Example(T=70, H=2, R=2, K=8, V=16, gate="extreme", initial_state=True)
    compiled = []
    for tokens in (70, 1, 33, 200):
        verdict = judge(replace(example, T=tokens), "compile")
        assert verdict.passed, verdict
        compiled.append(len(compile_backend._functions))
    assert len(set(compiled)) == 1


# After strong decays the cumulative log sum is large and its differences are small. With more
# segments than checkpoints the backward walks several segments per kept state.
DECAYED = Example(T=700, R=2, K=8, V=8, gate="extreme", seed=5)
SLOW = Example(gate="slow", seed=3)


@pytest.mark.parametrize(
    "example",
    [
        *(replace(DECAYED, dtype=dtype) for dtype in ("bfloat16", "float32", "float64")),
        *(replace(SLOW, T=tokens, chunk_size=size) for tokens, size in ((2100, 8), (2500, 4))),
    ],
    ids=repr,
)
def test_a_long_sequence_keeps_its_precision(example: Example) -> None:
    verdict = judge(example, "torch")
    assert verdict.passed, verdict


@pytest.mark.parametrize("decode", [False, True])
def test_gates_that_only_decode_ops_take_are_drawn_for_them_alone(decode: bool) -> None:
    widths: tuple[Width, ...] = ("none", "scalar", "channel")
    limits = Limits(
        devices=("cpu",), decode_decays=widths, decode_erases=widths, decode_writes=widths[1:],
        decode_apart=True,
    )  # fmt: skip
    drawn, apart = set(), set()

    @settings(max_examples=40, derandomize=True, database=None, deadline=None)
    @given(calls(GATED_DELTA, limits, decode=decode))
    def draw(example: Example) -> None:
        drawn.add(example.channels)
        apart.add(example.apart)

    draw()
    assert drawn == ({False, True} if decode else {False})
    assert apart <= {None, *STRENGTHS} if decode else apart == {None}
    assert len(apart) > 1 or not decode
    names = {law.name for law in LAWS if law.concerns(limits)}
    assert not names & {"a_reset_channel_forgets_its_past", "equal_strengths_are_beta"}


def test_check_reports_every_subject_and_reproduces_with_a_seed() -> None:
    seen: list[tuple[float, str]] = []
    report = check("naive", 0.0, lambda share, text: seen.append((share, text)), seed=3)
    assert report.passed, [row.failure for row in report.rows if not row.passed]
    assert [row.subject for row in report.rows] == [s.name for s in subjects(installed("naive"))]
    assert report.examples >= len(report.rows)
    assert seen[-1] == (1.0, "done")
    again = check("naive", 0.0, seed=3)
    assert [row.worst for row in again.rows] == [row.worst for row in report.rows]


def test_check_judges_the_subjects_and_dtypes_that_are_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drawn: list[Example] = []
    right = conformance.forward_and_gradients

    def judged(backend: str, example: Example) -> Verdict:
        drawn.append(example)
        return right(backend, example)

    monkeypatch.setattr(conformance, "forward_and_gradients", judged)
    report = check("torch", 0.1, seed=0, only="equal the definition", dtypes=["float16"])
    assert [row.subject for row in report.rows] == [
        "outputs, states and gradients equal the definition",
        "packed sequences equal the definition",
    ]
    assert report.passed and {example.dtype for example in drawn} == {"float16"}
    with pytest.raises(ValueError) as raised:
        check("torch", 0.1, only="nonsense")
    assert str(raised.value) == "no subject of backend 'torch' has 'nonsense' in its name"


def test_a_failure_found_at_the_deadline_is_repeatable() -> None:
    deadline = time.perf_counter() + 0.05
    seen: list[Example] = []

    def look(backend: str, example: Example) -> Verdict:
        if example not in seen:
            assert time.perf_counter() < deadline
            seen.append(example)
        if example == seen[0]:
            return Verdict.exact(True, "o")
        time.sleep(max(0.0, deadline - time.perf_counter()))
        return Verdict.exact(False, "o")

    row = run_subject("naive", Subject("looks", look), examples=50, seed=0, deadline=deadline)
    assert row.failure is not None and row.failure.startswith("WRONG: o"), row.failure
    assert len(seen) == 2 and repr(seen[1]) in row.failure


def test_a_chunk_in_bfloat16_is_granted_what_it_erases() -> None:
    example = Example("delta", "bfloat16", T=16, K=1, V=1, initial_state=True)
    verdict = judge(example, "triton")
    assert verdict.passed, verdict
    narrow = judgement(replace(example, dtype="float32"))
    wide = judgement(example)
    # In float32 nothing like it is granted.
    assert (wide.allowance["final_state"] > 100 * narrow.allowance["final_state"]).all()


CANCELLING = (
    Example("delta", "bfloat16", K=2, V=6, keys="parallel", scale=0.0, seed=1),
    Example(
        "delta",
        "bfloat16",
        T=64,
        K=5,
        V=17,
        beta="edges",
        keys="parallel",
        initial_state=True,
        seed=3,
    ),
    Example(T=3, K=1, V=1, lengths=(3,), magnitude="faint", log_gate=True, seed=1),
    # The gradient of the state is 1e-44 here.
    Example(T=5, K=16, V=48, lengths=(5,), gate="strong", initial_state=True, scale=0.0),
)


@pytest.mark.parametrize("example", CANCELLING, ids=["one_number", "erased", "faint", "subnormal"])
def test_terms_that_cancel_are_granted_their_roundings(example: Example) -> None:
    verdict = judge(example, "triton")
    assert verdict.passed, verdict


@pytest.mark.parametrize("qk_l2norm", [False, True])
def test_the_only_term_of_a_result_is_the_result(qk_l2norm: bool) -> None:
    # One token, one element, no state and no gradient of one.
    example = Example(B=2, H=2, K=1, V=1, dtype="float64", log_gate=True, qk_l2norm=qk_l2norm)
    arguments, (d_o, d_state) = example.arguments(), example.cotangents()
    cotangents = (d_o, torch.zeros_like(d_state))
    sizes = operand_sizes(arguments, cotangents, example, 64)
    # Gradients of products have two terms each; nothing had decayed.
    two = {"d_beta": 2**0.5, "d_k": 2**0.5}
    for name, x in run(arguments, "naive", cotangents).items():
        if qk_l2norm and name in ("d_q", "d_k"):
            # Expect less: what is taken off along q and k is nearly all of it.
            assert (sizes[name] > x.abs()).all()
        else:
            torch.testing.assert_close(sizes[name], x.abs() * two.get(name, 1.0))


def test_the_terms_of_a_state_are_at_least_the_state() -> None:
    example = Example("gated_delta", "float64", T=70, lengths=(0, 3, 67), initial_state=True)
    arguments, cotangents = example.arguments(), example.cotangents()
    sizes = operand_sizes(arguments, cotangents, example, 64)
    results = example.run("naive")
    for name in ("final_state", "d_initial_state"):
        assert (sizes[name] >= results[name].abs() * (1 - 1e-12)).all()
    # Nothing was written to the state of an empty sequence.
    assert torch.equal(sizes["final_state"][0], arguments["initial_state"][0].abs())


def test_orthogonal_keys_are_judged_by_their_own_call() -> None:
    # The keys of the example are tiny, those of the law have norm 1.
    sizes = {"T": 15, "H": 3, "R": 2, "K": 14, "V": 3}
    values = {"gate": "extreme", "keys": "parallel", "magnitude": "tiny_keys", "qk_l2norm": True}
    example = Example(dtype="bfloat16", **sizes, **values)  # type: ignore[arg-type]
    verdict = orthogonal_keys_need_no_correction("triton", example)
    assert verdict.passed, verdict
