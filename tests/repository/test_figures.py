"""The figures show what was measured, and texts quote it."""

from __future__ import annotations

import importlib.util
import json
from types import ModuleType
from typing import Any

import pytest

from paths import ROOT


def script(name: str) -> ModuleType:
    """Return a script of benchmarks/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def table() -> list[dict[str, Any]]:
    """Return the rows of the reference table."""
    path = ROOT / "benchmarks" / "results" / "cpu-float32-bfloat16.json"
    rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["rows"]
    return rows


def test_the_picture_shows_every_bar_with_its_number() -> None:
    pytest.importorskip("matplotlib")
    figures = script("figures")
    data = figures.panels()
    shown = [text.get_text().strip() for axis in figures.draw(data).axes for text in axis.texts]
    numbers = [
        figures.label(x, figures.MOST * min(times.values()))
        for times in data.values()
        for x in times.values()
    ]
    assert sorted(shown) == sorted(numbers)
    for title in figures.CASES.values():
        assert {"gdn_ops cpp", "gdn_ops cpp (bfloat16)", "onnxruntime"} <= set(data[title])


def test_a_bar_that_would_hide_the_others_is_cut_and_its_number_says_so() -> None:
    pytest.importorskip("matplotlib")
    figures = script("figures")
    drawn = figures.draw({"case": {"gdn_ops cpp": 2.0, "peer": 1234.5}})
    assert [bar.get_width() for bar in drawn.axes[0].patches] == [2.0 * figures.MOST, 2.0]
    assert [text.get_text() for text in drawn.axes[0].texts] == [" 1234, cut", " 2"]


def test_readme_quotes_what_was_measured() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    quoted: list[str] = []
    for row in table():
        layer = (row["what"], row["case"])
        who = (row["comparator"], row["dtype"])
        if layer[1] == "qwen-16-32-2048" and row["unit"] == "ms":
            named = who[1] == "float32" or who[0] in ("cpp", "vllm-cpu")
            quoted += [f"{row['median']:.0f} ms"] * (named and who[0] != "executorch")
        elif layer[0] == "step" and who in (("cpp", "bfloat16"), ("vllm-cpu", "bfloat16")):
            quoted.append(f"{row['median']:.0f} µs")
        elif layer[0] in ("threads", "load") and who[0] in ("cpp", "torch"):
            quoted.append(f"{row['median']:.1f} times")
        elif layer[0] == "memory":
            quoted.append(f"{row['median']:.0f} MiB")
    assert len(set(quoted)) >= 15
    assert [number for number in quoted if number not in text] == []
    path = ROOT / "benchmarks" / "results" / "decode-cpu-float32.json"
    for row in json.loads(path.read_text(encoding="utf-8"))["rows"]:
        named = row["comparator"] in ("ort in place, bare", "torch in place")
        if named and row["case"].startswith("2 MiB"):
            assert f"{row['median']:.0f} µs" in text, row
