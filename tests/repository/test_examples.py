"""The examples: laws against their closed forms, tasks against plain Python, exact resuming."""

from __future__ import annotations

import importlib
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from errors import message_of
from paths import ROOT

MODULES = (
    "checkpoints",
    "laws",
    "memory",
    "mesh",
    "niah",
    "plots",
    "serve_split",
    "tasks",
    "train_lm",
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def examples() -> Iterator[Any]:
    """Import the scripts as their folder sees them; forget them afterwards."""
    pytest.importorskip("matplotlib")
    pytest.importorskip("rich")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "examples")
        yield {name: importlib.import_module(name) for name in MODULES}
        for name in MODULES:
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def points(examples: Any) -> list[Any]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    measured: list[Any] = examples["memory"].measure(24)
    torch.set_num_threads(threads)
    return measured


@pytest.fixture(scope="module")
def at(points: list[Any]) -> dict[tuple[str, str, float], float]:
    """Return what was measured, by law, line and abscissa."""
    return {(p.law, p.line, p.x): p.measured for p in points}


# Laws without training.


def test_every_closed_form_goes_through_what_is_measured(points: list[Any]) -> None:
    judged = [p for p in points if p.expected is not None]
    assert len(judged) > 100
    # Five standard errors; 24 memories make the estimate of the error itself uncertain.
    missed = [p for p in judged if abs(p.measured - p.expected) > 5 * p.error + 1e-9]
    assert missed == []
    # And the means are sharp enough for that to say something.
    laws = {p.law for p in judged} - {"repeated haystack", "fresh haystack"}
    assert max(p.error for p in judged if p.law in laws) < 0.06


def test_the_needle_in_a_repeated_haystack_stays_and_in_a_fresh_one_goes(at: Any) -> None:
    longest = 2048
    assert abs(at["repeated haystack", "delta, β = 1", longest] - 0.75) < 0.05
    assert abs(at["repeated haystack", "delta, β = 1", 64] - 0.75) < 0.05
    assert abs(at["fresh haystack", "delta, β = 1", longest]) < 0.1
    assert at["fresh haystack", "delta, β = 0.1", 64] > 0.85


def test_on_independent_keys_the_nearest_value_is_best_found_by_plain_linear_attention(
    at: Any,
) -> None:
    others = {line for law, line, _ in at if law == "nearest value"} - {"linear"}
    for ratio in (1.0, 2.0, 4.0):
        for line in others:
            assert at["nearest value", "linear", ratio] > at["nearest value", line, ratio]
            assert at["collisions", "linear", ratio] > at["collisions", line, ratio]


def test_laws_hold_in_cases_that_can_be_done_by_hand(examples: Any) -> None:
    laws = examples["laws"]
    assert laws.delta_error(1, 64, 1.0, 1.0) == pytest.approx(0.0, abs=1e-15)
    # One pair, half written: ‖v/2‖².
    assert laws.delta_error(1, 64, 1.0, 0.5) == pytest.approx(0.25)
    # Two pairs: the last is exact, the first lost s² of itself and took s of the other.
    by_hand = (3 / (64 * 66) + 1 / 64) / 2
    assert laws.delta_error(2, 64, 1.0, 1.0) == pytest.approx(by_hand)
    for pairs in (1, 2, 100):
        assert laws.gated_error(pairs, 64, 1.0) == pytest.approx((pairs - 1) / 64)
    # β → 0 writes nothing.
    assert laws.delta_error(9, 64, 1.0, 0.0) == 1.0
    assert laws.overwritten_error(32, 4, 1.0, True) == (0.0, 0.0)
    assert laws.overwritten_error(32, 4, 1.0, False) == (1.0, 0.0)


