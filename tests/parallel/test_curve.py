"""The picture and the page show what the model says and what was measured."""

from __future__ import annotations

import importlib.util
import json
from types import ModuleType
from typing import Any

import pytest

from gdn_ops.parallel.cost import op_seconds
from gdn_ops.parallel.machines import MACHINES
from gdn_ops.spec.language import Sizes
from paths import ROOT

RESULT = ROOT / "benchmarks" / "results" / "parallel.json"


def script(name: str) -> ModuleType:
    """Return a script of benchmarks/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def result() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(RESULT.read_text(encoding="utf-8"))
    return found


def test_the_picture_shows_every_line_and_every_bar_with_its_number() -> None:
    pytest.importorskip("matplotlib")
    curve = script("parallel_curve")
    step, op, shares, bars = curve.draw().axes
    lines = len(curve.LENGTHS) * len(curve.LINES)
    assert [len(axis.lines) for axis in (step, op)] == [lines, lines]
    for axis in (step, op):
        for line in axis.lines:
            heights = [float(y) for y in line.get_ydata()]
            assert heights[0] == 1 and all(0 < y <= 1 for y in heights)
            # Of the op alone, more ranks may fill the device better than fewer.
            assert axis is op or heights == sorted(heights, reverse=True)
    # A stack is the time of all devices over that of one.
    stacks = [sum(bar.get_height() for bar in x) for x in zip(*shares.containers, strict=True)]
    efficiency = {x: curve.of_op(x, curve.STACKED) for x in curve.LINES}
    places = [curve.DEVICES.index(n) for n in curve.SHARED]
    assert stacks == pytest.approx([1 / efficiency[x][i] for i in places for x in curve.LINES])
    shown = sorted(text.get_text() for text in bars.texts)
    pairs = [number for pair in curve.measured().values() for number in pair]
    assert shown == sorted(f"{number:.2f}" for number in pairs)


def test_what_was_predicted_beside_the_measurement_is_what_the_model_says() -> None:
    sizes = Sizes(**result()["system"]["sizes"])
    rows = [row for row in result()["rows"] if row["what"] == "forward+backward"]
    assert {row["processes"] for row in rows} == {1, 2, 4}
    for row in rows:
        n = row["processes"]
        strategy: Any = "data" if n == 1 else row["strategy"]
        seconds = op_seconds(strategy, sizes, n, MACHINES["cpu"].shared(n), "float32")
        assert row["predicted"]["total"] == pytest.approx(seconds.total)
        assert row["sent"] == row["predicted_sent"]
        assert row["error"] < 1e-5


def test_the_page_quotes_what_was_measured_and_predicted() -> None:
    page = (ROOT / "docs" / "parallel-plan.md").read_text(encoding="utf-8")
    rows = {(x["processes"], x["strategy"], x["what"]): x for x in result()["rows"]}
    for (processes, strategy, what), both in rows.items():
        if what == "forward":
            continue
        forward = rows[processes, strategy, "forward"]
        name = "one process" if processes == 1 else f"`{strategy}`, {processes} processes"
        line = (
            f"| {name} | {forward['best']:.2f} s | {both['best']:.2f} s | "
            f"{both['predicted']['total']:.2f} s | {both['over_one']:.2f} | "
            f"{both['predicted_over_one']:.2f} | {both['sent'] / 1e6:.1f} MB |"
        )
        assert line in page, line
