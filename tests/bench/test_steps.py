"""A token is checked before it is timed, ours, the peers' and the eager ways."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from gdn_ops.backends.cpp import library
from gdn_ops.bench import peers, steps
from gdn_ops.bench.contender import Contender, Prepared
from gdn_ops.bench.floors import Rates
from gdn_ops.bench.inputs import Inputs, Setting, find_case, make_kernel_step_inputs
from gdn_ops.bench.rows import Result
from gdn_ops.bench.verify import RefusedError, define_step
from gpu_stand_ins import FakeDevice, contender, stand_in

CASE = find_case("tiny-step")
RATES = Rates(1e11, 1e10, 1e10)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "ROUNDS", 3)
    monkeypatch.setattr(steps, "IN_A_ROW", 2)


def measure(*contenders: Contender, dtype: str = "float32") -> Result:
    result = Result({})
    steps.step_rows(CASE, contenders, Setting(dtype), RATES, result)
    return result


def test_ours_is_compared_with_the_best_eager_way_and_with_every_peer() -> None:
    rows = measure(stand_in("peer", FakeDevice()), contender()).rows
    of_ours = [row for row in rows if row.comparator == "torch"]
    names = dict.fromkeys(row.comparator for row in rows)
    assert list(names) == ["peer", "torch", *steps.EAGER_STEPS, steps.PASS]
    medians = {row.comparator: row.median for row in rows}
    best = min(steps.EAGER_STEPS, key=lambda name: medians[name])
    assert [row.against for row in of_ours] == [best, "peer"]
    for row in of_ours:
        assert row.ratio == pytest.approx(row.median / medians[str(row.against)])
    assert {row.samples for row in rows} == {3}


def test_every_way_of_a_step_takes_a_decay_of_channels() -> None:
    case = find_case("kimi-32-step-b1")
    small = replace(case, sizes=replace(case.sizes, B=2, H=2, HV=4, K=8, V=12, N=2))
    result = Result({})
    steps.step_rows(small, [contender()], Setting(), RATES, result)
    names = dict.fromkeys(row.comparator for row in result.rows)
    assert list(names) == ["torch", *steps.EAGER_STEPS, steps.PASS]
    assert case.channels and result.skipped == []


def test_without_float32_there_is_no_eager_way() -> None:
    rows = measure(contender(), dtype="bfloat16").rows
    assert [(row.comparator, row.against) for row in rows] == [
        ("torch", None),
        ("a pass", "a pass"),
    ]


def test_a_wrong_eager_step_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    right = steps.as_sums
    monkeypatch.setitem(steps.EAGER_STEPS, "eager sums", lambda *a: right(*a[:-1], a[-1] * 1.01))
    with pytest.raises(RefusedError, match="step eager sums: o off by"):
        measure(contender())


def test_a_wrong_peer_is_refused() -> None:
    def twice(o: Tensor) -> Tensor:
        return 2 * o

    with pytest.raises(RefusedError, match="step peer: o off by 1"):
        measure(stand_in("peer", FakeDevice(), change=twice), contender())


def test_a_peer_that_cannot_is_left_out_with_its_error() -> None:
    def refuse(x: Inputs) -> Prepared:
        return Prepared(lambda: torch.ones(2) + torch.ones(3))

    peer = Contender("peer", refuse, refuse, is_peer=True)
    result = measure(peer, contender())
    ((what, name, reason),) = result.skipped
    assert (what, name) == ("step, tiny-step", "peer")
    assert reason.startswith("RuntimeError: The size of tensor a (2) must match")
    assert "peer" not in {row.comparator for row in result.rows}


def test_the_kernel_of_a_step_is_what_the_step_runs() -> None:
    if library.missing() is not None:
        pytest.skip(f"backend 'cpp': {library.missing()}")
    x = make_kernel_step_inputs(CASE.sizes, torch.float32, torch.float32, "cpu")
    assert x.state is not None
    mine = replace(x, state=x.state.clone())
    kernel = steps.kernel_of(contender("cpp").step(mine).run)
    assert kernel is not None and steps.kernel_of(lambda: None) is None
    # It has run twice to be found, and runs once more.
    kernel()
    state = x.state
    for _ in range(3):
        state = define_step(replace(x, state=state))[1]
    torch.testing.assert_close(mine.state, state.float())
    rows = measure(contender("cpp")).rows
    (row,) = (row for row in rows if row.comparator == steps.KERNEL)
    assert row.against == steps.PASS


@pytest.mark.parametrize("channels", [False, True])
@pytest.mark.parametrize("name", ["transformers", "onnxruntime"])
def test_a_peer_steps_as_the_definition_does_again_and_again(name: str, channels: bool) -> None:
    found = peers.find_contender(name)
    if isinstance(found, str):
        pytest.skip(found)
    if channels and name == "transformers":
        pytest.importorskip("transformers.models.kimi_linear")
    sizes = replace(CASE.sizes, H=4) if channels else CASE.sizes
    x = make_kernel_step_inputs(sizes, torch.float32, torch.float32, "cpu", channels=channels)
    assert x.state is not None and x.has_channels == channels
    prepared = found.step(replace(x, state=x.state.clone()))
    state = x.state
    for _ in range(3):
        exact = define_step(replace(x, state=state))
        for got, right in zip(prepared.results(), exact, strict=True):
            torch.testing.assert_close(got.double(), right, rtol=1e-5, atol=1e-6)
        state = exact[1].float()
