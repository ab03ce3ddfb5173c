"""Many short sequences: both forms are judged by the definition, and their ratio is shown."""

from __future__ import annotations

import pytest
import torch

from gdn_ops.backends.torch import Torch
from gdn_ops.bench import packed, report, suite
from gdn_ops.bench.inputs import Setting
from gdn_ops.bench.verify import RefusedError
from gdn_ops.call.bind import Call
from gdn_ops.dispatch.backend import Forward
from gdn_ops.spec.cases import PACKED_CASES
from gdn_ops.spec.errors import SpecError
from gdn_ops.spec.language import Case, Sizes

FEW = Case("packed-few", Sizes(1, 11, 1, 2, 4, 4, 4), "tests", "float32", (3, 1, 5, 2))

pytestmark = pytest.mark.usefixtures("given_rates")


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the case of four sequences stand for any other."""
    monkeypatch.setattr(suite, "find_case", lambda name: FEW)


def run(names: tuple[str, ...] = ("torch",)) -> suite.Result:
    return suite.run(suite.make_plan(["packed-few"], ["packed"], names, (), Setting(repeats=1)))


@pytest.mark.parametrize("case", PACKED_CASES, ids=lambda case: case.name)
def test_the_lengths_of_a_case_fill_its_row(case: Case) -> None:
    x, places = packed.pack(case, Setting())
    assert x.cu_seqlens is not None
    lengths = x.cu_seqlens.diff()
    assert set(lengths.tolist()) == set(case.lengths)
    assert int(x.cu_seqlens[-1]) == case.sizes.T == len(places)
    assert len(lengths) == case.sizes.N


def test_tokens_of_a_batch_stand_at_the_start_of_their_rows() -> None:
    x, places = packed.pack(FEW, Setting())
    batch = packed.pad(x.beta, places, 4, 5)
    assert (batch != 0)[..., 0].sum(1).tolist() == [3, 1, 5, 2]
    assert torch.equal(batch.flatten(0, 1)[places], x.beta[0])


@pytest.mark.usefixtures("few")
def test_both_forms_have_a_row_and_the_packed_one_their_ratio() -> None:
    result = run()
    whats = ("packed forward", "packed forward+backward")
    assert [(row.what, row.comparator, row.against) for row in result.rows] == [
        (what, name, "torch batch") for what in whats for name in ("torch", "torch batch")
    ]
    first, second = result.rows[:2]
    assert first.ratio == pytest.approx(first.median / second.median)
    assert [(check.comparator, check.passed) for check in result.checks] == [("torch", True)]
    text = report.text(result)
    assert f"{first.ratio:.2f}x time  torch batch" in text
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("form", ["packed", "batch"])
def test_a_backend_that_is_wrong_in_one_form_is_refused(
    monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    forward = Torch.forward

    def wrong(self: Torch, call: Call) -> Forward:
        done = forward(self, call)
        if (call.cu_seqlens is None) == (form == "batch"):
            done.final_state[2].neg_()
        return done

    monkeypatch.setattr(Torch, "forward", wrong)
    with pytest.raises(RefusedError, match=f"torch on packed-few, {form}: state off by 2,"):
        run()


@pytest.mark.usefixtures("few")
def test_a_backend_without_packing_is_left_out_with_its_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Torch, "reasons", lambda self, call: ["no packing"])
    result = run()
    assert result.rows == result.checks == []
    assert ("packed forward, packed-few", "torch", "no packing") in result.skipped


def test_a_case_of_packed_sequences_has_one_measurement() -> None:
    with pytest.raises(SpecError) as raised:
        suite.check_effect(["packed-8192x1"], ["forward"])
    assert str(raised.value) == (
        "case 'packed-8192x1' is many sequences in one row, which --what forward does not "
        "measure: packed does"
    )
    with pytest.raises(SpecError) as raised:
        suite.check_effect(["tiny"], ["packed", "forward"])
    assert str(raised.value) == "--what packed needs a case of packed sequences, got tiny"
