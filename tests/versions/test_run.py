"""A cell that runs other versions than its own, breaks, hangs or crashes is never green."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from versions import __main__ as command
from versions import report, run
from versions.cells import Cell, Group, select
from versions.install import Installed
from versions.process import CellFailedError, NotRunError, Processes
from versions.run import Matrix, Result

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

SMALL = Group("numpy", ("1.0",), ("test_small.py",))


def small(version: str = "1.0") -> Cell:
    return Cell(SMALL, version)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for logs, and tests that take no time."""
    monkeypatch.setattr(run, "LOGS", tmp_path / "logs")
    monkeypatch.setattr(run, "install", lambda cell, runner: Installed(sys.executable))
    monkeypatch.setattr(run, "probe", lambda *_: {"numpy": "1.0.1"})
    monkeypatch.setattr(run, "test_arguments", lambda _: [str(tmp_path / "test_small.py")])
    return tmp_path


def one(place: Path, source: str, seconds: float = 120) -> Result:
    """Run one cell whose only test file is this."""
    (place / "test_small.py").write_text(source)
    (result,) = Matrix(1, seconds).run([small()])
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
    ("version", "found", "message"),
    [
        ("1.0", "1.0.1", None),
        ("1.0", "1.0", None),
        ("1.0", "1.01", "numpy 1.01 would run, should be 1.0"),
        ("newest", "3.0", None),
    ],
)
def test_a_cell_runs_its_own_version_or_fails(
    version: str, found: str, message: str | None
) -> None:
    if message is None:
        run.check_versions(small(version), Installed("python"), {"numpy": found})
        return
    with pytest.raises(CellFailedError, match=message):
        run.check_versions(small(version), Installed("python"), {"numpy": found})


def test_another_version_than_was_installed_fails() -> None:
    installed = Installed("python", None, (("tokenizers", "0.22.2"), ("regex", "1")))
    found = {"numpy": "1.0", "tokenizers": "0.23.3"}
    with pytest.raises(CellFailedError, match=r"tokenizers 0\.23\.3 would run, should be 0\.22\.2"):
        run.check_versions(small(), installed, found)


def test_a_module_that_is_not_what_its_metadata_say_fails(tmp_path: Path) -> None:
    (tmp_path / "onnx.py").write_text("__version__ = '0.0.1'\n")
    (cell,) = select(["onnx-newest"])
    path = {"PYTHONPATH": str(tmp_path)}
    with pytest.raises(CellFailedError, match=r"onnx 0\.0\.1 is imported, .* is installed"):
        run.probe(cell, Installed(sys.executable), path)


def test_a_green_cell_counts_what_ran(place: Path) -> None:
    result = one(
        place,
        "import os, pytest\n"
        "def test_one(): assert os.environ['GDN_OPS_CACHE']\n"
        "def test_two(): pytest.skip('no GPU')\n",
    )
    assert (result.state, result.passed, result.skips) == ("passed", 1, {"no GPU": 1})
    assert result.is_green and result.versions == {"numpy": "1.0.1"}


def test_a_crash_of_the_interpreter_is_one_failed_test(place: Path) -> None:
    result = one(
        place,
        "import os\ndef test_one(): pass\ndef test_two(): os.abort()\ndef test_three(): pass\n",
    )
    assert (result.state, result.passed) == ("failed", 2)
    assert [name.rpartition("::")[2] for name in result.failures] == ["test_two"]


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("def test_one(): raise ValueError('no')\n", ""),
        ("import pytest\npytest.skip('nothing here', allow_module_level=True)\n", "ended with"),
        ("import nothing_of_this_name\n", ""),
    ],
)
def test_what_does_not_pass_is_red(place: Path, source: str, reason: str) -> None:
    result = one(place, source)
    assert (result.state, result.passed, result.is_green) == ("failed", 0, False)
    assert reason in result.reason
    assert result.failures or result.reason


def test_a_cell_that_takes_too_long_is_ended_and_red(place: Path) -> None:
    result = one(place, "import time\ndef test_one(): time.sleep(600)\n", seconds=2)
    assert result.state == "failed"
    assert result.reason.startswith("took longer than")


def test_a_cell_that_cannot_be_installed_says_pip_s_error(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(cell: Cell, runner: Any) -> Installed:
        code = "print('ERROR: No matching distribution'); print('bye'); raise SystemExit(1)"
        runner([sys.executable, "-c", code], {})
        raise AssertionError("not reached")

    monkeypatch.setattr(run, "install", failing)
    result = one(place, "")
    assert (result.state, result.is_green) == ("not run", False)
    assert result.reason == "cannot be installed: ERROR: No matching distribution"


def test_a_missing_newer_python_is_no_failure(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(cell: Cell, runner: Any) -> Installed:
        raise NotRunError("no Python newer than 3.11", excused=True)

    monkeypatch.setattr(run, "install", missing)
    result = one(place, "")
    assert (result.state, result.is_green) == ("not run", True)


def test_ending_ends_children_of_children_too(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    script = f"sleep 600 & echo $! > {pid}; wait"
    with pytest.raises(CellFailedError):
        Processes().run(["sh", "-c", script], tmp_path / "log", {}, 1)
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        state = subprocess.run(
            ["ps", "-o", "stat=", "-p", pid.read_text().strip()], capture_output=True, text=True
        ).stdout.strip()
        if not state or state.startswith("Z"):
            return
        time.sleep(0.05)
    os.kill(int(pid.read_text()), signal.SIGKILL)
    raise AssertionError("a child of the command still runs")


def test_nothing_starts_after_the_end(tmp_path: Path) -> None:
    processes = Processes()
    processes.end()
    with pytest.raises(NotRunError, match="interrupted"):
        processes.run(["true"], tmp_path / "log", {}, 1)


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


@pytest.mark.parametrize(("state", "code"), [("passed", 0), ("failed", 1), ("not run", 1)])
def test_the_exit_code_and_the_lines_say_what_happened(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], state: str, code: int
) -> None:
    failures = ["tests.test_a::test_one"] if state == "failed" else []
    result = Result("triton-3.6", state, "2026-11-28", {"triton": "3.6.0"}, [], 7, failures)
    result.seconds = 130.2
    recorded: list[Result] = []
    monkeypatch.setattr(command.Matrix, "run", lambda self, cells: iter([result]))
    monkeypatch.setattr(report, "record", recorded.extend)
    assert command.main(["triton-3.6"]) == code
    out = capsys.readouterr().out
    assert "[ 1/1]" in out and "triton 3.6.0" in out and "2 min 10 s" in out
    assert ("tests.test_a::test_one" in out) == (state == "failed")
    assert ("triton-3.6.log" in out) == (state != "passed")
    assert recorded == []
    command.main(["triton-3.6", "--record"])
    assert recorded == [result]
