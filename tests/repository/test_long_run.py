"""A long run counts what it draws by level and dtype, and goes on where it was stopped."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from gdn_ops.testing.conformance import CheckReport, CheckRow
from paths import ROOT

SUBJECT = "packed sequences equal the definition"


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module, which writes into a folder of its own."""
    spec = importlib.util.spec_from_file_location("long_run", ROOT / "benchmarks" / "long_run.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "RESULTS", tmp_path)
    return module


def run(script: ModuleType, monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["long_run.py", *words])
    code: int = script.main()
    return code


def checks(monkeypatch: pytest.MonkeyPatch, script: ModuleType, *rows: CheckRow) -> list[Any]:
    """Let every check find the next of some rows; return what it is asked for."""
    left, asked = list(rows), []

    def call(function: object, backend: str, seconds: float, **named: Any) -> CheckReport:
        asked.append((named["only"], named["dtypes"]))
        return CheckReport(backend, (left.pop(0),), seconds, seed=named["seed"])

    monkeypatch.setattr(script, "call", call)
    return asked


def test_calls_are_counted_for_what_was_named(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [CheckRow(SUBJECT, 60, 0.5), CheckRow(SUBJECT, 60, 0.7), CheckRow(SUBJECT, 100, 0.1)]
    asked = checks(monkeypatch, script, *rows)
    words = ("torch", "--calls", "100", "--seconds", "1")
    narrow = ("--dtype", "bfloat16,float16", "--only", "definition")
    assert run(script, monkeypatch, *words, *narrow) == 0
    assert run(script, monkeypatch, *words) == 0
    # Enough were counted.
    assert run(script, monkeypatch, *words, *narrow) == 0
    assert asked == [*[("definition", ["bfloat16", "float16"])] * 2, ("", None)]
    summary = json.loads((tmp_path / "check-torch.json").read_text())
    assert summary["calls"] == 220
    assert summary["subjects"] == {SUBJECT: {"calls": 220, "worst": 0.7}}
    assert [(part["dtype"], part["only"], part["calls"]) for part in summary["parts"]] == [
        ("bfloat16,float16", "definition", 120),
        ("", "", 100),
    ]
    assert [row["examples"] for row in summary["runs"]] == [60, 60, 100]


def test_a_failure_is_kept_and_the_exit_code_is_one(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checks(monkeypatch, script, CheckRow(SUBJECT, 9, 2.0, "off by one"), CheckRow(SUBJECT, 9, 0.1))
    assert run(script, monkeypatch, "torch", "--calls", "18") == 1
    summary = json.loads((tmp_path / "check-torch.json").read_text())
    assert not summary["passed"] and not summary["parts"][0]["passed"]
    assert summary["subjects"][SUBJECT] == {"calls": 18, "worst": 0.1, "failures": ["off by one"]}


def test_a_summary_without_parts_is_gone_on_with(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = {"backend": "torch", "calls": 90, "passed": True, "system": {}, "subjects": {}}
    (tmp_path / "check-torch.json").write_text(json.dumps(old | {"runs": []}))
    asked = checks(monkeypatch, script, CheckRow(SUBJECT, 10, 0.5))
    assert run(script, monkeypatch, "torch", "--calls", "100") == 0
    assert len(asked) == 1
    assert json.loads((tmp_path / "check-torch.json").read_text())["calls"] == 100
