"""`gdn-ops bench ablation`: rows that differ in one part, paired, repeatable, and honest tables."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from command_line import run
from gdn_ops.bench.ablation import report, tasks, training
from gdn_ops.bench.ablation import run as running
from gdn_ops.bench.ablation.table import FULL, QUICK, TASKS, TEXT, VARIANTS, Settings
from gdn_ops.nn import GatedDeltaNet, HybridLM
from gdn_ops.nn.options import FEATURE_MAPS, QK_NORMS
from gdn_ops.spec.ops import GATED_DELTA

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = Settings(steps=2, seeds=2, batch=4, length=16, evaluated=8)
PARTS = {
    "no-decay": {"a_proj.weight", "decay.A_log", "decay.dt_bias"},
    "linear": {"a_proj.weight", "decay.A_log", "decay.dt_bias"},
    "no-output-norm": {"o_norm.weight"},
    "no-output-gate": {"g_proj.weight"},
    "no-convolution": {"conv.weight"},
}
"""Parameters of the layer that a row does not have."""

PER_HEAD = {"a_proj.weight", "b_proj.weight", "decay.A_log", "decay.dt_bias", "o_norm.weight"}


def layer(model: HybridLM) -> GatedDeltaNet:
    mixer = model.blocks[0].mixer
    assert isinstance(mixer, GatedDeltaNet)
    return mixer


def parts(mixer: GatedDeltaNet) -> dict[str, Any]:
    """Return what a layer computes with, beside its parameters."""
    names = ("rule", "feature_map", "qk_norm", "output_gate", "output_norm", "allow_neg_eigval")
    own = {name: getattr(mixer, name) for name in names}
    kernel = 0 if mixer.conv is None else mixer.conv.kernel_size
    return {**own, "short_conv": kernel, "num_heads": mixer.num_heads, "head_dim": mixer.head_dim}


# Tasks.


def test_recalled_keys_are_answered_with_their_values() -> None:
    tokens, targets = tasks.recall(40, torch.Generator().manual_seed(0), 24)
    for row, wanted in zip(tokens.tolist(), targets.tolist(), strict=True):
        cut = row.index(tasks.QUERY)
        pairs = dict(zip(row[:cut:2], row[1:cut:2], strict=True))
        assert len(pairs) == 24 and set(wanted[: cut + 1]) == {tasks.SILENT}
        assert wanted[cut + 1 :] == [pairs[key] for key in row[cut + 1 :]]
        assert set(row[cut + 1 :]) == set(pairs)


@pytest.mark.parametrize("count", [8, 12])
def test_overwritten_keys_are_answered_with_their_last_value(count: int) -> None:
    tokens, targets = tasks.overwrite(40, torch.Generator().manual_seed(0), count)
    for row, wanted in zip(tokens.tolist(), targets.tolist(), strict=True):
        cut = row.index(tasks.QUERY)
        pairs = list(zip(row[:cut:2], row[1:cut:2], strict=True))
        assert len(pairs) == 2 * len(set(row[:cut:2])) == 2 * count
        assert wanted[cut + 1 :] == [dict(pairs)[key] for key in row[cut + 1 :]]
        assert sorted(row[cut + 1 :]) == sorted(set(row[:cut:2]))


@pytest.mark.parametrize("count", [8, 12])
def test_behind_a_switch_old_keys_are_answered_with_none(count: int) -> None:
    tokens, targets = tasks.switch(40, torch.Generator().manual_seed(0), count)
    for row, wanted in zip(tokens.tolist(), targets.tolist(), strict=True):
        turn, cut = row.index(tasks.SEPARATOR), row.index(tasks.QUERY)
        old = set(row[:turn:2])
        new = dict(zip(row[turn + 1 : cut : 2], row[turn + 2 : cut : 2], strict=True))
        assert len(old | set(new)) == 2 * count
        assert wanted[cut + 1 :] == [new.get(key, tasks.NONE) for key in row[cut + 1 :]]
        assert wanted.count(tasks.NONE) == count and {tasks.NONE} < set(wanted[cut + 1 :])


def test_what_is_held_out_of_the_text_is_never_drawn() -> None:
    text = tasks.Text()
    whole = bytes(torch.cat([text.trained, text.held_out]).tolist())
    assert whole == tasks.shipped_text() and 0.09 < len(text.held_out) / len(whole) < 0.11
    tokens, targets = text.draw(50, 20, torch.Generator().manual_seed(0))
    for row, wanted in zip(tokens.tolist(), targets.tolist(), strict=True):
        assert row[1:] == wanted[:-1]
        assert bytes([row[0], *wanted]) in bytes(text.trained.tolist())
    tokens, targets = text.held_out_pieces(100)
    assert bytes(tokens.flatten().tolist()) == whole[len(text.trained) :][: tokens.numel()]
    assert torch.equal(tokens.flatten()[1:], targets.flatten()[:-1])
    assert len(text.held_out) - 101 < tokens.numel() < len(text.held_out)


def test_bits_by_frequency_are_those_of_a_count_of_bytes() -> None:
    text = tasks.Text()
    trained = text.trained.tolist()
    share = [(trained.count(b) + 1) / (len(trained) + 256) for b in range(256)]
    own = [-math.log2(share[b]) for b in text.held_out.tolist()]
    assert text.bits_by_frequency() == pytest.approx(sum(own) / len(own))
    assert training.chances(["switch", TEXT]) == {"switch": 0.5, TEXT: text.bits_by_frequency()}


# Rows.


@pytest.mark.parametrize("name", VARIANTS)
def test_a_row_differs_from_full_in_the_part_that_it_names(name: str) -> None:
    full, model = training.build(FULL, 3, 40), training.build(name, 3, 40)
    changed = {
        key: value for key, value in parts(layer(model)).items() if value != parts(layer(full))[key]
    }
    assert changed == {**VARIANTS[name].options}
    assert {x for x in changed if x.endswith("_dim")} <= {"head_dim"}
    before, after = full.state_dict(), model.state_dict()
    missing = {key.removeprefix("blocks.0.mixer.") for key in before.keys() - after.keys()}
    assert missing == PARTS.get(name, set())
    assert after.keys() <= before.keys()
    reshaped = {key for key, x in after.items() if x.shape != before[key].shape}
    expected = PER_HEAD if name.startswith("head-") else set()
    assert {key.removeprefix("blocks.0.mixer.") for key in reshaped} == expected
    for key in after.keys() - reshaped:
        assert torch.equal(after[key], before[key]), key
    keys = layer(model).num_heads * layer(model).head_dim
    assert (keys, layer(model).value_dim) == (64, 2 * layer(model).head_dim)


def test_the_rows_take_every_choice_of_the_parts_that_they_vary() -> None:
    rows = [v.arguments for v in VARIANTS.values()]
    own = {(r.get("feature_map", "silu"), r.get("qk_norm", "l2")) for r in rows}
    assert {feature for feature, _ in own} == set(FEATURE_MAPS)
    assert {norm for _, norm in own} == set(QK_NORMS)
    assert {r.get("rule", "gated_delta") for r in rows} == set(GATED_DELTA.rule)
    assert len({repr(sorted(r.items())) for r in rows}) == len(rows)


def test_a_seed_draws_other_parameters_and_leaves_the_generator_of_the_process() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, two = (training.build(FULL, seed, 40).embedding.weight for seed in (0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(one, two)


def test_every_row_sees_the_same_sequences_in_the_same_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: dict[str, list[int]] = {}
    train = training.train

    def spy(model: HybridLM, draw: Any, steps: int, rate: float) -> float:
        def told(step: int) -> tasks.Batch:
            tokens, targets = draw(step)
            seen.setdefault(name, []).append(
                hash(tuple((tokens * 300 + targets).flatten().tolist()))
            )
            return tokens, targets

        return train(model, told, steps, rate)

    monkeypatch.setattr(training, "train", spy)
    for name in ("full", "linear", "head-8"):
        assert len(list(training.run(name, 1, list(TASKS), TINY))) == len(TASKS)
    # Lessons take twice the steps of each of the four tasks.
    assert len(seen[FULL]) == len(set(seen[FULL])) == (2 + 4) * TINY.steps
    assert seen[FULL] == seen["linear"] == seen["head-8"]
    name = "other seed"
    list(training.run(FULL, 2, list(TASKS), TINY))
    assert not set(seen[name]) & set(seen[FULL])


def test_tasks_do_not_depend_on_which_others_are_asked_for() -> None:
    every = dict(training.run("no-delta", 0, list(TASKS), TINY))
    for task in ("switch", TEXT):
        assert dict(training.run("no-delta", 0, [task], TINY)) == {task: every[task]}


def test_the_full_row_learns_to_predict_text_beyond_the_frequencies_of_bytes() -> None:
    settings = replace(Settings(), steps=25, batch=16)
    (learnt,) = dict(training.run(FULL, 0, [TEXT], settings)).values()
    assert learnt is not None and 1.0 < learnt < training.chances([TEXT])[TEXT] - 0.5


def test_a_value_is_the_share_of_right_answers_or_the_mean_of_bits() -> None:
    model = training.build(FULL, 0, tasks.VOCABULARY)
    tokens, targets = tasks.recall(6, torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(tokens)[0]
    asked = [(i, t) for i in range(6) for t in range(25) if targets[i, t] != tasks.SILENT]
    right = [int(logits[i, t].argmax()) == int(targets[i, t]) for i, t in asked]
    assert training.accuracy(model, (tokens, targets)) == pytest.approx(sum(right) / 48)
    following = (tokens[:, :-1], tokens[:, 1:])
    chosen = functional.log_softmax(logits[:, :-1], -1).gather(2, following[1][..., None])
    bits = float(-chosen.mean() / math.log(2))
    assert training.bits(model, following) == pytest.approx(bits, rel=1e-5)


# Tables.


def numbers(data: Mapping[str, Any]) -> list[Any]:
    return [data["cells"], data["rows"], data["tasks"], data["settings"]]


def test_the_command_runs_every_row_on_every_task_and_writes_what_it_prints(
    tmp_path: Path,
) -> None:
    given = ("--quick", "--seeds", 1, "--steps", 1, "--processes", 1)
    shown = run("bench", "ablation", *given, "--out", tmp_path)
    assert (shown.exit_code, shown.stderr) == (0, "")
    data = json.loads((tmp_path / "ablation.json").read_text(encoding="utf-8"))
    assert shown.stdout.splitlines()[-1] == str(tmp_path / "ablation.json")
    assert set(data) == {
        *("schema", "system", "seconds", "settings", "tasks", "rows", "cells", "absent")
    }
    assert data["schema"] == 1 and data["system"]["backend"] in ("cpp", "torch")
    assert {"date", "devices", "versions", "dtype", "processes"} <= set(data["system"])
    expected = {**replace(QUICK, seeds=1, steps=1).to_json(), "width": 64}
    assert data["settings"] == expected
    assert [row["name"] for row in data["rows"]] == list(VARIANTS)
    assert [task["name"] for task in data["tasks"]] == list(TASKS)
    cells = {(cell["row"], cell["task"]): cell for cell in data["cells"]}
    assert list(cells) == [(row, task) for row in VARIANTS for task in TASKS]
    for (row, task), cell in cells.items():
        (value,) = cell["values"]
        assert 0 <= value <= 1 if task != TEXT else 0 < value < 10
        assert cell["mean"] == cell["lowest"] == cell["highest"] == value
        (full,) = cells[FULL, task]["values"]
        gain = full - value if task == TEXT else value - full
        assert cell["against_full"] == [pytest.approx(gain, abs=2e-6)], (row, task)
        assert (cell["better"], cell["worse"]) == (int(gain > 1e-9), int(gain < -1e-9))
    table = [line.split() for line in shown.stdout.splitlines()]
    assert [line[0] for line in table if line and line[0] in VARIANTS] == list(VARIANTS)
    bits = {line[0]: line[4] for line in table if line and line[0] in VARIANTS}
    assert bits == {row: f"{cells[row, TEXT]['mean']:.2f}" for row in VARIANTS}


def test_the_same_seeds_give_the_same_numbers_in_any_processes() -> None:
    rows, columns = ["full", "no-delta"], ["recall", TEXT]
    told: list[str] = []
    here = running.measure(rows, columns, TINY, 1, told.append)
    assert told == [f"{row}, seed {seed}" for seed in (0, 1) for row in rows]
    again = running.measure(rows, columns, TINY, 1)
    beside = running.measure(rows, columns, TINY, 2)
    assert numbers(here) == numbers(again) == numbers(beside)
    assert (here["system"]["processes"], beside["system"]["processes"]) == (1, 2)
    values = [value for cell in here["cells"] for value in cell["values"]]
    assert len(set(values)) > len(values) / 2


def test_a_process_that_ends_names_its_row(monkeypatch: pytest.MonkeyPatch) -> None:
    command = (running.sys.executable, "-c", "import sys; sys.exit('no memory')")
    monkeypatch.setattr(running, "COMMAND", command)
    with pytest.raises(ValueError) as error:
        running.measure(["full"], ["text"], TINY, 2)
    expected = r"row full, seed [01]: the process ended with exit code 1: no memory"
    assert re.fullmatch(expected, str(error.value))


def test_a_training_that_diverges_is_said_and_not_averaged() -> None:
    wild = replace(TINY, steps=4, rate=1e30)
    data = running.measure(["full", "no-decay"], ["recall", TEXT], wild, 1)
    for cell in data["cells"]:
        assert cell["values"] == [None, None] and cell["diverged"] == 2
        assert cell["mean"] is cell["lowest"] is cell["highest"] is None
        assert cell["against_full"] == [None, None]
        assert cell["better"] == cell["worse"] == 0
    assert report.text(data).count("diverged") == report.markdown(data).count("diverged") == 4


def cells(**values: list[float | None]) -> dict[str, Any]:
    """Return a table of one task, whose rows have these values."""
    found: running.Values = {(row, "recall"): own for row, own in values.items()}
    known = {key: [*own] for key, own in found.items()}
    data = running.measure([], ["recall"], replace(TINY, seeds=len(values["full"])), 1)
    data["rows"] = [running._row(FULL) | {"name": name} for name in values]
    data["cells"] = [running._cell(row, "recall", known) for row in values]
    return data


def test_a_sign_stands_where_every_seed_differs_alike() -> None:
    data = cells(full=[0.5, 0.7], low=[0.4, 0.6], high=[0.6, 0.9], mixed=[0.4, 0.9], bad=[None, 1])
    lines = {line.split()[0]: line for line in report.text(data).splitlines() if line}
    assert lines["full"].split(None, 1)[1] == "60 (50-70)"
    assert lines["low"].split(None, 1)[1] == "50 (40-60) -"
    assert lines["high"].split(None, 1)[1] == "75 (60-90) +"
    assert lines["mixed"].split(None, 1)[1] == "65 (40-90)"
    assert lines["bad"].split(None, 1)[1] == "100 (100-100), 1 diverged"
    assert lines["chance"].split(None, 1)[1] == "6"
    assert "+ or -: better or worse than full with every one of the 2 seeds" in report.text(data)
    assert "| 50 (40–60) - |" in report.markdown(data)


def test_without_the_full_row_nothing_is_compared() -> None:
    data = running.measure(["linear"], [TEXT], replace(TINY, seeds=2), 1)
    (cell,) = data["cells"]
    assert cell["against_full"] is cell["better"] is cell["worse"] is None
    assert "better or worse" not in report.text(data)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (
            "--rows full,no-decya",
            f"--rows: unknown row 'no-decya', known: {', '.join(VARIANTS)}; did you mean "
            "'no-decay'? (gdn-ops bench ablation --help tells more)",
        ),
        (
            "--tasks recal",
            "--tasks: unknown task 'recal', known: recall, overwrite, switch, text; did you mean "
            "'recall'? (gdn-ops bench ablation --help tells more)",
        ),
        (
            "--seeds 0",
            "--seeds: is '0', should be an integer from 1 to 1000 (gdn-ops bench ablation --help "
            "tells more)",
        ),
        (
            "--steps 0",
            "--steps: is '0', should be an integer from 1 to 1000000 (gdn-ops bench ablation "
            "--help tells more)",
        ),
        (
            "--processes -1",
            "--processes: is '-1', should be an integer from 1 to 1024 (gdn-ops bench ablation "
            "--help tells more)",
        ),
        ("--out {file}", "--out: '{file}' is a file, should be a folder"),
    ],
)
def test_a_mistake_is_told_before_anything_is_trained(
    given: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running, "measure", None)
    file = tmp_path / "file"
    file.touch()
    result = run("bench", "ablation", *given.format(file=file).split())
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == f"gdn-ops: {text.format(file=file)}\n"
