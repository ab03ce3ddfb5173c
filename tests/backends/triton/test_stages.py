"""A call in two stages, between which the state becomes known, is the call."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor

from ahead_of_time import Launching, compile_for, sequence
from gdn_ops import GATED_DELTA
from gdn_ops.aot.results import CompiledKernel
from gdn_ops.call.bind import Call, arguments_of, bind
from gdn_ops.dispatch.results import Forward, Grads
from gdn_ops.parallel import work
from gdn_ops.parallel.machines import MACHINES
from gdn_ops.spec.language import Sizes
from gdn_ops.testing import Example
from gdn_ops.testing.example import Results
from gdn_ops.testing.oracle import judgement_of
from gdn_ops.testing.strategies import calls
from kernel_backends import SIZES, meta_call, using

pytest.importorskip("triton")

from gdn_ops.backends.triton import Triton
from gdn_ops.backends.triton.host import plan
from gdn_ops.backends.triton.host.launcher import launch
from gdn_ops.kernel_support.launches import Launch, recording

pytestmark = pytest.mark.filterwarnings("ignore:backend 'triton' emulates")

TRITON = Triton()


def call_of(example: Example, device: str = "cpu") -> Call:
    """Return a bound call with an initial state whose gradients are meant too."""
    example = replace(example, initial_state=True, device=device)
    arguments = arguments_of(GATED_DELTA, example.arguments())
    call = bind(GATED_DELTA, arguments)
    assert call.state is not None
    return replace(call, needs_grad=True, state=call.state.to(torch.float32))


class Staged(NamedTuple):
    """Hold what both stages of a call return."""

    M: Tensor
    R: Tensor
    out: Forward
    d_unknown: Tensor
    d_start: Tensor
    grads: Grads


def staged(call: Call, d_o: Tensor, d_state: Tensor) -> Staged:
    """Run a call in stages; the gradient of the initial state without that of the final one too."""
    M, R, kept = TRITON.summarise(replace(call, state=None))
    out = TRITON.resume(call, kept)
    unknown, rest = TRITON.summarise_gradients(call, out.saved, d_o, torch.zeros_like(d_state))
    d_start, _ = TRITON.summarise_gradients(call, out.saved, d_o, d_state)
    grads = TRITON.resume_gradients(call, out.saved, rest, d_o, d_state)
    return Staged(M, R, out, unknown, d_start, grads)


def results_of(out: Forward, grads: Grads) -> Results:
    """Return the results of a call and its gradients, as the oracle names them."""
    found: Results = {"o": out.o, "final_state": out.final_state}
    for name, gradient in grads._replace(state=None)._asdict().items():
        if gradient is not None:
            found[f"d_{name}"] = gradient
    return found | {"d_initial_state": grads.state}


def applied(M: Tensor, x: Tensor) -> Tensor:
    return M * x if M.shape[-1] == 1 else M @ x


def check(example: Example, device: str = "cpu") -> None:
    """Judge what the stages of a call make, by the band of one call, or of two that are added."""
    example = replace(example, initial_state=True)
    call, (d_o, d_state) = call_of(example, device), example.cotangents()
    d_state = d_state.to(device, torch.float32)
    M, R, out, d_unknown, d_start, grads = staged(call, d_o.to(device), d_state)
    verdict = judgement_of(example.arguments(), example.cotangents(), example)

    def judge(found: Results, most: float = 1.0) -> None:
        reference = {name: verdict.reference[name] for name in found}
        worst = verdict.compare({name: x.cpu() for name, x in found.items()}, reference, most)
        assert worst.worst <= 1, (worst, example)

    judge(results_of(out, grads))
    judge({"d_initial_state": d_start})
    assert call.state is not None
    d_added = applied(M.mT, d_state) + d_unknown
    judge({"final_state": applied(M, call.state) + R, "d_initial_state": d_added}, 3.0)


@pytest.mark.parametrize("segment", [None, 1, 2])
@pytest.mark.parametrize("kept", ["on", "off"])
def test_stages_compute_the_definition(
    segment: int | None, kept: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "_kept", kept)

    @settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(calls(GATED_DELTA, TRITON.limits, max_tokens=70))
    def drawn(example: Example) -> None:
        example = replace(example, chunk_size=16)
        with using("triton", example, segment=segment):
            check(example)

    drawn()


LONG: dict[str, Example] = {
    "bfloat16": Example(T=150, R=2, K=128, V=64, dtype="bfloat16", gate="slow", beta="wide"),
    "float16": Example(T=90, K=48, V=80, dtype="float16", chunk_size=16, log_gate=True, seed=1),
    "packed": Example(
        T=181, lengths=(70, 0, 1, 110), H=2, R=3, K=24, V=40, gate="extreme", beta="wide",
        qk_l2norm=True, chunk_size=32, seed=2,
    ),
    "rows": Example(B=2, T=100, K=16, V=24, rule="delta", chunk_size=16, seed=3),
    "gated": Example(B=2, T=100, K=24, V=16, rule="gated", chunk_size=16, seed=4),
}  # fmt: skip


@pytest.mark.parametrize("name", LONG)
@pytest.mark.parametrize("segment", [None, 1, 3])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_many_segments_are_the_definition_too(name: str, segment: int | None, device: str) -> None:
    with using("triton", LONG[name], segment=segment):
        check(LONG[name], device)


@pytest.mark.parametrize("segment", [None, 1, 2])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("rule", ["gated_delta", "gated"])
def test_a_decay_of_zero_makes_a_map_that_is_exactly_zero(
    rule: str, dtype: str, segment: int | None
) -> None:
    example = Example(rule=rule, T=60, R=2, K=24, V=16, dtype=dtype, chunk_size=16)
    call, (d_o, d_state) = call_of(example), example.cotangents()
    assert call.tokens.alpha is not None and call.state is not None
    call.tokens.alpha[:, 20] = 0.0
    with using("triton", example, segment=segment):
        M, _, out, d_unknown, d_start, _ = staged(call, d_o, d_state.to(torch.float32))
        other = staged(replace(call, state=1e3 - call.state), d_o, d_state.to(torch.float32)).out
    assert not bool(M.any())
    # Nothing that is before has an influence on what is behind, nor the other way round.
    assert torch.equal(out.final_state, other.final_state) and torch.equal(d_start, d_unknown)
    assert torch.equal(out.o[:, 20:], other.o[:, 20:]) and not torch.equal(out.o, other.o)


@pytest.mark.parametrize("segment", [None, 1, 2])
@pytest.mark.parametrize("kept", ["on", "off"])
@pytest.mark.parametrize("lengths", [(40, 0, 1, 20), None])
def test_stages_without_an_initial_state_start_from_zeros(
    lengths: tuple[int, ...] | None, kept: str, segment: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "_kept", kept)
    example = Example(T=61, lengths=lengths, R=2, K=16, V=24, gate="slow", chunk_size=16)
    call, (d_o, d_state) = call_of(example), example.cotangents()
    assert call.state is not None
    zeros, d_state = torch.zeros_like(call.state), d_state.to(torch.float32)
    with using("triton", example, segment=segment):
        first, second = (staged(replace(call, state=x), d_o, d_state) for x in (None, zeros))
    assert first.grads.state is None and second.grads.state is not None
    for x, y in zip((*first.out[:2], *first[3:5], *first.grads[:6]),
                    (*second.out[:2], *second[3:5], *second.grads[:6]), strict=True):  # fmt: skip
        assert (x is None and y is None) or torch.equal(x, y)


@pytest.mark.parametrize("segment", [None, 1, 2])
@pytest.mark.parametrize("rule", ["gated", "linear"])
def test_a_rule_without_an_error_term_has_a_number_for_a_map(
    rule: str, segment: int | None
) -> None:
    example = Example(rule=rule, B=2, T=60, R=2, K=24, V=16, chunk_size=16)
    call = call_of(example)
    with using("triton", example, segment=segment):
        M, _, _ = TRITON.summarise(replace(call, state=None))
    expected = torch.ones(2, 2, dtype=torch.float64)
    if call.tokens.alpha is not None:
        expected = call.tokens.alpha.double().prod(1)
    torch.testing.assert_close(M[..., 0, 0].double(), expected, rtol=2e-6, atol=0)
    assert M.shape == (2, 2, 1, 1)


@pytest.mark.parametrize("segment", [None, 1])
def test_stages_give_the_same_bits_again(segment: int | None) -> None:
    example = LONG["gated"]
    cotangents = example.cotangents()
    with using("triton", example, segment=segment):
        first, second = (staged(call_of(example), *cotangents) for _ in range(2))
    for x, y in zip((*first[:2], *results_of(first.out, first.grads).values()),
                    (*second[:2], *results_of(second.out, second.grads).values()),
                    strict=True):  # fmt: skip
        assert torch.equal(x, y)


def test_sequences_without_tokens_leave_the_state_as_it_is() -> None:
    for example in (Example(T=0, lengths=(0, 0), K=8, V=6), Example(T=0, B=2, K=8, V=6)):
        call, (d_o, d_state) = call_of(example), example.cotangents()
        M, R, out, _, d_start, grads = staged(call, d_o, d_state.to(torch.float32))
        assert torch.equal(M, torch.eye(8).expand_as(M)) and not bool(R.any())
        assert call.state is not None and torch.equal(out.final_state, call.state)
        assert torch.equal(d_start, d_state.to(torch.float32)) and grads.state is not None
        assert torch.equal(grads.state, d_state.to(torch.float32))


# Launches, from what a call on the meta device would launch.


def stages_of(**sizes: Any) -> list[list[Launch]]:
    """Return what each of the four stages of a call launches."""
    call = meta_call(True, **SIZES | sizes, state=True)
    stages: list[list[Launch]] = []
    with torch.no_grad(), recording("sm_90") as launches:

        def note() -> None:
            stages.append([*launches])
            launches.clear()

        kept = TRITON.summarise(replace(call, state=None)).kept
        note()
        out = TRITON.resume(call, kept)
        note()
        d_o, d_state = torch.empty_like(out.o), torch.empty_like(out.final_state)
        _, rest = TRITON.summarise_gradients(call, out.saved, d_o, d_state)
        note()
        TRITON.resume_gradients(call, out.saved, rest, d_o, d_state)
        note()
    return stages


def stages_launched(**sizes: Any) -> list[list[str]]:
    """Return the kernels that each of the four stages of a call launches."""
    return [[launch.kernel.__name__ for launch in stage] for stage in stages_of(**sizes)]


def compiled(launches: list[Launch]) -> list[CompiledKernel]:
    """Return the kernels of launches, compiled, with the predicted times of the launches."""

    def again(call: Call) -> None:
        for x in launches:
            launch(x.kernel, x.grid, *x.args, **x.kwargs)

    return compile_for("triton", "sm_90", Launching(again), [sequence()])


def test_a_call_that_is_not_cut_is_walked_once_more_either_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(plan, "_kept", "on")
    first, last = ["prepare", "walk"], ["walk_back", "token_gradients"]
    assert stages_launched(B=4) == [first, ["walk"], ["walk_back"], last]
    monkeypatch.setattr(plan, "_kept", "off")
    assert stages_launched(B=4) == [first, ["walk"], ["walk_back"], ["walk", *last]]


def test_a_call_that_is_cut_is_walked_no_more_often_than_without_stages(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(plan, "_kept", "on")
    few = {"T": 32768, "H": 2, "HV": 8}
    first = ["prepare", "walk", "compose_whole"]
    backward = ["walk_back", "compose_whole"]
    last = ["walk_back", "token_gradients"]
    assert stages_launched(**few) == [first, ["compose", "walk"], backward, ["compose", *last]]
    assert stages_launched(**few, N=2)[0] == first
    monkeypatch.setattr(plan, "_kept", "off")
    assert stages_launched(**few)[3] == ["walk", *last]


@pytest.mark.parametrize("rows", [1, 4])
def test_stages_take_as_long_as_the_cost_model_of_many_devices_counts(rows: int) -> None:
    """Within a factor of 1.35, as whole calls are; with sequences that are cut, and without."""
    H200, s = MACHINES["h200"], Sizes(rows, 8192, 16, 32, 128, 128, rows)
    counted = [
        work.summarise(s, H200, "bfloat16"),
        work.forward(s, H200, "bfloat16", resumes=True),
        work.summarise_gradients(s, H200, "bfloat16"),
        work.backward(s, H200, "bfloat16", resumes=True),
    ]
    assert work.is_cut(s, H200) == (rows == 1)
    for stage, own in zip(stages_of(B=rows, HV=32), counted, strict=True):
        assert len(stage) == own.launches
        timed = [x for row in compiled(stage) for x in row.launches]
        predicted = sum(x.prediction.us for x in timed if x.prediction is not None)
        assert len(timed) == len(stage) and all(x.prediction is not None for x in timed)
        assert 1 / 1.35 < 1e6 * own.seconds(H200, "bfloat16") / predicted < 1.35


def test_what_stages_launch_alone_spills_nothing_and_has_a_predicted_time() -> None:
    own = [
        x
        for stage in stages_of(T=32768, H=2, HV=8)
        for x in stage
        if x.kernel.__name__ == "compose_whole" or x.kwargs.get("STAGED")
    ]
    assert len(own) == 6
    rows = compiled(own)
    assert [
        (row.kernel, row.spills, row.failures) for row in rows if row.spills or row.failures
    ] == []
    assert all(timed.prediction is not None for row in rows for timed in row.launches)
    assert sum(len(row.launches) for row in rows) == len(own)
