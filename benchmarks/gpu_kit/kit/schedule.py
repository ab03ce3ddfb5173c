"""Run the stages of a plan one after the other within a total time, and keep what they found."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kit.plans import Stage
from kit.process import run_command
from kit.results import Outcome, Results
from kit.table import add_rows
from kit.unpack import Kit

MOST_SHOWN = 60
"""Lines of one stage that are printed; its file has all."""

WIDEST = 200
FOR_THE_END = 3.0
"""Seconds that are kept for writing the results."""

FOR_ITSELF = 8.0
"""Seconds by which a command that limits itself ends before it is ended."""

TOOL_FOLDERS = ("/usr/local/cuda/bin", "/opt/nvidia/nsight-compute/*")
SIGNALS = (signal.SIGTERM, signal.SIGHUP)


class Interrupted(BaseException):
    """Report a signal that asks to end."""


@dataclass
class Run:
    """Hold where a run writes and how long it may take.

    Attributes:
        out: the output folder, where nothing but results goes: a file per stage, and one of all.
        unpacked: where the kit is unpacked and stages write what else they write.
        seconds: the time for everything.
    """

    out: Path
    unpacked: Path
    seconds: float
    start: float = field(default_factory=time.monotonic)

    def carry_out(self, plan: str, stages: Sequence[Stage], kit: Kit) -> int:
        """Run the stages, print what they find, write the results; return 1 if any failed."""
        self.out.mkdir(parents=True, exist_ok=True)
        gpu = gpu_facts()
        results = Results.begin(plan, kit, gpu)
        print(f"plan {plan}: {len(stages)} stages, {self.seconds:.0f} s, {gpu or 'no GPU'}")
        for text in kit.trouble:
            print(f"kit: {text}")
        for asking in SIGNALS:
            signal.signal(asking, _interrupt)
        try:
            for number, stage in enumerate(stages, 1):
                log = self.out / f"{number}-{stage.name}.log"
                outcome = self.tried(stage, kit, bool(gpu), log)
                self.say(f"{stage.name}: {outcome.line()}")
                self.keep(outcome, stage, kit, results)
        except (Interrupted, KeyboardInterrupt) as error:
            results.trouble.append(f"interrupted in {stage.name}: {type(error).__name__} {error}")
        results.write(self.out)
        print(results.summary())
        return 0 if results.passed else 1

    def keep(self, outcome: Outcome, stage: Stage, kit: Kit, results: Results) -> None:
        """Keep what a stage has found, use its rows, and write the results so far."""
        try:
            results.add(outcome, self.unpacked / "work" / stage.name)
            if stage.table and outcome.rows:
                self.say(add_rows(kit.tree / stage.table, outcome.rows, kit.environment()))
        except Exception as error:
            results.trouble.append(f"after {stage.name}: {type(error).__name__}: {error}")
            self.say(results.trouble[-1])
        results.write(self.out)

    def say(self, text: str) -> None:
        """Print a line with the seconds since the beginning."""
        print(f"[{time.monotonic() - self.start:5.0f} s] {text}", flush=True)

    def left(self) -> float:
        """Return the seconds that stages may still take."""
        return self.seconds - FOR_THE_END - (time.monotonic() - self.start)

    def tried(self, stage: Stage, kit: Kit, has_gpu: bool, log: Path) -> Outcome:
        """Run one stage; what goes wrong here itself is the outcome of that stage alone."""
        try:
            return self.run_stage(stage, kit, has_gpu, log)
        except Exception as error:
            return Outcome(stage.name, "failed", f"{type(error).__name__}: {error}")

    def run_stage(self, stage: Stage, kit: Kit, has_gpu: bool, log: Path) -> Outcome:
        """Run one stage in the time that is left, or say why not."""
        if stage.needs_gpu and not has_gpu:
            return Outcome(stage.name, "no GPU")
        left = self.left()
        if left < min(stage.least, stage.seconds):
            return Outcome(stage.name, "skipped", f"{max(0, left):.0f} s are left")
        tool = find_tool(stage.tool)
        if stage.tool and not tool:
            return Outcome(stage.name, "no tool", f"{stage.tool} is not there")
        limit = min(stage.seconds, left)
        work = self.unpacked / "work" / stage.name
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        values = {
            **{"{python}": sys.executable, "{tree}": str(kit.tree), "{work}": str(work)},
            "{kit}": str(Path(__file__).resolve().parent),
            "{seconds}": f"{max(1, limit - FOR_ITSELF):.0f}",
        }
        environment = kit.environment() | ({"KIT_TOOL": tool} if tool else {})
        command = [filled(word, values) for word in stage.command]
        watch = Watch(stage)
        self.say(f"{stage.name}: at most {limit:.0f} s")
        ending = run_command(command, log, limit, environment, kit.tree, watch.take)
        detail = ending.detail
        if limit < stage.seconds:
            detail = f"{detail}; shortened to {limit:.0f} s of {stage.seconds:.0f} s".lstrip("; ")
        outcome = Outcome(stage.name, ending.status, detail, round(ending.seconds, 1), ending.tail)
        outcome.rows = watch.rows
        return outcome


@dataclass
class Watch:
    """Print the lines of a stage that are worth it, and collect its rows to paste."""

    stage: Stage
    shown: int = 0
    rows: list[str] = field(default_factory=list)

    def take(self, line: str) -> None:
        """Look at one line."""
        row = re.search(self.stage.rows, line) if self.stage.rows else None
        if row and row[1] not in self.rows:
            self.rows.append(row[1])
        if not line.strip() or not re.search(self.stage.shows, line):
            return
        self.shown += 1
        if self.shown <= MOST_SHOWN:
            print(f"  {self.stage.name}| {line[:WIDEST]}", flush=True)
        elif self.shown == MOST_SHOWN + 1:
            print(f"  {self.stage.name}| more lines are in its file", flush=True)


def filled(word: str, values: dict[str, str]) -> str:
    """Return a word of a command with its placeholders replaced; other braces stay."""
    for name, value in values.items():
        word = word.replace(name, value)
    return word


def _interrupt(number: int, _: object) -> None:
    raise Interrupted(signal.Signals(number).name)


def gpu_facts() -> str:
    """Return name, driver, memory and clocks of the first GPU; "" where there is none."""
    query = "--query-gpu=name,driver_version,memory.total,clocks.sm,clocks.max.sm"
    try:
        done = subprocess.run(
            ["nvidia-smi", query, "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=20,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    lines = done.stdout.strip().splitlines()
    return lines[0] if done.returncode == 0 and lines else ""


def find_tool(name: str) -> str:
    """Return the path of a program, on PATH or where CUDA puts its tools; "" where it is not."""
    folders = [str(path) for text in TOOL_FOLDERS for path in Path("/").glob(text.lstrip("/"))]
    path = os.pathsep.join([os.environ.get("PATH", ""), *sorted(folders, reverse=True)])
    return (shutil.which(name, path=path) or "") if name else ""
