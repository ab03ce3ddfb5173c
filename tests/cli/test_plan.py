"""`gdn-ops plan` prints the same for the same question, says what it is, and refuses mistakes."""

from __future__ import annotations

import json
import re

import pytest

from command_line import run
from gdn_ops.parallel import planning
from gdn_ops.parallel.machines import DATED, MACHINES
from gdn_ops.parallel.planning import Model
from gdn_ops.spec.language import Sizes
from paths import ROOT

HINT = " (gdn-ops plan --help tells more)\n"


def test_the_example_of_the_docs_is_what_the_command_prints() -> None:
    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    section = page.partition("\n## plan\n")[2].partition("\n## ")[0]
    shell, shown = re.findall(r"```(?:sh|text)\n(.*?)```", section, re.DOTALL)[:2]
    first = shell.splitlines()[0]
    result = run(*first.removeprefix("gdn-ops ").split(), columns=80)
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == shown


def test_json_holds_the_rows_of_the_model() -> None:
    words = "plan --gpus 8 --tokens 131072 --heads 4 --value-heads 8 --head-dim 64 --value-dim 96"
    words += " --layers 3 --hidden 512 --mlp-size 0 --batch 2 --dtype float32 --device a100 --json"
    result = run(*words.split())
    assert result.exit_code == 0
    data = json.loads(result.stdout)
    model = Model(Sizes(2, 131072, 4, 8, 64, 96, 2), 3, 512, 0, "float32")
    rows = planning.rows(model, 8, MACHINES["a100"])
    best = planning.choice(rows, MACHINES["a100"])
    assert best is not None and data["take"] == str(best.split)
    assert [x["split"] for x in data["rows"]] == [str(row.split) for row in rows]
    assert [x["step"] for x in data["rows"]] == [row.step for row in rows]
    assert (data["is_model"], data["date"], data["gpus"]) == (True, DATED, 8)
    assert data["machine"]["name"] == MACHINES["a100"].name
    assert {x["strategy"] for x in data["rows"] if not x["in_gdn_ops"]} == {"heads"}
    assert run(*words.split()).stdout == result.stdout


def test_the_output_says_that_it_is_a_model_and_what_it_rests_on() -> None:
    result = run("plan", "--gpus", 64, "--tokens", "1e6", "--checkpoint")
    assert f"This is a model with the parameters of {DATED}, not a measurement" in result.stdout
    assert "1 x 1000000 tokens" in result.stdout
    assert "949 TFLOP/s, 4.8 TB/s, 141 GB; 8 a node" in result.stdout
    assert "Take gather x64: of the splits that gdn_ops has" in result.stdout
    assert "heads x64: not possible: key heads (16)" in result.stdout


def test_a_slower_link_is_seen() -> None:
    def step(*more: str) -> float:
        result = run("plan", "--gpus", 8, "--tokens", "131072", "--json", *more)
        rows = {row["split"]: row["step"] for row in json.loads(result.stdout)["rows"]}
        return float(rows["gather x8"])

    assert step("--link", "pcie4") > step("--link", "nvlink3") > step()


@pytest.mark.parametrize(
    ("words", "start"),
    [
        ("--tokens 1e6", "Take none as it is: none fits in 141 GB. With --checkpoint, gather x64 "),
        ("--tokens 1e9", "Take none: none fits in 141 GB, not even with --checkpoint and --fsdp."),
        ("--tokens 63", "Take none: no split that gdn_ops has is possible."),
        ("--tokens 8192 --batch 64", "Take data x64: of the splits that gdn_ops has and that fit"),
    ],
)
def test_the_advice_fits_the_memory(words: str, start: str) -> None:
    result = run("plan", "--gpus", 64, *words.split())
    assert result.exit_code == 0
    assert f"\n{start}" in result.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--tokens 5", "the following arguments are required: --gpus"),
        ("--gpus 2", "the following arguments are required: --tokens"),
        ("--gpus 0 --tokens 5", "--gpus: is '0', should be an integer from 1 to 65536"),
        ("--gpus 2 --tokens 1.5", "--tokens: is '1.5', should be an integer from 1"),
        ("--gpus 2 --tokens 1e12", "--tokens: is '1e12', should be an integer from 1"),
        ("--gpus 2 --tokens nan", "--tokens: is 'nan', should be an integer from 1"),
        ("--gpus 2 --tokens inf", "--tokens: is 'inf', should be an integer from 1"),
        ("--gpus 2 --tokens -8", "--tokens: is '-8', should be an integer from 1"),
        ("--gpus 2 --tokens many", "--tokens: is 'many', should be an integer from 1"),
        ("--gpus 2 --tokens 8 --mlp-size -1", "--mlp-size: is '-1', should be an integer from 0"),
        (
            "--gpus 2 --tokens 8 --batch 2 --batch 3",
            "--batch: is given twice, should be given once",
        ),
    ],
)
def test_a_wrong_number_is_refused(words: str, message: str) -> None:
    result = run("plan", *words.split())
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == f"gdn-ops: {message}{HINT}"


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (
            "--device h20",
            "--device: unknown device 'h20', known: a100, h100, h200, b200, mi300x, cpu",
        ),
        ("--dtype bf16", "--dtype: unknown dtype 'bf16'"),
        ("--link nvlink", "--link: unknown link 'nvlink'"),
        ("--heads 3", "--value-heads: is 32, should be a multiple of --heads 3"),
    ],
)
def test_a_wrong_name_is_refused_with_those_that_are_known(option: str, message: str) -> None:
    result = run("plan", "--gpus", 2, "--tokens", 8, *option.split())
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith(f"gdn-ops: {message}")