def test_memory_draws_every_plot_and_writes_what_it_drew(
    examples: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    memory = examples["memory"]
    monkeypatch.setattr(memory, "LENGTHS", (64, 128))
    memory.main(["--memories", "3", "--out", str(tmp_path)])
    for name in ("collisions", "writing", "retention"):
        assert (tmp_path / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    drawn = [memory.Point(**p) for p in json.loads((tmp_path / "memory.json").read_text())]
    assert memory.table(drawn, "collisions") in capsys.readouterr().out


# Needles and the tasks that separate the rules.


@pytest.mark.parametrize(("task", "span"), [("needle 1", 1), ("needle 2", 1), ("needle 3", 4)])
@pytest.mark.parametrize("length", [24, 64, 300])
def test_the_answer_is_the_value_of_the_needle(
    examples: Any, task: str, span: int, length: int
) -> None:
    tasks = examples["tasks"]
    tokens, targets = tasks.needles(task, 50, length, torch.Generator().manual_seed(0))
    assert tokens.shape == targets.shape == (50, length)
    depths = set()
    for row, wanted in zip(tokens.tolist(), targets.tolist(), strict=True):
        at = row.index(tasks.NEEDLE)
        depths.add(at)
        key, value = row[at + 1], row[at + 2 : at + 2 + span]
        assert row.count(tasks.NEEDLE) == row.count(tasks.QUERY) == 1
        assert row[-span - 2 :] == [tasks.QUERY, key, *value]
        assert wanted[-span - 1 : -1] == value
        assert set(wanted[: -span - 1]) | {wanted[-1]} == {tasks.SILENT}
        hay = row[:at] + row[at + 2 + span : -span - 2]
        assert all(tasks.FIRST_FILLER <= x < tasks.NEEDLE for x in hay)
        if task == "needle 1":
            sentence = tasks.SENTENCE.tolist()
            assert hay == (sentence * length)[: len(hay)]
    assert len(depths) > 8


def test_a_run_is_repeatable_and_depends_on_the_seed(examples: Any) -> None:
    niah = examples["niah"]
    settings = niah.Settings(lessons=12, steps=3, rows=8, stretches=(1,))
    run = niah.run("delta", 0, settings)
    assert run == niah.run("delta", 0, settings)
    assert run != niah.run("delta", 1, settings)


@pytest.mark.slow
def test_the_error_term_learns_to_overwrite_and_the_decay_to_switch(examples: Any) -> None:
    niah = examples["niah"]
    settings = niah.Settings(stretches=(1,))
    accuracy = {
        (row["task"], row["rule"]): row["accuracy"]
        for rule in niah.RULES
        for row in niah.run(rule, 0, settings)
    }
    for rule in niah.RULES:
        assert accuracy["recall", rule] > 0.9
    for rule in ("delta", "gated_delta"):
        assert accuracy["overwrite", rule] > accuracy["overwrite", "linear"] + 0.2
    for rule in ("gated", "gated_delta"):
        assert accuracy["switch", rule] > accuracy["switch", "linear"] + 0.25
        assert accuracy["switch", rule] > accuracy["switch", "delta"]


def test_needles_are_looked_for_with_one_command(
    examples: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    niah = examples["niah"]
    sizes = ["--lessons", "3", "--steps", "3", "--seeds", "2", "--rows", "2", "--processes", "1"]
    niah.main([*sizes, "--out", str(tmp_path)])
    record = json.loads((tmp_path / "niah.json").read_text())
    assert record["settings"]["lessons"] == 3
    # 3 needle tasks at 4 lengths, and 3 others: for 4 rules and 2 seeds.
    assert len(record["rows"]) == (3 * 4 + 3) * 4 * 2
    assert (tmp_path / "niah.png").read_bytes()[:4] == b"\x89PNG"
    assert niah.table(record["rows"]) in capsys.readouterr().out


def test_the_page_shows_the_recorded_results(examples: Any) -> None:
    page = (ROOT / "docs" / "memory.md").read_text(encoding="utf-8")
    folder = ROOT / "docs" / "img"
    record = json.loads((folder / "niah.json").read_text(encoding="utf-8"))
    settings = examples["niah"].Settings()
    assert {**record["settings"], "stretches": settings.stretches} == vars(settings)
    assert examples["niah"].table(record["rows"]) in page
    memory = examples["memory"]
    recorded = json.loads((folder / "memory.json").read_text(encoding="utf-8"))
    points = [memory.Point(**p) for p in recorded]
    for law in ("collisions", "nearest value", "written again", "stale"):
        assert memory.table(points, law) in page, law
    others = {
        "speed.png": "index.md",
        "parallel.png": "parallel-plan.md",
        "paper-cpu.png": "paper.md",
        "paper-cuda.png": "paper.md",
    }
    for image in folder.glob("*.png"):
        shown = (ROOT / "docs" / others.get(image.name, "memory.md")).read_text(encoding="utf-8")
        assert f"(img/{image.name})" in shown
        assert image.stat().st_size < 150_000


# Training.

TINY = ["--width", "16", "--layers", "2", "--heads", "2", "--length", "24", "--window", "8"]
TINY += ["--batch", "4", "--steps", "12", "--sample", "5", "--rate", "0.01"]


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog. " * 30, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("pattern", ["G", "GA", "MGA", "A"])
def test_a_resumed_training_is_bit_for_bit_the_one_that_was_never_stopped(
    examples: Any, text: str, tmp_path: Path, pattern: str
) -> None:
    train, arguments = examples["train_lm"], [text, *TINY, "--pattern", pattern]
    whole = train.main([*arguments, "--out", str(tmp_path / "whole")])
    stopped = str(tmp_path / "stopped")
    half = train.main([*arguments, "--out", stopped, "--until", "5"])
    assert half.step == 5
    rest = train.main([text, "--out", stopped, "--resume", "--sample", "0"])
    assert rest.step == whole.step == 12
    resumed = rest.model.state_dict()
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(weight, resumed[name]), name
    assert not torch.equal(half.model.embedding.weight, rest.model.embedding.weight)


def test_training_lowers_the_loss_and_samples_from_the_prompt(
    examples: Any, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = examples["train_lm"]
    options = ["--steps", "60", "--save-every", "30", "--prompt", "the quick ", "--sample", "9"]
    trained = train.main([text, *TINY, *options, "--out", str(tmp_path / "lm")])
    bits = trained.bits_held_out()
    assert math.isfinite(bits)
    # Uniform bytes take 8; the letters' frequencies alone about 4.
    assert bits < 3.5
    out = capsys.readouterr().out
    assert "step 30: " in out
    assert f"step 60: {bits:.3f} bits per byte, held out" in out
    assert out.splitlines()[-1].startswith("the quick ")
    assert len(out.splitlines()[-1]) == len("the quick ") + 9


def test_an_interrupted_training_saves_where_it_was(
    examples: Any, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = examples["train_lm"]
    advance = train.Training.advance

    def interrupted(training: Any) -> float:
        if training.step == 4:
            raise KeyboardInterrupt
        return float(advance(training))

    monkeypatch.setattr(train.Training, "advance", interrupted)
    train.main([text, *TINY, "--out", str(tmp_path)])
    saved = train.Training.load(tmp_path / "checkpoint.pt", train.read(Path(text)))
    assert saved.step == 4
    assert saved.settings.length == 24


def test_a_checkpoint_is_not_overwritten_by_a_new_training(
    examples: Any, text: str, tmp_path: Path
) -> None:
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(b"precious")
    arguments = [text, *TINY, "--out", str(tmp_path)]
    message = message_of(SystemExit, examples["train_lm"].main, arguments)
    assert message == f"{path} exists; --resume goes on from it, another --out starts anew"
    assert path.read_bytes() == b"precious"


def test_a_text_that_is_too_short_is_refused(examples: Any, tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("too short", encoding="utf-8")
    arguments = [str(path), *TINY, "--out", str(tmp_path / "lm")]
    message = message_of(SystemExit, examples["train_lm"].main, arguments)
    assert message == "the text has 9 bytes, should have at least 260 for --length 24"
