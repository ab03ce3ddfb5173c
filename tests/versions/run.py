"""Run cells side by side: install, check what is imported, run pytest, read what it found."""

from __future__ import annotations

import datetime
import json
import os
import re
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

from versions.cells import ROOT, Cell, lowest
from versions.install import FOLDER, Installed, install
from versions.process import CellFailedError, NotRunError, Processes

LOGS = FOLDER / "logs"
MEMORY_OF_A_CELL = 4 << 30
MODULES = ("torch", "triton", "onnx", "onnxruntime", "transformers")
SHOWN = ("huggingface-hub", "tokenizers", "onnxscript")
"""What is shown, beside the package itself, where a cell has another than the lock."""

PROBE = f"""
import importlib, importlib.metadata, json, platform, sys
found = {{"python": platform.python_version()}}
for name in {SHOWN!r} + {MODULES!r}:
    try:
        found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        pass
for name in sys.argv[1:]:
    imported = importlib.import_module(name).__version__
    if imported.partition("+")[0] != found[name].partition("+")[0]:
        sys.exit(f"{{name}} {{imported}} is imported, {{found[name]}} is installed")
print(json.dumps(found))
"""


@dataclass
class Result:
    """Say how a cell ended: "passed", "failed" or "not run", with what ran and what it found."""

    cell: str
    state: str
    date: str
    versions: dict[str, str] = field(default_factory=dict)
    tests: list[str] = field(default_factory=list)
    passed: int = 0
    failures: list[str] = field(default_factory=list)
    skips: dict[str, int] = field(default_factory=dict)
    reason: str = ""
    seconds: float = 0.0
    excused: bool = False

    @property
    def is_green(self) -> bool:
        """Return whether it counts as success."""
        return self.state == "passed" or self.excused

    @property
    def skipped(self) -> int:
        """Return how many tests were skipped."""
        return sum(self.skips.values())


def test_arguments(cell: Cell, tests: Path = ROOT / "tests") -> list[str]:
    """Return pytest's arguments for the tests of a cell; a pattern that matches none is an error.

    Raises:
        CellFailedError: the table names a test that is not there.
    """
    found = []
    for pattern in cell.group.tests:
        if "::" in pattern:
            matching = [str(tests / pattern)]
        else:
            matching = sorted(map(str, tests.glob(pattern)))
        if not matching:
            raise CellFailedError(f"no test file is called {pattern}")
        found += matching
    keyword = ["-k", cell.group.keyword] if cell.group.keyword else []
    return [*dict.fromkeys(found), *keyword]


def skip_reason(element: ElementTree.Element) -> str:
    """Return why a test was skipped, without the path that pytest adds for a whole file."""
    text = element.get("message") or ""
    if text == "collection skipped":
        found = re.search(r"Skipped: (.*?)[\"']\)?$", (element.text or "").strip(), re.DOTALL)
        text = found[1] if found else text
    text = text.replace(str(ROOT), ".").strip().splitlines()[0] if text.strip() else "no reason"
    return f"expected to fail: {text}" if element.get("type") == "pytest.xfail" else text


def read_junit(path: Path) -> tuple[int, list[str], dict[str, int]]:
    """Return how many tests passed, which failed, and the reasons of skips with their counts."""
    passed, failures, skips = 0, [], Counter[str]()
    for case in ElementTree.parse(path).iter("testcase"):
        skipped = case.find("skipped")
        if case.find("failure") is not None or case.find("error") is not None:
            failures.append(f"{case.get('classname') or ''}::{case.get('name')}".lstrip(":"))
        elif skipped is not None:
            skips[skip_reason(skipped)] += 1
        else:
            passed += 1
    return passed, failures, dict(sorted(skips.items()))


def available_memory() -> int:
    """Return the memory that is free for processes, in bytes; 0 where it is not known."""
    meminfo = Path("/proc/meminfo")
    text = meminfo.read_text() if meminfo.is_file() else ""
    found = re.search(r"MemAvailable: +(\d+) kB", text)
    return int(found[1]) << 10 if found else 0


