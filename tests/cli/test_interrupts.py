"""Ctrl-C, whenever it comes, ends a command in one line and with exit code 130.

What comes before `gdn_ops._interrupt` is imported is Python's own to answer: tests wait for it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from gdn_ops.cli import exit_codes
from paths import ROOT
from processes import python

LINE = "\ngdn-ops: interrupted\n"

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="there are no such signals")


@pytest.fixture(autouse=True)
def heard() -> Iterator[None]:
    """Start no program that ignores Ctrl-C, as all do of a shell that runs in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def command(folder: Path, before: str = "", after: str = "") -> str:
    """Write a program `gdn-ops` with code before and after its import; return its path."""
    path = folder / "gdn-ops"
    path.write_text(f"{before}\nfrom gdn_ops.cli import main\n{after}\nmain()\n")
    return str(path)


def interrupted(path: str, *arguments: str) -> tuple[int, str]:
    """Run a program that interrupts itself; return its exit code and what is on stderr."""
    done = python(path, *arguments, PYTHONPATH=str(ROOT), GDN_OPS_CACHE=os.devnull)
    return done.returncode, done.stderr


ANNOUNCE = """
import signal
install = signal.signal
def announce(*given):
    signal.signal = install
    install(*given)
    print("listening", flush=True)
signal.signal = announce
"""


# In imports, in the first subjects, and while examples are drawn.
@pytest.mark.parametrize("seconds", [0.0, 0.3, 1.0, 2.5, 5.0])
def test_an_interrupt_at_any_moment_is_a_line_and_130(seconds: float, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, command(tmp_path, ANNOUNCE), "check", "--backend", "naive"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "GDN_OPS_CACHE": os.devnull},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "listening\n"
    time.sleep(seconds)
    os.killpg(process.pid, signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert process.returncode == exit_codes.INTERRUPTED
    assert told.endswith(LINE)
    assert "Traceback" not in told


@pytest.mark.parametrize(
    ("every", "words"),
    [
        (16, ["--version"]),
        (16, ["chek"]),
        pytest.param(1, ["chek"], marks=pytest.mark.slow),
        pytest.param(1, ["info", "--json"], marks=pytest.mark.slow),
    ],
)
def test_no_instruction_and_no_import_lets_an_interrupt_through(
    every: int, words: list[str]
) -> None:
    done = python(ROOT / "tests" / "interrupts.py", every, *words, PYTHONPATH=str(ROOT))
    children = json.loads(done.stdout[done.stdout.index('[{"where"') :])
    assert len(children) > 200 / every
    where = {child["where"].split(",")[0].split(" ")[0] for child in children}
    assert where >= {"import", "main", "run", "_listen"}
    for child in children:
        if child["ignored"]:
            # All that was registered for the end has run.
            assert child["code"] == done.returncode, child
        else:
            assert child["code"] == exit_codes.INTERRUPTED, child
            assert child["stderr"].endswith(LINE), child
        assert "Traceback" not in child["stderr"], child


SWALLOWING = """
import signal
from gdn_ops import _interrupt
from gdn_ops.cli import commands
_interrupt.PATIENCE = 0.2
class Last:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)
def run_command(arguments):
    try:
        {swallow}
    except BaseException:
        {then}
    {after}
commands.run_command = run_command
"""
THREAD = "import threading as t; t.Thread(target=t.Event().wait).start()"
SIGNAL = "signal.raise_signal(signal.SIGINT)"


@pytest.mark.parametrize(
    ("swallow", "then", "after"),
    {
        "swallowed": (SIGNAL, "pass", "return 0"),
        "never ending": (SIGNAL, "pass", "while True: pass"),
        "another error": (SIGNAL, "raise RuntimeError('x')", "return 0"),
        "a mistake": (SIGNAL, "raise ValueError('x')", "return 0"),
        "an exit": (SIGNAL, "raise SystemExit(1)", "return 0"),
        "in a finaliser": ("Last()", "pass", "while True: pass"),
        "twice": (SIGNAL, SIGNAL, "return 0"),
        "beside a thread": (f"{THREAD}; {SIGNAL}", "raise", "return 0"),
    }.values(),
)  # fmt: skip
def test_an_interrupt_that_a_library_keeps_is_not_lost(
    swallow: str, then: str, after: str, tmp_path: Path
) -> None:
    code = SWALLOWING.format(swallow=swallow, then=then, after=after)
    assert interrupted(command(tmp_path, after=code)) == (exit_codes.INTERRUPTED, LINE)


def test_at_the_end_an_interrupt_is_a_line_or_too_late(tmp_path: Path) -> None:
    at_exit = f"import atexit, signal\natexit.register(lambda: {SIGNAL})"
    path = command(tmp_path, after=at_exit)
    assert interrupted(path, "--version") == (exit_codes.INTERRUPTED, LINE)
    # A module is let go when everything registered has run and every output is written.
    path = command(tmp_path, after=f"{SWALLOWING.split('def run')[0]}\nlast = Last()")
    assert interrupted(path, "--version") == (0, "")


def test_a_closed_or_full_output_changes_nothing(tmp_path: Path) -> None:
    code = SWALLOWING.format(swallow=f"print('x'); {SIGNAL}", then="raise", after="")
    path = command(tmp_path, after=code)
    for redirected in (">/dev/full", ">&-", "2>&-", "2>/dev/full"):
        if "full" in redirected and not Path("/dev/full").exists():
            continue
        line = f"{sys.executable} {path} {redirected}"
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""}
        done = subprocess.run(["bash", "-c", line], env=environment, capture_output=True, text=True)
        assert done.returncode == exit_codes.INTERRUPTED, redirected
        assert done.stderr == ("" if "2>" in redirected else LINE), redirected


def test_an_ignored_interrupt_stays_ignored(tmp_path: Path) -> None:
    # As a shell does for what it runs in the background.
    ignore = "import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)"
    path = command(tmp_path, ignore, f"import signal\n{SIGNAL}")
    assert interrupted(path, "--version") == (0, "")


def test_another_program_keeps_its_own_answer() -> None:
    code = "import signal, gdn_ops.cli as c; c.run = lambda _: 0\ntry: c.main([])\n"
    code += "except SystemExit: print(signal.getsignal(2) is signal.default_int_handler)"
    assert python("-c", code).stdout == "True\n"
    code = f"import signal, gdn_ops.cli as c; c.run = lambda _: {SIGNAL}; c.main([])"
    done = python("-c", code)
    assert (done.returncode, done.stderr) == (exit_codes.INTERRUPTED, LINE)
