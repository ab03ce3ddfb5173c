"""The page of versions and the package's data are what the recorded results say."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from gdn_ops.environment import versions
from versions import report
from versions.cells import ROOT
from versions.run import Result


def result(cell: str, state: str, version: str, **more: Any) -> Result:
    versions = {cell.rpartition("-")[0]: version}
    return Result(cell, state, "2026-11-28", versions, ["test_a.py"], 5, **more)


RESULTS = {
    r.cell: r
    for r in (
        result("transformers-newest", "passed", "5.24.0", skips={"no GPU": 3}),
        result("transformers-4.57", "passed", "4.57.6", skips={"no GPU": 3, "no kernel": 1}),
        result("transformers-5.8", "failed", "5.8.1", failures=["tests.test_a::test_one", "x"]),
        result("torch-newest", "failed", "2.15.0", reason="took longer than 60 min"),
        result("torch-locked", "passed", "2.13.0+cpu"),
        result("python-3.11", "passed", "3.11.7"),
        Result("python-newest", "not run", "2026-11-29", reason="no Python newer than 3.11"),
    )
}


def test_the_page_and_the_data_are_made_of_the_results() -> None:
    results = report.read_results()
    assert results
    assert report.RESULTS.read_text() == report.results_text(results)
    assert report.PAGE.read_text() == report.page_text(results)
    assert report.DATA.read_text() == report.data_text(results)


def test_the_committed_results_name_no_path_of_a_machine() -> None:
    text = report.RESULTS.read_text() + report.PAGE.read_text()
    assert not re.search(r"/(work|home|root|tmp|usr)/", text)


def test_only_what_passed_counts_as_tested() -> None:
    assert json.loads(report.data_text(RESULTS)) == {
        "date": "2026-11-29",
        "packages": {
            "python": ["3.11", "3.11"],
            "torch": ["2.13.0", "2.13.0"],
            "transformers": ["4.57.6", "5.24.0"],
        },
    }


def test_versions_are_ordered_as_numbers() -> None:
    results = [result(f"onnx-{v}", "passed", v) for v in ("1.9.0", "1.18.0", "1.20.1")]
    assert report.tested_ranges(results) == {"onnx": ["1.9.0", "1.20.1"]}


def test_the_page_shows_every_cell_with_how_it_ended() -> None:
    page = report.page_text(RESULTS)
    for line in (
        "| transformers | 4.57.6 | 5.24.0 | `transformers-5.8` |",
        "| `transformers-4.57` | transformers 4.57.6 | 5 | 4 | passed | 2026-11-28 |",
        "| `transformers-5.8` | transformers 5.8.1 | 5 | 0 "
        "| failed: `tests.test_a::test_one` and 1 more | 2026-11-28 |",
        "| `torch-newest` | torch 2.15.0 | 5 | 0 | failed: took longer than 60 min | 2026-11-28 |",
        "| `python-newest` | - | 0 | 0 | not run: no Python newer than 3.11 | 2026-11-29 |",
        "| no GPU | 3 | `transformers-4.57`, `transformers-newest` |",
        "| no kernel | 1 | `transformers-4.57` |",
    ):
        assert f"\n{line}\n" in page
    assert page.index("## transformers") < page.index("## torch") < page.index("## python")
    assert "result: 2026-11-29." in page.replace("\n", " ")


def test_results_survive_their_file_and_a_partial_run_replaces_its_own_row_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RESULTS", "PAGE", "DATA"):
        monkeypatch.setattr(report, name, tmp_path / name)
    report.record(RESULTS.values())
    again = report.read_results()
    assert again == RESULTS
    assert list(again)[:2] == ["transformers-4.57", "transformers-5.8"]
    assert report.page_text(again) == report.page_text(RESULTS)
    newer = Result("transformers-5.8", "passed", "2026-12-01", {"transformers": "5.8.1"}, passed=9)
    report.record([newer])
    updated = report.read_results()
    assert updated == RESULTS | {"transformers-5.8": newer}
    assert (tmp_path / "PAGE").read_text() == report.page_text(updated)
    assert json.loads((tmp_path / "DATA").read_text())["date"] == "2026-12-01"


# What `gdn-ops info` makes of it.

RANGES = {
    **{"transformers": ("4.57.6", "5.24.0"), "torch": ("2.8.0", "2.13.0")},
    "python": ("3.11", "3.13"),
}


@pytest.mark.parametrize(
    ("installed", "lines"),
    [
        ({"transformers": "5.24.0", "torch": "2.13.0+cpu"}, []),
        ({"transformers": "4.57.6", "torch": "2.8"}, []),
        ({"transformers": None}, []),
        (
            {"transformers": "5.25.0"},
            ["transformers 5.25.0 is newer than 5.24.0, the newest that was tested"],
        ),
        (
            {"transformers": "4.56.2", "torch": "2.14.0.dev20261101+cu130"},
            [
                "transformers 4.56.2 is older than 4.57.6, the oldest that was tested",
                "torch 2.14.0.dev20261101+cu130 is newer than 2.13.0, the newest that was tested",
            ],
        ),
        ({"torch": "2.8.0rc1"}, ["torch 2.8.0rc1 is older than 2.8.0, the oldest that was tested"]),
        ({"torch": "2.13.0rc1"}, []),
        # Releases of one Python count as one.
        ({"python": "3.11.2"}, []),
        ({"python": "3.13.9"}, []),
        ({"python": "3.14.0rc2"}, ["python 3.14 is newer than 3.13, the newest that was tested"]),
    ],
)
def test_versions_outside_are_named_with_the_page(
    installed: dict[str, str | None], lines: list[str]
) -> None:
    expected = [f"{line}: docs/versions.md" for line in lines]
    assert versions.warnings(installed, RANGES) == expected


def test_versions_are_ordered_as_releases_are() -> None:
    texts = ["2.8.0.dev1", "2.8", "2.8.1", "2.10.0a1", "2.10.0", "2.13.0+cpu", "10"]
    assert sorted(reversed(texts), key=versions.version_key) == texts
    assert versions.version_key("2.13.0+cpu") == versions.version_key("2.13")
    assert versions.version_key("1.0.post1") == versions.version_key("1.0")
    assert versions.version_key("?") == ((), True)


def test_the_package_reads_the_ranges_that_it_ships() -> None:
    shipped = json.loads(report.DATA.read_text())["packages"]
    assert {name: list(pair) for name, pair in versions.tested_ranges().items()} == shipped
    assert shipped


# The files for a public CI.

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_reads_only_and_names_targets_that_exist(path: Path) -> None:
    text = path.read_text()
    workflow = yaml.safe_load(text)
    assert workflow["permissions"] == {"contents": "read"}
    targets = set(re.findall(r"\bmake ([a-z]+)", re.sub(r"(?m)^\s*#.*$", "", text)))
    for job in workflow["jobs"].values():
        targets |= set(job.get("strategy", {}).get("matrix", {}).get("target", []))
        for step in job["steps"]:
            assert re.fullmatch(r"actions/[a-z-]+@v\d+", step.get("uses", "actions/none@v1"))
    assert targets
    known = set(re.findall(r"(?m)^([a-z]+):", (ROOT / "Makefile").read_text()))
    assert targets <= known


def test_the_workflows_run_what_was_promised() -> None:
    tests, versions = (yaml.safe_load(path.read_text()) for path in WORKFLOWS)
    # YAML reads the key `on` as true.
    assert set(tests[True]) == {"push", "pull_request"}
    assert set(versions[True]) == {"schedule", "workflow_dispatch"}
    assert tests["jobs"]["locked"]["strategy"]["matrix"]["target"] == ["test", "demo", "docs"]
    assert "make wheel" in [step.get("run") for step in tests["jobs"]["wheels"]["steps"]]
    assert list(versions[True]["workflow_dispatch"]["inputs"]) == ["cell"]
