"""Lists of names take "all" where that means something, and every mistake before anything runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from command_line import run
from gdn_ops.bench import models, suite
from gdn_ops.bench.rows import Result
from gdn_ops.cli import check_command, compile_command
from gdn_ops.dispatch import registry

LISTS = (
    *(("check", "--backend"), ("bench cases", "--backend"), ("bench cases", "--peer")),
    *(("bench cases", "--what"), ("bench models", "--backend"), ("bench gpu", "--backend")),
    *(("bench gpu", "--peer"), ("compile --backend triton", "--target")),
    ("bench paper", "--mixers"),
)
"""Every option that takes names with commas."""

SINGLE = (
    *(("compile", "--backend"), ("demo", "--backend"), ("bench cases", "--tune")),
    ("bench paper", "--backend"),
)
"""Every option that takes one name of a backend."""

BETWEEN = "should be names with commas, and no spaces, between"


def message(command: str, option: str, *values: str) -> str:
    """Give an option values that it should refuse, and return what is said without the hint."""
    given = [word for value in values for word in (option, value)]
    result = run(*command.split(), *given)
    assert (result.exit_code, result.stdout) == (2, "")
    name = " ".join(word for word in command.partition(" --")[0].split())
    hint = f" (gdn-ops {name} --help tells more)\n"
    assert result.stderr.endswith(hint)
    return result.stderr.removesuffix(hint)


@pytest.mark.parametrize("command, option", LISTS)
def test_a_list_that_is_none_is_told_how_to_write_it(command: str, option: str) -> None:
    for text in ("torch,", ",torch", "torch,,naive", " ", ","):
        assert message(command, option, text) == f"gdn-ops: {option}: is {text!r}, {BETWEEN}"
    for text in ("all,naive", "torch, all", "naive,ALL"):
        expected = f"gdn-ops: {option}: is {text!r}: 'all' stands alone, without other names"
        assert message(command, option, text) == expected
    assert message(command, option, "All") == f"gdn-ops: {option}: is 'All', did you mean 'all'?"


def test_none_stands_alone() -> None:
    for command in ("bench cases", "bench gpu"):
        expected = "gdn-ops: --peer: is 'none,fla': 'none' stands alone, without other names"
        assert message(command, "--peer", "none,fla") == expected
        expected = "gdn-ops: --peer: is 'NONE', did you mean 'none'?"
        assert message(command, "--peer", "NONE") == expected


@pytest.mark.parametrize("command, option", SINGLE)
def test_one_name_is_not_a_list(command: str, option: str) -> None:
    expected = f"gdn-ops: {option}: is 'torch,naive', should be one name"
    assert message(command, option, "torch,naive") == expected
    for text in ("torch,", "", " "):
        assert (
            message(command, option, text) == f"gdn-ops: {option}: is {text!r}, should be one name"
        )


@pytest.mark.parametrize("command, option", [*LISTS, *SINGLE])
def test_an_option_is_given_once(command: str, option: str) -> None:
    expected = f"gdn-ops: {option}: is given twice, should be given once"
    assert message(command, option, "torch", "naive") == expected


def test_names_are_taken_once_and_with_spaces(monkeypatch: pytest.MonkeyPatch) -> None:
    judged: list[str] = []

    def judge(name: str, *_: object) -> Any:
        judged.append(name)
        raise ValueError("enough")

    monkeypatch.setattr(check_command, "judge", judge)
    assert check_command.checkable(("torch", "naive")) == ["torch", "naive"]
    for text, first in ((" torch, naive,torch ", "torch"), ("all", registry.known_backends()[0])):
        judged.clear()
        assert run("check", "--backend", text).stderr == "gdn-ops: enough\n"
        assert judged == [first]


def test_all_means_every_backend_that_runs_here_but_the_definition(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plans: list[suite.Plan] = []

    def stop(plan: suite.Plan, *_: object) -> Result:
        plans.append(plan)
        raise ValueError("enough")

    monkeypatch.setattr(suite, "run", stop)
    words = ("--backend", "all", "--peer", "all", "--what", "all")
    assert run("bench", "tiny", "tiny", *words).stderr == "gdn-ops: enough\n"
    (plan,) = plans
    assert {"torch", "compile"} <= set(plan.backends)
    assert not {"naive", "triton", "tilelang"} & set(plan.backends)
    assert plan.peers == suite.default_peers("cpu")
    (part,) = plan.parts
    names = {what: [case.name for case in cases] for what, cases in part.cases.items()}
    tiny = {what: ["tiny"] for what in suite.SEQUENCES}
    assert names == {**tiny, "overhead": [], "import": []}
    given: list[tuple[str, ...]] = []

    def run_models(backends: tuple[str, ...], *_: object) -> Result:
        given.append(backends)
        raise ValueError("enough")

    monkeypatch.setattr(models, "run", run_models)
    assert run("bench", "models", "--backend", "all").stderr == "gdn-ops: enough\n"
    assert given == [plan.backends]


def test_a_case_that_is_named_twice_is_compiled_once() -> None:
    assert [case.name for case in compile_command.find_cases(("tiny", "tiny"))] == ["tiny"]


NOTHING = "backend 'naive' exposes no configurations to tune"


@pytest.mark.parametrize(
    ("command", "text"),
    {
        "bench tiny --tune naive": NOTHING,
        "bench tiny --tune naive --json": NOTHING,
        "bench --tune torch tiny tiny-step": "backend 'torch' exposes no configurations to tune",
        "bench tiny --tune torch --out new": "--out has no effect with --tune: leave it out",
        "bench --tune torch tiny packed-8192x1": "case 'packed-8192x1' is many sequences in one "
        "row, which --tune does not measure",
        "bench --tune torch tiny nope": "unknown case 'nope'",
        "bench models --backend nope --out new": "unknown backend 'nope'",
        "bench gpu --backend nope --out new": "unknown backend 'nope'",
        "bench gpu --peer nope --out new": "unknown peer 'nope'",
        "bench tiny --out new --plot x.jpg": "--plot: 'x.jpg' should end in .png, .svg or .pdf",
        "bench tiny --out .": "--out: 'cpu-float32.json' is a folder, should be a file",
        "bench tiny --out . --dtype bfloat16": "--out: 'cpu-bfloat16.png' is a folder, should be",
        "bench models --out .": "--out: 'models-cpu-float32.json' is a folder, should be a file",
        "bench decode --out .": "--out: 'decode-cpu-float32.json' is a folder, should be a file",
    }.items(),
)
def test_a_mistake_is_told_before_anything_is_measured_or_written(
    command: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folders = {"cpu-float32.json", "cpu-bfloat16.png"}
    folders |= {"models-cpu-float32.json", "decode-cpu-float32.json"}
    for name in folders:
        (tmp_path / name).mkdir()

    def measured(*_: object, **__: object) -> Any:
        raise AssertionError("something was measured")

    monkeypatch.setattr(suite, "run", measured)
    monkeypatch.setattr(models, "run", measured)
    result = run(*command.split())
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith(f"gdn-ops: {text}")
    assert {path.name for path in tmp_path.iterdir()} == folders
