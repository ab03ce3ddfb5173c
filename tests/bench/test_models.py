"""`gdn-ops bench models` compares before it times, and judges the rows it was made for."""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("rich")

from command_line import run
from gdn_ops.bench import exported, models
from gdn_ops.bench.inputs import Setting
from gdn_ops.bench.rows import Row, with_target
from gdn_ops.bench.verify import RefusedError
from gdn_ops.spec.errors import SpecError

pytestmark = pytest.mark.usefixtures("one_thread")

needs_qwen3_5 = pytest.mark.skipif(
    not hasattr(sys.modules["transformers"], "Qwen3_5ForCausalLM"),
    reason="this transformers has no Qwen3_5ForCausalLM",
)

TINY = models.Shape(
    tokens=20, hidden=32, intermediate=16, vocabulary=50, key_heads=1, value_heads=2, width=8
)
TINIER = dataclasses.replace(TINY, hidden=16)
ONCE = Setting("float32", "cpu", 1)


@needs_qwen3_5
def test_a_tiny_model_is_compared_timed_and_weighed() -> None:
    told: list[str] = []
    result = models.run(("torch",), ONCE, told.append, TINY, TINIER)
    served = ["prefill and decode", "prefill and decode of a small model"]
    assert told == ["logits and loss", "training step", *served, "memory of a training step"]
    assert len(told) == models.STAGES
    compared = ["logits against transformers", "loss against transformers"]
    assert [check.what for check in result.checks] == compared
    assert all(check.passed for check in result.checks)
    rows = {(row.case, row.what, row.comparator): row for row in result.rows}
    whats = {TINY.case: ("prefill", "training step", "decode", "memory")}
    whats[TINIER.case] = whats[TINY.case][::2]
    expected_rows = {
        (case, what, name)
        for case in whats
        for what in whats[case]
        for name in ("transformers", "torch")
    }
    if not exported.why_not():
        expected_rows |= {
            (case, what, name)
            for case in whats
            for what in whats[TINIER.case]
            for name in exported.EXPORTS
        }
    assert set(rows) == expected_rows
    for (case, what, name), row in rows.items():
        own = rows[case, what, "transformers"].median
        expected = row.median / own if what == "memory" else own / row.median
        assert row.ratio == pytest.approx(expected), (case, what, name)
        # Targets are for the model of the full size.
        assert row.target is None
    assert json.loads(json.dumps(result.to_json()))["system"]["model"] == dataclasses.asdict(TINY)


def test_the_model_of_the_full_size_has_targets() -> None:
    targets = [t for t in models.TARGETS if t.case == models.Shape().case]
    bare = [Row(t.what, t.case, "torch", "ms", 10.0, 9.0, 3, 1.5) for t in targets]
    rows = [with_target(row, models.TARGETS) for row in bare]
    reached = {"prefill": True, "training step": False, "decode": True, "memory": False}
    assert {row.what: row.reached for row in rows} == reached
    naive = dataclasses.replace(bare[0], comparator="naive")
    assert with_target(naive, models.TARGETS).target is None


@needs_qwen3_5
def test_another_model_is_refused_before_it_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(model: Any, ids: torch.Tensor) -> torch.Tensor:
        calls.append(0)
        return torch.tensor([1.0, float(len(calls))])

    calls: list[int] = []
    monkeypatch.setattr(models, "prefill", wrong)
    with pytest.raises(RefusedError, match="logits against transformers"):
        models.run(("torch",), ONCE, lambda text: None, TINY)
    assert len(calls) == 2


@needs_qwen3_5
def test_a_rounded_model_is_compared_with_an_exact_one(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = models.build(TINY, "bfloat16"), models.prompt(TINY)
    assert model.dtype == torch.bfloat16
    names = (models.PEER, "torch")
    checks = models._verify(model, ids, names, TINY.case)
    assert [check.what for check in checks] == ["logits against float32", "loss against float32"]
    assert all(0 < check.error <= check.allowance < 0.1 for check in checks)
    prefill = models.prefill
    rounded = functools.partial(prefill, model)
    # Another model: its logits have another sign.
    monkeypatch.setattr(
        models, "prefill", lambda m, i: -rounded(i) if m is model else prefill(m, i)
    )
    with pytest.raises(RefusedError, match="logits against float32"):
        monkeypatch.setattr(models, "ROUNDED", 0.0)
        models._verify(model, ids, names, TINY.case)


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(SpecError, match="unknown backend 'fast'"):
        models.run(("fast",), ONCE, lambda text: None, TINY)


def test_what_it_does_not_measure_is_refused() -> None:
    text = "bench models measures float32 and bfloat16 on cpu, not float16 on cpu"
    with pytest.raises(ValueError, match=f"^{text}$"):
        models.run(("torch",), Setting("float16", "cpu", 1), lambda text: None, TINY)


@needs_qwen3_5
def test_the_result_is_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(models, "run", functools.partial(models.run, shape=TINY, small=TINIER))
    monkeypatch.setattr(models, "memory_rows", lambda *_: None)
    result = run("bench", "models", "--repeats", 1, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    written = json.loads((tmp_path / "out" / "models-cpu-float32.json").read_text())
    assert {row["what"] for row in written["rows"]} == {"prefill", "training step", "decode"}
