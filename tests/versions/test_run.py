"""A cell that runs other versions than its own, breaks, hangs or crashes is never green."""

from __future__ import annotations

import os
import re
import select
import sys
from dataclasses import replace
from pathlib import Path
from threading import Event, Timer
from unittest import mock

import pytest

from versions import __main__ as command
from versions import report, run
from versions.cells import CELLS, Cell, CellFailedError, NotRunError
from versions.run import Result

JUNIT = """<testsuites><testsuite>
<testcase classname="tests.test_a" name="test_one"/>
<testcase classname="tests.test_a" name="test_two[x]"><failure message="no"/></testcase>
<testcase classname="tests.test_a" name="test_three"><error message="no"/></testcase>
<testcase classname="tests.test_a" name="test_four"><skipped message="no GPU"/></testcase>
<testcase classname="tests.test_a" name="test_five"><skipped message="no GPU"/></testcase>
<testcase classname="tests.test_a" name="test_six">
<skipped type="pytest.xfail" message="a fault of torch"/></testcase>
<testcase classname="" name="tests.test_b"><skipped message="collection skipped">
('/somewhere/tests/test_b.py', 12, "Skipped: could not import 'triton'")</skipped></testcase>
</testsuite></testsuites>"""


SMALL = Cell("numpy", ("test_small.py",), version="1.0")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for logs, and tests that take no time."""
    monkeypatch.setattr(run, "LOGS", tmp_path / "logs")
    monkeypatch.setattr(run, "default_jobs", lambda: 1)
    monkeypatch.setattr(run, "install", lambda cell, runner: {})
    monkeypatch.setattr(run, "probe", lambda *_: {"numpy": "1.0.1"})
    monkeypatch.setattr(run, "test_arguments", lambda _: [str(tmp_path / "test_small.py")])
    return tmp_path


def one(place: Path, source: str, seconds: float = 120) -> Result:
    """Run one cell whose only test file is this."""
    (place / "test_small.py").write_text(source)
    (result,) = run.run_cells([SMALL], 1, seconds)
    return result


def test_junit_is_counted_with_the_reasons_of_skips(tmp_path: Path) -> None:
    path = tmp_path / "junit.xml"
    path.write_text(JUNIT)
    assert run.read_junit(path) == (
        1,
        ["tests.test_a::test_two[x]", "tests.test_a::test_three"],
        {
            "could not import 'triton'": 1,
            "expected to fail: a fault of torch": 1,
            "no GPU": 2,
        },
    )


@pytest.mark.parametrize(
    ("version", "imported", "message"),
    [
        ("1.0", {"numpy": "1.0.1"}, None),
        ("1.0", {"numpy": "1.0"}, None),
        ("1.0", {"numpy": "1.01"}, "numpy 1.01 would run, should be 1.0"),
        ("newest", {"numpy": "3.0"}, None),
        (
            "1.0",
            {"numpy": "1.0", "tokenizers": "0.23.3"},
            "tokenizers 0.23.3 would run, should be 0.22.2",
        ),
    ],
)
def test_a_cell_runs_its_own_version_and_what_was_installed_or_fails(
    version: str, imported: dict[str, str], message: str | None
) -> None:
    said = None
    try:
        installed = {"tokenizers": "0.22.2", "regex": "1"}
        run.check_versions(replace(SMALL, version=version), installed, imported)
    except CellFailedError as error:
        said = str(error)
    assert said == message


@pytest.mark.parametrize(("torch", "is_right"), [("2.11.0", True), ("2.1.1", False)])
def test_the_cell_of_a_python_runs_the_torch_that_it_names(torch: str, is_right: bool) -> None:
    cell = replace(SMALL, package="python", version="3.12", beside=("torch==2.11.*",))
    said = ""
    try:
        run.check_versions(cell, {}, {"python": "3.12.1", "torch": torch})
    except CellFailedError as error:
        said = str(error)
    assert said == ("" if is_right else f"torch {torch} would run, should be 2.11.*")


def test_a_module_that_is_not_what_its_metadata_say_fails(tmp_path: Path) -> None:
    (tmp_path / "onnx.py").write_text("__version__ = '0.0.1'\n")
    path = {"PYTHONPATH": str(tmp_path)}
    with pytest.raises(CellFailedError, match=r"onnx 0\.0\.1 is imported, .* is installed"):
        run.probe(CELLS["onnx-newest"], sys.executable, {}, path)


def test_a_green_cell_counts_what_ran(place: Path) -> None:
    result = one(
        place,
        "import os, pytest\n"
        "def test_one(): assert os.environ['GDN_OPS_CACHE']\n"
        "def test_two(): pytest.skip('no GPU')\n",
    )
    assert (result.state, result.passed, result.skips) == ("passed", 1, {"no GPU": 1})
    assert result.is_green and result.versions == {"numpy": "1.0.1"}


@pytest.mark.parametrize(
    ("source", "passed", "failed", "reason"),
    [
        # A crash of the interpreter is one failed test.
        (
            "import os\ndef test_one(): pass\ndef test_two(): os.abort()\ndef test_three(): pass\n",
            *(2, ["test_two"], ""),
        ),
        ("def test_one(): raise ValueError('no')\n", 0, ["test_one"], ""),
        (
            "import pytest\npytest.skip('nothing here', allow_module_level=True)\n",
            *(0, [], "pytest ended with .+"),
        ),
        ("import nothing_of_this_name\n", 0, ["test_small"], ""),
        ("import time\ndef test_one(): time.sleep(600)\n", 0, [], r"took longer than \d+ min"),
    ],
)
def test_what_does_not_pass_is_red(
    place: Path, source: str, passed: int, failed: list[str], reason: str
) -> None:
    result = one(place, source, seconds=2 if "sleep" in source else 120)
    assert (result.state, result.passed, result.is_green) == ("failed", passed, False)
    assert [re.split("::|[.]", name)[-1] for name in result.failures] == failed
    assert re.fullmatch(reason, result.reason)


def test_a_cell_that_cannot_be_installed_says_pip_s_error(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "print('ERROR: No matching distribution'); print('bye'); raise SystemExit(1)"
    pip = [sys.executable, "-c", code]
    monkeypatch.setattr(run, "install", lambda cell, runner: runner(pip, {}))
    result = one(place, "")
    assert (result.state, result.is_green) == ("not run", False)
    assert result.reason == "cannot be installed: ERROR: No matching distribution"


def test_a_missing_newer_python_is_no_failure(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = NotRunError("no Python newer than 3.11", excused=True)
    monkeypatch.setattr(run, "interpreter", mock.Mock(side_effect=missing))
    result = one(place, "")
    assert (result.state, result.is_green) == ("not run", True)


def test_ending_ends_children_of_children_too(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    with pytest.raises(CellFailedError):
        script = ["sh", "-c", f"sleep 600 > {pipe} & wait"]
        run.run_command(script, {}, tmp_path / "log", 1, Event())
    # The pipe ends when nobody holds it any more.
    assert select.select([reader], [], [], 20)[0] == [reader]
    os.close(reader)


def test_nothing_starts_or_goes_on_after_the_end(tmp_path: Path) -> None:
    ended, touched = Event(), tmp_path / "touched"
    ended.set()
    with pytest.raises(NotRunError, match="interrupted"):
        run.run_command(["touch", str(touched)], {}, tmp_path / "log", 1, ended)
    assert not touched.exists()
    ended.clear()
    Timer(0.5, ended.set).start()
    with pytest.raises(NotRunError, match="interrupted"):
        run.run_command(["sleep", "600"], {}, tmp_path / "log", 600, ended)


@pytest.mark.parametrize(
    ("cores", "memory", "jobs"),
    [(8, 17 << 30, 4), (2, 100 << 30, 2), (8, 0, 1), (None, 9 << 30, 1)],
)
def test_as_many_cells_run_at_once_as_cores_and_memory_allow(
    monkeypatch: pytest.MonkeyPatch, cores: int | None, memory: int, jobs: int
) -> None:
    monkeypatch.setattr(run.os, "cpu_count", lambda: cores)
    monkeypatch.setattr(run, "available_memory", lambda: memory)
    assert run.default_jobs() == jobs


@pytest.mark.parametrize(("processes", "workers"), [(3, "3"), (0, "1")])
def test_the_tests_of_a_lone_cell_share_out_to_every_core(
    place: Path, monkeypatch: pytest.MonkeyPatch, processes: int, workers: str
) -> None:
    monkeypatch.setattr(run, "default_jobs", lambda: processes)
    source = "import os\ndef test_one(): raise ValueError(os.environ['PYTEST_XDIST_WORKER_COUNT'])"
    assert one(place, source).failures
    assert f"ValueError: {workers}\n" in run.log_of("numpy-1.0").read_text()


@pytest.mark.parametrize(("state", "code"), [("passed", 0), ("failed", 1), ("not run", 1)])
def test_the_exit_code_and_the_lines_say_what_happened(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], state: str, code: int
) -> None:
    failures = ["tests.test_a::test_one"] if state == "failed" else []
    result = Result("triton-3.6", state, "2026-11-28", {"triton": "3.6.0"}, [], 7, failures)
    result.seconds = 130.2
    recorded: list[Result] = []
    monkeypatch.setattr(command, "run_cells", lambda *_: iter([result]))
    monkeypatch.setattr(report, "record", recorded.extend)
    assert command.main(["triton-3.6"]) == code
    out = capsys.readouterr().out
    assert "[ 1/1]" in out and "triton 3.6.0" in out and "2 min 10 s" in out
    assert ("tests.test_a::test_one" in out) == (state == "failed")
    assert ("triton-3.6.log" in out) == (state != "passed")
    assert recorded == []
    command.main(["triton-3.6", "--record"])
    assert recorded == [result]
