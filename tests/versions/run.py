"""Run cells side by side: install, check what is imported, run pytest, read what it found."""

from __future__ import annotations

import contextlib
import datetime
import functools
import json
import os
import re
import signal
import subprocess
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

from versions.cells import ROOT, Cell, CellFailedError, NotRunError, lowest
from versions.install import FOLDER, install, interpreter

LOGS = FOLDER / "logs"
MEMORY_OF_A_CELL = 4 << 30
SHOWN = (
    *("huggingface-hub", "tokenizers", "onnxscript"),
    *("torch", "triton", "onnx", "onnxruntime", "transformers"),
)
"""What is shown, beside the package itself, where a cell has another than the lock."""

PROBE = """
import importlib, importlib.metadata, json, platform, sys
module, *names = sys.argv[1:]
installed = {name: importlib.metadata.version(name) for name in {module, *names}}
imported = importlib.import_module(module).__version__
if imported.partition("+")[0] != installed[module].partition("+")[0]:
    sys.exit(f"{module} {imported} is imported, {installed[module]} is installed")
print(json.dumps({"python": platform.python_version(), **installed}))
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

    @property
    def package(self) -> str:
        """Return the package that the cell is about."""
        return self.cell.rpartition("-")[0]

    @property
    def ran_with(self) -> str:
        """Return the versions that it ran with, its own package first; "-" where none is known."""
        names = sorted(self.versions, key=lambda name: (name != self.package, name))
        return ", ".join(f"{name} {self.versions[name]}" for name in names) or "-"


def default_jobs() -> int:
    """Return how many cells run at once: by cores, and by memory."""
    return max(1, min(os.cpu_count() or 1, available_memory() // MEMORY_OF_A_CELL))


def available_memory() -> int:
    """Return the memory that is free for processes, in bytes; 0 where it is not known."""
    with contextlib.suppress(OSError):
        if line := re.search(r"MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text()):
            return int(line[1]) << 10
    return 0


def run_cells(cells: Sequence[Cell], jobs: int, seconds: float) -> Iterator[Result]:
    """Yield the results of cells as they end; what still runs ends with the iterator.

    Args:
        cells: what to run.
        jobs: how many run at once; they share the processes that tests run in.
        seconds: the time limit of each command of a cell.
    """
    LOGS.mkdir(parents=True, exist_ok=True)
    ended = threading.Event()
    workers = max(1, default_jobs() // jobs)
    environment = {"OMP_NUM_THREADS": "1"} if jobs * workers > 1 else {}
    # In a worker even where it is one, so that a crash of the interpreter is one failed test and
    # not the end.
    options = ["-n", str(workers), *(["--dist", "loadfile"] if workers > 1 else [])]
    with ThreadPoolExecutor(jobs) as pool:
        futures = [
            pool.submit(run_cell, cell, options, environment, seconds, ended) for cell in cells
        ]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            ended.set()
            pool.shutdown(cancel_futures=True)


def run_cell(
    cell: Cell,
    options: Sequence[str],
    environment: dict[str, str],
    seconds: float,
    ended: threading.Event,
) -> Result:
    """Install and run one cell; nothing that goes wrong with it is raised."""
    start, log = time.monotonic(), log_of(cell.name)
    log.write_bytes(b"")
    run = functools.partial(run_command, log=log, seconds=seconds, ended=ended)
    result = Result(cell.name, "not run", datetime.date.today().isoformat())
    result.tests = list(cell.tests)
    try:
        run_tests(cell, options, environment, run, result)
    except NotRunError as error:
        result.reason, result.excused = str(error), error.excused
    except CellFailedError as error:
        result.state, result.reason = "failed", str(error)
    result.seconds = time.monotonic() - start
    return result


def run_tests(
    cell: Cell,
    options: Sequence[str],
    environment: dict[str, str],
    run: Callable[[list[str], dict[str, str]], int],
    result: Result,
) -> None:
    """Install a cell, run its tests, and put into its result what they found."""
    log = log_of(cell.name)

    def run_installer(command: list[str], environment: dict[str, str]) -> None:
        if run(command, environment):
            raise NotRunError(f"cannot be installed: {last_line(log)}")

    arguments = test_arguments(cell)
    versions = install(cell, run_installer)
    python = interpreter(cell, run_installer)
    path = {"PYTHONPATH": str(FOLDER / cell.name)} if versions else {}
    result.versions = probe(cell, python, versions, path)
    report = log.with_suffix(".xml")
    report.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(prefix="gdn_ops-") as folder:
        outputs = ["-p", "no:cacheprovider", f"--junitxml={report}", f"--basetemp={folder}/tests"]
        code = run(
            [python, "-m", "pytest", *options, *outputs, *arguments],
            {**environment, **path, "GDN_OPS_CACHE": f"{folder}/cache"},
        )
    ending = f"pytest ended with {code}: {last_line(log)}"
    if not report.exists():
        raise CellFailedError(ending)
    result.passed, result.failures, result.skips = read_junit(report)
    is_passed = code == 0 and result.passed > 0
    result.state = "passed" if is_passed else "failed"
    result.reason = "" if is_passed or result.failures else ending


def run_command(
    command: list[str],
    environment: dict[str, str],
    log: Path,
    seconds: float,
    ended: threading.Event,
) -> int:
    """Run a command in the repository, append what it prints to a log, return its exit code.

    However it ends, its children end with it.

    Raises:
        CellFailedError: it took longer than `seconds`.
        NotRunError: `ended` was set meanwhile or before.
    """
    if ended.is_set():
        raise NotRunError("interrupted")
    deadline = time.monotonic() + seconds
    with log.open("ab") as out:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        while process.poll() is None:
            if ended.wait(0.1):
                raise NotRunError("interrupted")
            if time.monotonic() > deadline:
                raise CellFailedError(f"took longer than {seconds / 60:.0f} min")
        return process.returncode
    finally:
        # Also what the command left running, such as workers of a compiler.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_arguments(cell: Cell) -> list[str]:
    """Return pytest's arguments for the tests of a cell; a pattern that matches none is an error.

    Raises:
        CellFailedError: the table names a test that is not there.
    """
    tests, arguments = ROOT / "tests", []
    for pattern in cell.tests:
        matching = [tests / pattern] if "::" in pattern else sorted(tests.glob(pattern))
        if not matching:
            raise CellFailedError(f"no test file is called {pattern}")
        arguments += map(str, matching)
    return [*dict.fromkeys(arguments), *(["-k", cell.keyword] if cell.keyword else [])]


def probe(
    cell: Cell, python: str, versions: dict[str, str], environment: dict[str, str]
) -> dict[str, str]:
    """Import the package of a cell and return the versions that run; they must be the cell's.

    Args:
        cell: the cell.
        python: its interpreter.
        versions: what was installed for it, by name.
        environment: what it adds to the environment of this process.

    Raises:
        CellFailedError: it cannot be imported, or is another version than the cell's.
    """
    module = "torch" if cell.package == "python" else cell.package
    whole = ("torch", "triton") if cell.package == "python" and cell.beside else ()
    shown = sorted({cell.package, *whole, *(versions.keys() & set(SHOWN))})
    done = subprocess.run(
        [python, "-c", PROBE, module, *(name for name in shown if name != "python")],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no output"]
        raise CellFailedError(f"cannot be imported: {lines[-1].replace(str(ROOT), '.')}")
    answers: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    check_versions(cell, versions, answers)
    return {name: answers[name] for name in shown}


def check_versions(cell: Cell, versions: dict[str, str], imported: dict[str, str]) -> None:
    """Raise CellFailedError unless the versions that were found are those of the cell."""
    wanted = lowest(cell.package) if cell.version == "lowest" else cell.version
    version = imported[cell.package]
    if wanted[0].isdigit() and not f"{version}.".startswith(f"{wanted}."):
        raise CellFailedError(f"{cell.package} {version} would run, should be {wanted}")
    chosen = cell.beside if cell.package == "python" else ()
    for name, _, bound in (text.partition("==") for text in chosen):
        if not f"{imported[name]}.".startswith(f"{bound.removesuffix('*').rstrip('.')}."):
            raise CellFailedError(f"{name} {imported[name]} would run, should be {bound}")
    for name, should_be in versions.items():
        if imported.get(name, should_be) != should_be:
            raise CellFailedError(f"{name} {imported[name]} would run, should be {should_be}")


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


def skip_reason(element: ElementTree.Element) -> str:
    """Return why a test was skipped, without the path that pytest adds for a whole file."""
    text = element.get("message") or ""
    if text == "collection skipped":
        skipped = re.search(r"Skipped: (.*?)[\"']\)?$", (element.text or "").strip(), re.DOTALL)
        text = skipped[1] if skipped else text
    text = text.replace(str(ROOT), ".").strip().splitlines()[0] if text.strip() else "no reason"
    return f"expected to fail: {text}" if element.get("type") == "pytest.xfail" else text


def log_of(cell: str) -> Path:
    """Return the log of a cell."""
    return LOGS / f"{cell}.log"


def last_line(log: Path) -> str:
    """Return the last line of a log that says an error, else the last one."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith(("ERROR", "E  "))]
    return (errors or lines or ["no output"])[-1].replace(str(ROOT), ".")