def default_jobs() -> int:
    """Return how many cells run at once: by cores, and by memory."""
    return max(1, min(os.cpu_count() or 1, available_memory() // MEMORY_OF_A_CELL))


class Matrix:
    """Run cells, at most `jobs` at once, each within a time limit."""

    def __init__(self, jobs: int, seconds: float) -> None:
        self.jobs, self.seconds = jobs, seconds
        self.processes = Processes()

    def run(self, cells: Sequence[Cell]) -> Iterator[Result]:
        """Yield the results of cells as they end; what still runs ends with the iterator."""
        LOGS.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(self.jobs) as pool:
            futures: list[Future[Result]] = [pool.submit(self.run_cell, cell) for cell in cells]
            try:
                for future in as_completed(futures):
                    yield future.result()
            finally:
                self.processes.end()
                pool.shutdown(cancel_futures=True)

    def run_cell(self, cell: Cell) -> Result:
        """Install and run one cell; nothing that goes wrong with it is raised."""
        start, log = time.monotonic(), log_of(cell.name)
        log.write_bytes(b"")
        result = Result(cell.name, "not run", datetime.date.today().isoformat())
        result.tests = list(cell.group.tests)
        try:
            self._run_tests(cell, log, result)
        except NotRunError as error:
            result.reason, result.excused = str(error), error.excused
        except CellFailedError as error:
            result.state, result.reason = "failed", str(error)
        result.seconds = time.monotonic() - start
        return result

    def _run_tests(self, cell: Cell, log: Path, result: Result) -> None:
        arguments = test_arguments(cell)
        installed = install(cell, self._installer(log))
        path = {"PYTHONPATH": str(installed.path)} if installed.path else {}
        result.versions = probe(cell, installed, path)
        report = log.with_suffix(".xml")
        report.unlink(missing_ok=True)
        with tempfile.TemporaryDirectory(prefix="gdn_ops-") as folder:
            # In a worker, so that a crash of the interpreter is one failed test and not the end.
            options = ["-n", "1", "-p", "no:cacheprovider", f"--junitxml={report}"]
            options += [f"--basetemp={folder}/tests"]
            environment = {**path, "GDN_OPS_CACHE": f"{folder}/cache"}
            if self.jobs > 1:
                environment["OMP_NUM_THREADS"] = "1"
            command = [installed.python, "-m", "pytest", *options, *arguments]
            code = self.processes.run(command, log, environment, self.seconds)
        if not report.exists():
            raise CellFailedError(f"pytest ended with {code}: {last_line(log)}")
        result.passed, result.failures, result.skips = read_junit(report)
        is_passed = code == 0 and result.passed > 0
        result.state = "passed" if is_passed else "failed"
        if not is_passed and not result.failures:
            result.reason = f"pytest ended with {code}: {last_line(log)}"

    def _installer(self, log: Path) -> Callable[[list[str], dict[str, str]], None]:
        def run(command: list[str], environment: dict[str, str]) -> None:
            if self.processes.run(command, log, environment, self.seconds):
                raise NotRunError(f"cannot be installed: {last_line(log)}")

        return run


def probe(cell: Cell, installed: Installed, path: dict[str, str]) -> dict[str, str]:
    """Import the package of a cell and return the versions that run; they must be the cell's.

    Raises:
        CellFailedError: it cannot be imported, or is another version than the cell's.
    """
    package = cell.group.package
    modules = [package] if package != "python" else ["torch"]
    done = subprocess.run(
        [installed.python, "-c", PROBE, *modules],
        cwd=ROOT,
        env={**os.environ, **path},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no output"]
        raise CellFailedError(f"cannot be imported: {lines[-1].replace(str(ROOT), '.')}")
    found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    check_versions(cell, installed, found)
    changed = {name for name, _ in installed.versions} & {*SHOWN, *MODULES}
    return {name: version for name, version in found.items() if name in {package, *changed}}


def check_versions(cell: Cell, installed: Installed, found: dict[str, str]) -> None:
    """Raise CellFailedError unless the versions that were found are those of the cell."""
    wanted = lowest(cell.group.package) if cell.version == "lowest" else cell.version
    version = found[cell.group.package]
    if wanted[0].isdigit() and not f"{version}.".startswith(f"{wanted}."):
        raise CellFailedError(f"{cell.group.package} {version} would run, should be {wanted}")
    for name, should_be in installed.versions:
        if found.get(name, should_be) != should_be:
            raise CellFailedError(f"{name} {found[name]} would run, should be {should_be}")


def log_of(cell: str) -> Path:
    """Return the log of a cell."""
    return LOGS / f"{cell}.log"


def last_line(log: Path) -> str:
    """Return the last line of a log that says an error, else the last one."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith(("ERROR", "E  "))]
    return (errors or lines or ["no output"])[-1].replace(str(ROOT), ".")
